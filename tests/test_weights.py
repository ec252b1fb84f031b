"""Weights per model."""

import pytest
import torch
from architectures import relative_error
from helpers.nets import SmallResNet, images, settle, settled_pair, trainer

from lightning_zipit import MergeSettings, ZipIt, merge_backbones
from lightning_zipit import functional as F
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average, Permute
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine import LeastSquares, Repair
from lightning_zipit.task_vectors import Ties

X = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def nets():
    return {task: settle(SmallResNet(), X) for task in "ab"}


def test_a_cluster_is_the_weighted_mean_of_its_features():
    labels, weights = torch.tensor([0, 0, 1, 2, 1, 0]), (3.0, 1.0)
    merge, unmerge = F.merge_matrices(labels, 2, weights)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    merged = torch.cat(merge, 1)
    torch.testing.assert_close(merged @ values, torch.tensor([(3 * 1 + 3 * 2 + 6) / 7, (3 * 3 + 5) / 4, 4]))
    torch.testing.assert_close(merged @ torch.cat(unmerge), torch.eye(3))
    for same in ((6, 2), (0.3, 0.1)):
        torch.testing.assert_close(torch.cat(F.merge_matrices(labels, 2, same)[0], 1), merged)
    (plain, _), (equal, _) = F.merge_matrices(labels, 2), F.merge_matrices(labels, 2, (5, 5))
    torch.testing.assert_close(plain, equal)


def test_features_of_models_that_count_nothing_are_averaged_among_themselves():
    (_, second), _ = F.merge_matrices(torch.tensor([0, 1, 2, 2]), 2, (1, 0))
    assert second.tolist() == [[0, 0], [0, 0], [0.5, 0.5]]


@torch.no_grad()
@pytest.mark.parametrize("chosen", "ab")
def test_with_all_the_weight_a_model_keeps_its_function(chosen):
    models = settled_pair()
    weights = {task: float(task == chosen) for task in models}
    merge = {"backbone": "net", "matcher": Permute(), "refine": None, "weights": weights}
    merged = ZipIt(trainer()).merge(models, images(), **merge)
    assert relative_error({chosen: merged(X, task=chosen)}, models[chosen].net(X)) < 1e-4
    assert any("averaged with the weights of the models" in note for note in merged.report.notes)


@torch.no_grad()
def test_matched_by_number_all_that_is_merged_is_the_weighted_mean():
    sources = nets()
    settings = MergeSettings(matcher=Average(), refine=None, merge_heads=True, weights=[3, 1])
    merged = merge_backbones(sources, [X], settings).trunk.state_dict()
    first, second = (net.state_dict() for net in sources.values())
    assert set(merged) == set(first)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), torch.lerp(first[name].double(), second[name].double(), 0.25))


@torch.no_grad()
@pytest.mark.parametrize("how", [LeastSquares(ridge=1e-6, positions=None), Repair(positions=None)], ids=str)
def test_layers_are_adapted_to_the_weighted_mean(how):
    sources = nets()
    settings = MergeSettings(matcher=Permute(), refine=how, merge_heads=True, weights=[0, 1])
    merged = merge_backbones(sources, [X], settings)
    assert relative_error(AllHeads(merged.trunk, merged.heads)(X), sources["b"](X)) < 2e-2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "z": 1}, r"keys \['a', 'z'\], but the tasks are \['a', 'b'\]"),
        ([1, 2, 3], "2 numbers, one per model"),
        ([1, -1], "none negative"),
        ({"a": 0, "b": 0}, "at least one above 0"),
        ([1, float("nan")], "numbers"),
    ],
)
def test_weights_that_fit_no_model_are_refused(weights, message):
    with pytest.raises(ConfigurationError, match=message):
        merge_backbones(nets(), [X], MergeSettings(weights=weights))


def test_weights_and_combine_exclude_each_other():
    with pytest.raises(ConfigurationError, match="Give only one of them"):
        MergeSettings(matcher=Average(), combine=Ties(), weights=[1, 2])
