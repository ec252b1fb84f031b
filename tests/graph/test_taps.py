"""Taps: at the last reader of a space, or at all readers if a layer is applied several times."""

import copy

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._common.calls import Call
from lightning_zipit.graph.taps import before_activations
from lightning_zipit.paths import AllHeads


class Twice(nn.Module):
    """Applies a layer twice. Most of its outputs are 0 the second time."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        nn.init.constant_(self.again.bias, -0.3)

    def forward(self, x):
        return self.last(self.again(self.again(self.first(x).relu()).relu()).relu())

    def permute(self):
        order = torch.randperm(16)
        for layer in (self.first, self.again):
            layer.weight.copy_(layer.weight[order]), layer.bias.copy_(layer.bias[order])
        for layer in (self.again, self.last):
            layer.weight.copy_(layer.weight[:, order])


class BothSides(nn.Module):
    """One layer writes the features of two images of different sizes. Each image has its own reader."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Linear(8, 3)
        self.large, self.small = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        nn.init.constant_(self.conv.bias, -0.4)

    def forward(self, x):
        large, small = self.conv(x).relu(), self.conv(x[:, :, ::2, ::2] * 0.5).relu()
        return self.last((self.large(large).mean((2, 3)) + self.small(small).mean((2, 3))).relu())

    def permute(self):
        order = torch.randperm(16)
        self.conv.weight.copy_(self.conv.weight[order]), self.conv.bias.copy_(self.conv.bias[order])
        for layer in (self.large, self.small):
            layer.weight.copy_(layer.weight[:, order])


class Attending(nn.Module):
    """Applies one attention twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.last(x.mean(1))


def nodes_of(tap):
    return [each.node for each in (tap, *tap.also)]


def test_a_layer_that_is_applied_twice_is_measured_both_times():
    graph = trace(Twice())
    assert nodes_of(graph.spaces["first"].tap) == ["relu_2", "relu_1", "relu"]
    assert nodes_of(before_activations(graph).spaces["first"].tap) == ["again_1", "again", "first"]
    sizes = trace(BothSides(), example_input=torch.zeros(1, 3, 12, 12))
    assert nodes_of(sizes.spaces["conv"].tap) == ["relu_1", "relu"] and not sizes.spaces["large"].tap.also
    attending = trace(Attending(), example_input=torch.zeros(1, 5, 6)).spaces
    queries = [nodes_of(space.tap) for name, space in attending.items() if space.tap and name.startswith("attention")]
    assert queries and all(len(nodes) == 4 for nodes in queries)


def test_taps_at_different_places_have_different_keys():
    tap = trace(Twice()).spaces["first"].tap
    assert len({tap.key, tap.also[0].key, measured_at_first(tap).key}) == 3


def measured_at_first(tap):
    return type(tap)(tap.node, tap.axes, tap.block, tap.reader)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, 7])
def test_samples_of_all_taps_count_equally(positions):
    torch.manual_seed(0)
    nets, x = {task: BothSides().eval() for task in "ab"}, torch.randn(20, 3, 12, 12)
    graph = trace(nets["a"], example_input=x[:1])
    calibration = Calibration(graph, nets, positions=positions)
    for batch in x.split(6):
        calibration.update(Call.of(batch))
    found = calibration.take("conv")
    if positions is None:
        images = (x, x[:, :, ::2, ::2] * 0.5)
        rows = [
            torch.cat([net.conv(image).relu().movedim(1, 0).flatten(1) for image in images], 1) for net in nets.values()
        ]
        expected = torch.cat(rows).double()
        assert found.count == expected.shape[1]
        assert torch.allclose(found.covariance, expected.cov(), atol=1e-6)
    assert found.count == 20 * (10 * 10 + 4 * 4 if positions is None else 2 * positions)


@torch.no_grad()
@pytest.mark.parametrize("refine", [None, "least_squares"])
@pytest.mark.parametrize(("make", "shape"), [(Twice, (6,)), (BothSides, (3, 12, 12))])
def test_features_that_are_silent_at_the_last_reader_are_matched(make, shape, refine):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(48, *shape)
    permuted = copy.deepcopy(net)
    permuted.permute()
    expected = net(x)
    assert torch.allclose(permuted(x), expected, atol=1e-5)
    merged = merge_backbones({"a": net, "b": permuted}, [x], MergeSettings(refine=refine))
    for output in AllHeads(merged.trunk, merged.heads)(x).values():
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max()
