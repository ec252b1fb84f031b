"""Rules of operators: ties, barriers and errors."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit import register_rule, trace
from lightning_zipit.errors import TraceError, UnknownShapeError, VerificationError
from lightning_zipit.graph.rules.layers import convolution_module

X = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions with an operator between them, and a linear layer."""

    def __init__(self, between, channels=6, into=None, final=None):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(into or channels, 4, 3, padding=1)
        self.other = nn.Conv2d(3, channels, 1)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.fc = nn.Linear(4, 5)
        self.between = between
        self.final = final or (lambda x: x.mean((2, 3)))

    def forward(self, x):
        x = self.conv2(self.between(self, self.conv1(x), x))
        return self.fc(self.final(x))


def attend(query, key, value):
    """``(…, features, positions)``"""
    scores = (query.transpose(-2, -1) @ key).softmax(-1)
    return value @ scores.transpose(-2, -1)


BETWEEN = {
    "functional activation": lambda net, y, x: F.gelu(y),
    "method activation": lambda net, y, x: y.relu().clamp(max=2).sqrt(),
    "scalar arithmetic": lambda net, y, x: (2 * y + 1) / 3 - 0.5,
    "residual sum": lambda net, y, x: y + net.other(x),
    "sum in place": lambda net, y, x: y.add_(net.other(x)),
    "product": lambda net, y, x: y * torch.sigmoid(net.other(x)),
    "learned scale": lambda net, y, x: y * net.scale,
    "gate of pooled features": lambda net, y, x: y * torch.sigmoid(F.adaptive_avg_pool2d(net.other(x), 1)),
    "pooling": lambda net, y, x: F.avg_pool2d(F.max_pool2d(y, 2), 2, stride=1),
    "interpolation": lambda net, y, x: F.interpolate(y, scale_factor=2),
    "padding of positions": lambda net, y, x: F.pad(y, (1, 1, 2, 0)),
    "reshape of positions": lambda net, y, x: y.reshape(y.shape[0], y.shape[1], -1).view(y.size(0), y.size(1), 8, 8),
    "permute there and back": lambda net, y, x: y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
    "transpose": lambda net, y, x: y.transpose(1, 3).tanh().transpose(1, -1),
    "slices of positions": lambda net, y, x: y[:, :, ::2, 1:],
    "new axis": lambda net, y, x: y[..., None].squeeze(-1).unsqueeze(2).squeeze(2),
    "chunk and cat": lambda net, y, x: torch.cat([y.chunk(2, 1)[1], y[:, :3]], dim=1),
    "cat of positions": lambda net, y, x: torch.cat([y, net.other(x)], dim=2),
    "a single channel spread over all": lambda net, y, x: y[:, 2:3] * y,
    "channels by number": lambda net, y, x: y[:, [1, 0, 2, 5, 4, 3]],
    "flip of channels": lambda net, y, x: torch.flip(y, [1]),
    "roll of channels": lambda net, y, x: torch.roll(y, 2, 1) + y,
    "channel shuffle": lambda net, y, x: y.view(y.size(0), 2, 3, 8, 8).transpose(1, 2).reshape(y.size(0), 6, 8, 8),
    "split and back": lambda net, y, x: y.unflatten(1, (3, 2)).relu().flatten(1, 2),
    "stack and unbind": lambda net, y, x: torch.stack([y, net.other(x)], 2).unbind(2)[1],
    "tile of channels": lambda net, y, x: torch.cat([y[:, 4:], y[:, :4]], 1).repeat(1, 2, 1, 1)[:, 1:7],
    "softmax over channels": lambda net, y, x: y.softmax(1),
    "mean over channels": lambda net, y, x: y * torch.sigmoid(y.mean(1, keepdim=True)),
    "norm over channels": lambda net, y, x: F.normalize(y, dim=1) + F.layer_norm(y, y.shape[1:]),
    "group norm": lambda net, y, x: F.group_norm(y, 3),
    "instance norm": lambda net, y, x: F.instance_norm(y),
    "masked": lambda net, y, x: y.masked_fill(x.sum(1, keepdim=True) > 0, 0.0),
    "where positions are positive": lambda net, y, x: torch.where(x.mean(1, keepdim=True) > 0, y, 0.1),
    "attention over positions": lambda net, y, x: attend(y.flatten(2), y.flatten(2), y.flatten(2)).view_as(y),
    "attention in heads": lambda net, y, x: (
        attend(*(z.view(-1, 2, 3, 64) for z in (y, net.other(x), y))).flatten(1, 2).view_as(y)
    ),
    "einsum over positions": lambda net, y, x: torch.einsum("bchw,bcwv->bchv", y, net.other(x)),
    "einsum with a parameter": lambda net, y, x: torch.einsum("bchw,cij->bchw", y, net.scale),
    "dropout": lambda net, y, x: F.dropout(y, 0.5, net.training),
    "functional convolution": lambda net, y, x: F.conv2d(x, net.other.weight, net.other.bias) + y,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_permuting_the_spaces_found_keeps_the_function(name):
    graph = trace(Net(BETWEEN[name]), verify=X)
    assert graph.axes["conv2.weight"][1] is not None and not graph.barriers


def test_concatenation_keeps_two_spaces_side_by_side():
    graph = trace(Net(lambda net, y, x: torch.cat([y, net.other(x)], 1), into=12), verify=X)
    assert str(graph.axes["conv2.weight"][1]) == "← conv1[0:6] + other[6:12]"


def test_padded_channels_are_features_that_are_zero():
    graph = trace(Net(lambda net, y, x: F.pad(y, (0, 0, 0, 0, 3, 3)), into=12), verify=X)
    assert graph.axes["conv2.weight"][1].size == 12


def test_a_residual_stream_is_one_space():
    graph = trace(Net(BETWEEN["residual sum"]))
    assert graph.axes["conv1.weight"][0] == graph.axes["other.weight"][0]
    assert graph.spaces["conv1"].producers == (
        ("conv1.weight", 0),
        ("conv1.bias", 0),
        ("other.weight", 0),
        ("other.bias", 0),
    )


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
        lambda x: x.reshape(-1, 4 * 64),
    ],
)
def test_flatten_makes_a_block_of_positions_of_every_channel(flatten):
    net = Net(BETWEEN["functional activation"], final=flatten)
    net.fc = nn.Linear(4 * 64, 5)
    graph = trace(net, verify=X)
    (block,) = graph.axes["fc.weight"][1].blocks
    assert (block.starts, block.repeat) == (range(0, 256, 64), 64)


def test_a_depthwise_convolution_ties_its_output_to_its_input():
    net = Net(lambda net, y, x: net.depthwise(y))
    net.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    graph = trace(net, verify=X)
    assert graph.axes["depthwise.weight"][0].spaces == ("conv1",)


def test_a_module_in_two_places_ties_both():
    net = Net(lambda net, y, x: net.shared(F.relu(net.shared(y))))
    net.shared = nn.Conv2d(6, 6, 3, padding=1)
    graph = trace(net, verify=X)
    assert len(graph.spaces) == 2
    assert graph.axes["shared.weight"][0].spaces == graph.axes["shared.weight"][1].spaces


def test_features_tied_to_the_input_are_pinned():
    net = Net(lambda net, y, x: y + x, channels=3)
    graph = trace(net, verify=X)
    assert graph.spaces["conv1"].pinned and graph.spaces["conv1"].tap is None


@pytest.mark.parametrize(
    ("between", "operator"),
    [
        (lambda net, y, x: torch.cumsum(y, 1), "`cumsum`"),
        (lambda net, y, x: y[:, 2].unsqueeze(1) * y, "`select`"),
        (lambda net, y, x: y.reshape(-1, 3, 6, 8).view(-1, 6, 6, 8).sort(1)[0], "`sort`"),
        (lambda net, y, x: y + net.other(x).permute(0, 2, 1, 3), "`add`"),
        (lambda net, y, x: y.mean((0, 1), keepdim=True) + y, "`mean`"),
    ],
)
def test_operator_without_a_rule_is_a_named_barrier(between, operator):
    net = Net(between)
    x = torch.randn(2, 3, 6, 8)
    graph = trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), net), verify=x)
    (reason,) = graph.barriers.values()
    assert re.search(rf"{operator}.*register_rule.*backbone.*stop_at", reason)
    assert graph.notes[0].startswith("Kept per task from here on")
    assert "2.conv2.weight" not in {name for name, refs in graph.axes.items() if any(refs)}


def test_the_error_of_an_unknown_operator_names_the_module_around_it():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Odd()), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    graph = trace(net)
    assert "`cumsum` in `1.1`" in graph.barriers["cumsum"]
    assert list(graph.spaces) == list(trace(net, stop_at="1.0").spaces) == ["0"]


def test_a_barrier_that_leaves_nothing_to_merge_is_an_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Shuffle(), nn.Conv2d(4, 4, 3))
    with pytest.raises(TraceError, match=r"`fliplr`.*register_rule"):
        trace(net, stop_at="1", merge_heads=True)


def test_operators_without_a_rule_are_allowed_in_heads():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4), nn.Softmax(dim=1))
    assert trace(net, verify=X).crossings[0].absorbed


def test_error_asks_for_an_example_input():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 3 * 7, 2))
    with pytest.raises(UnknownShapeError, match="example_input"):
        trace(net)
    assert trace(net, example_input=torch.randn(1, 3, 7, 11)).crossings[0].absorbed


def test_error_shows_the_line_that_cannot_be_captured():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) * float(x.mean())

    with pytest.raises(TraceError, match=r"test_rules\.py:\d+ reads"):
        trace(Reading(), example_input=torch.ones(2, 3, 4, 4))


def test_a_result_in_place_that_is_not_used_is_followed():
    def between(net, y, x):
        y.mul_(net.scale)
        return y

    graph = trace(Net(between), verify=X)
    assert graph.axes["scale"][0] == graph.axes["conv1.weight"][0] and not graph.barriers


class Shuffle(nn.Module):
    """Reverses the order of the channels by an operator without a rule."""

    def forward(self, x):
        return torch.fliplr(x)


def test_a_registered_rule_is_used_and_proven():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Shuffle(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    assert "`fliplr` in `1`" in trace(net).barriers["fliplr"]
    register_rule(Shuffle, lambda ctx, module, x: replace(x, ids=x.ids[::-1]))
    assert not trace(net, verify=X).barriers
    register_rule(Shuffle, lambda ctx, module, x: x)
    with pytest.raises(VerificationError, match=r"0 \(written by 0\.weight"):
        trace(net, verify=X)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *net)
    net[2] = nn.Conv2d(6, 4, 3)
    graph = trace(net, verify=torch.randn(4, 3, 10, 10))
    assert list(graph.spaces) == ["0"] and "would change what the trunk computes" in graph.notes[0]


class Gain(nn.Conv2d):
    """A convolution with a gain per channel, such as weight-standardized convolutions have."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.gain


def test_a_subclass_with_a_forward_of_its_own_has_no_rule_and_is_traced_into():
    net = nn.Sequential(Gain(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    assert str(trace(net, verify=X).axes["0.gain"][0]) == "→ 0"

    def rule(ctx, module, x):
        output = convolution_module(ctx, module, x)
        ctx.write(ctx.parameter("gain"), 0, output)
        return output

    register_rule(f"{Gain.__module__}.{Gain.__qualname__}", rule)  # by name: nothing need be imported
    trace(net, verify=X)


class Gated(nn.Module):
    """A block that torch.fx cannot trace: half of its hidden features gate the other half."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        assert x.sum() is not None
        values, gates = self.expand(x).chunk(2, 1)
        return x + self.project(values * gates.sigmoid()) if x.shape[0] > 0 else x


def test_rule_of_a_leaf_module_defines_the_axes_of_a_block():
    def rule(ctx, module, x):
        hidden = ctx.fresh(module.project.in_channels)
        ctx.read(ctx.parameter("expand.weight"), 1, x)
        for name in ("weight", "bias"):  # values and gates: the same features twice
            ctx.write(ctx.parameter(f"expand.{name}"), 0, np.concatenate([hidden, hidden]))
        ctx.read(ctx.parameter("project.weight"), 1, hidden)
        ctx.write(ctx.parameter("project.weight"), 0, x)
        ctx.write(ctx.parameter("project.bias"), 0, x)
        return x

    register_rule(Gated, rule)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Gated(4, 6), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    graph = trace(net, verify=X)
    assert graph.axes["1.expand.weight"][0].spaces == ("1.expand",)
    assert "`1.expand` (6 features) is matched by index: its activations cannot be measured" in graph.notes[0]
