"""What calibration gathers, against a plain computation."""

import pytest
import torch
from helpers.nets import SmallResNet

from lightning_zipit import trace
from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._calibration.positions import choose_positions, marks
from lightning_zipit._common.calls import Call

IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gathered(networks, batch_size, positions=None):
    graph = trace(networks["a"])
    calibration = Calibration(graph, networks, positions=positions)
    with torch.no_grad():
        for x in IMAGES.split(batch_size):
            calibration.update(Call.of(x))
    return {space: calibration.take(space) for space in graph.spaces}


@pytest.fixture(scope="module")
def networks():
    return {task: SmallResNet().eval() for task in "ab"}


@pytest.fixture(scope="module")
def observed(networks):
    """Per space, the samples of both networks side by side, one plain run after the other."""
    graph, seen = trace(networks["a"]), {}
    for network in networks.values():
        taps, values = {space.tap.node: name for name, space in graph.spaces.items() if space.tap}, {}
        interpreter = torch.fx.Interpreter(network, graph=graph.fx_graph, garbage_collect_values=False)
        with torch.no_grad():
            for node in graph.trunk_graph():
                value = IMAGES if node.op == "placeholder" else interpreter.run_node(node)
                interpreter.env[node], values[node.name] = value, value.clone()
        for node, name in taps.items():
            seen.setdefault(name, []).append(values[node].double().movedim(1, -1).flatten(0, -2))
    return {name: torch.cat(rows, 1) for name, rows in seen.items()}


@pytest.mark.parametrize("batch_size", [40, 7, 1])
def test_moments_of_every_space_are_those_of_all_its_samples(networks, observed, batch_size):
    found = gathered(networks, batch_size)
    assert observed.keys() == {name for name, moments in found.items() if moments is not None}
    for name, rows in observed.items():
        assert found[name].count == len(rows)
        torch.testing.assert_close(found[name].mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].covariance, rows.T.cov(), rtol=1e-4, atol=1e-5)


def test_positions_do_not_depend_on_the_batches_that_a_sample_comes_in(networks):
    whole, parts = gathered(networks, 40, positions=9), gathered(networks, 7, positions=9)
    for name, moments in whole.items():
        assert moments.count == parts[name].count <= 9 * len(IMAGES)
        torch.testing.assert_close(moments.covariance, parts[name].covariance, rtol=1e-4, atol=1e-5)


def test_more_positions_than_there_are_is_all_of_them(networks):
    every, some = gathered(networks, 40), gathered(networks, 40, positions=10_000)
    assert all(torch.equal(some[name].covariance, moments.covariance) for name, moments in every.items())


def test_chosen_positions_are_different_and_use_all_places():
    chosen = choose_positions(marks(Call.of(torch.randn(500, 3, 8, 8))), size=50, count=20)
    assert all(len(row.unique()) == 20 for row in chosen)
    frequency = chosen.flatten().bincount(minlength=50) / 500
    assert frequency.min() > 0.25 and frequency.max() < 0.55  # 0.4 is expected
