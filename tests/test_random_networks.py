"""Networks drawn at random: tracing, merging with itself and with a permuted copy all hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import relative_error
from helpers.nets import settle
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.matchers import GreedyZip
from lightning_zipit.paths import AllHeads

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis, which the dev extra installs")
from hypothesis import strategies as st  # noqa: E402

LAYERS = (
    "conv",
    "depthwise",
    "grouped",
    "linear",
    "squeeze",
    "skip",
    "dense",
    "gate",
    "shuffle",
    "halves",
    "norm",
    "pool",
)


class RandomNet(nn.Module):
    """Layers in a row, each of which may also look back at what came before."""

    def __init__(self, layers: list[tuple[str, int]], width: int):
        super().__init__()
        self.kinds = [kind for kind, _ in layers]
        self.layers, channels = nn.ModuleList(), [width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for kind, out in layers:
            layer, after = self.make(kind, channels[-1], out)
            self.layers.append(layer)
            channels.append(after)
        self.last, self.fc = nn.Conv2d(channels[-1], 6, 1), nn.Linear(6, 4)

    def make(self, kind, size, out):
        if kind == "conv":
            return nn.Sequential(nn.Conv2d(size, out, 3, padding=1), nn.BatchNorm2d(out), nn.LeakyReLU()), out
        if kind == "depthwise":
            return nn.Sequential(nn.Conv2d(size, 2 * size, 3, padding=1, groups=size), nn.LeakyReLU()), 2 * size
        if kind == "grouped":
            inner = nn.Conv2d(size, 8, 1), nn.LeakyReLU(), nn.Conv2d(8, 12, 1, groups=4), nn.LeakyReLU()
            return nn.Sequential(*inner, nn.Conv2d(12, out, 1)), out
        if kind in ("skip", "dense", "linear"):
            return nn.Conv2d(size, size, 1), 2 * size if kind == "dense" else size
        if kind == "squeeze":
            return nn.Sequential(nn.Linear(size, 3), nn.Softplus(), nn.Linear(3, size), nn.Sigmoid()), size
        if kind == "norm":
            return nn.GroupNorm(1, size), size
        if kind == "halves":
            return nn.Conv2d(size - size // 2, size - size // 2, 1), size
        return nn.LeakyReLU(), size

    def forward(self, x):
        x = self.stem(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "skip":
                x = x + F.leaky_relu(layer(x))
            elif kind == "dense":
                x = torch.cat([x, F.leaky_relu(layer(x))], 1)
            elif kind == "gate":
                x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
            elif kind == "squeeze":
                x = x * layer(x.mean((2, 3)))[:, :, None, None]
            elif kind == "shuffle":
                x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            elif kind == "halves":
                kept = x.shape[1] // 2
                x = torch.cat([layer(x[:, kept:]), x[:, :kept]], 1)
            elif kind == "pool":
                x = F.avg_pool2d(x, 2, 1)
            else:
                x = layer(x)
        return self.fc(F.leaky_relu(self.last(x)).mean((2, 3)))


NETWORKS = {
    "layers": st.lists(st.tuples(st.sampled_from(LAYERS), st.sampled_from([4, 6, 10])), min_size=1, max_size=6),
    "width": st.sampled_from([4, 6]),
    "count": st.integers(2, 3),
    "cut": st.integers(0, 6),
}


def settings(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@torch.no_grad()
def check(layers, width, count, cut):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    net = settle(RandomNet(layers, width), x)
    expected = net(x)
    graph = trace(net, verify=x)
    assert not graph.barriers
    copies = {"0": net, **{str(i): permute_spaces(net, graph, random_permutations(graph)) for i in range(1, count)}}
    for stop_at in (None, "stem" if cut == 0 else f"layers.{min(cut, len(layers)) - 1}"):
        if stop_at and not list(dict(net.named_modules())[stop_at].parameters()):
            continue  # it may not be called, or end in a skip
        merged = merge_backbones(copies, list(x[None]), MergeSettings(stop_at, GreedyZip(alpha=1.0), refine=None))
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x), expected) < 1e-3
    again = copy.deepcopy(merged)
    assert torch.equal(again.heads["0"](*again.trunk(x)), merged.heads["0"](*merged.trunk(x)))


@settings(3)
@hypothesis.given(**NETWORKS)
def test_random_networks_keep_their_function(layers, width, count, cut):
    check(layers, width, count, cut)


def test_a_network_of_all_layers_keeps_its_function():
    check([(kind, 6) for kind in LAYERS], 6, 2, 4)


@pytest.mark.nightly
@settings(50)
@hypothesis.given(**NETWORKS)
def test_many_random_networks_keep_their_function(layers, width, count, cut):
    check(layers, width, count, cut)
