"""Unexplained parameters: every use of a parameter is explained, or the trunk ends before it."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.errors import TraceError
from lightning_zipit.paths import AllHeads

WIDTH = 8


class First(nn.Module):
    """A network whose first operator is a function."""

    def __init__(self, make, forward):
        super().__init__()
        self.p = nn.ParameterDict({name: torch.randn(shape) for name, shape in make.items()})
        self.run = forward
        self.bag, self.bilinear = nn.EmbeddingBag(9, WIDTH), nn.Bilinear(5, 5, WIDTH)
        self.second, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(self.run(self, self.p, x)).relu())


def numbers(x):
    return (x.abs() * 4).long().clamp(max=8)


FIRST = {
    # name: (parameters, forward, per parameter the axis of the hidden features)
    "matrix product": ({"w": (5, WIDTH)}, lambda net, p, x: (x @ p.w).relu(), {"p.w": 1}),
    "transposed": ({"w": (WIDTH, 5)}, lambda net, p, x: x.matmul(p.w.t()).relu(), {"p.w": 0}),
    "einsum": ({"w": (WIDTH, 5)}, lambda net, p, x: torch.einsum("bi,oi->bo", x, p.w).relu(), {"p.w": 0}),
    "linear and sum": (
        {"w": (WIDTH, 5), "b": (WIDTH,)},
        lambda net, p, x: (F.linear(x, p.w) + p.b).relu(),
        {"p.w": 0, "p.b": 0},
    ),
    "addmm": (
        {"w": (5, WIDTH), "b": (WIDTH,)},
        lambda net, p, x: torch.addmm(p.b, x, p.w).relu(),
        {"p.w": 1, "p.b": 0},
    ),
    "tokens of columns": (
        {"w": (5, WIDTH), "b": (5, WIDTH)},
        lambda net, p, x: (x[..., None] * p.w + p.b).relu().mean(1),
        {"p.w": 1, "p.b": 1},
    ),
    "class token": (
        {"w": (5, WIDTH), "t": (1, 1, WIDTH)},
        lambda net, p, x: torch.cat([p.t.expand(x.shape[0], -1, -1), x.unsqueeze(-1) * p.w], 1).tanh().mean(1),
        {"p.w": 1, "p.t": 2},
    ),
    "bag": ({}, lambda net, p, x: net.bag(numbers(x)).tanh(), {"bag.weight": 1}),
    "rows by number": ({"w": (9, WIDTH)}, lambda net, p, x: p.w[numbers(x)].tanh().sum(1), {"p.w": 1}),
    "softmax of a parameter": (
        {"g": (WIDTH,), "c": (WIDTH,)},
        lambda net, p, x: (x[:, :1] + p.g.softmax(0) * p.c).tanh(),
        {"p.g": 0, "p.c": 0},
    ),
    "bilinear": ({}, lambda net, p, x: net.bilinear(x, x).tanh(), {"bilinear.weight": 0, "bilinear.bias": 0}),
}


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_a_first_operator_makes_features_that_are_matched(name):
    make, forward, axes = FIRST[name]
    net, x = First(make, forward).eval(), torch.randn(256, 5)
    other, order = copy.deepcopy(net), torch.randperm(WIDTH)
    for parameter, axis in axes.items():
        tensor = other.get_parameter(parameter)
        tensor.copy_(tensor.index_select(axis, order))
    other.second.weight.copy_(net.second.weight[:, order])
    assert torch.allclose(net(x), other(x), atol=1e-4)
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(refine=None))
    for output in AllHeads(merged.trunk, merged.heads)(x).values():
        assert torch.allclose(output, net(x), atol=1e-4)


UNEXPLAINED = {
    "product of parameters": lambda net, p, x: x @ (p.w @ p.v),
    "unknown function": lambda net, p, x: torch.cdist(x, p.c),
    "positions of its own": lambda net, p, x: (net.first(x)[:, None] + p.queries).mean(1),
    "several tokens": lambda net, p, x: torch.cat(
        [p.queries[None].expand(x.shape[0], -1, -1), net.first(x)[:, None]], 1
    ).mean(1),
    "mixed positions": lambda net, p, x: net.mix(net.first(x)[..., None].expand(-1, -1, 4)).mean(-1),
    "sorted parameter": lambda net, p, x: net.first(x) * p.g.sort(0)[0],
    "a parameter for the features of each head": lambda net, p, x: (net.first(x).unflatten(1, (2, 4)) * p.d).flatten(1),
}


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_unexplained_parameter_is_a_barrier(name):
    shapes = {"w": (5, 3), "v": (3, WIDTH), "c": (WIDTH, 5), "queries": (3, WIDTH), "g": (WIDTH,), "d": (4,)}
    net = First(shapes, UNEXPLAINED[name])
    net.first, net.mix = nn.Linear(5, WIDTH), nn.Linear(4, 6)
    net.before = nn.Linear(5, 5)
    net.run = lambda net, p, x: UNEXPLAINED[name](net, p, net.before(x).relu())
    graph = trace(net, verify=torch.randn(4, 5))
    assert graph.barriers
    assert "second.weight" not in {name for name, refs in graph.axes.items() if any(refs)}


def test_a_parameter_along_the_positions_of_the_input_is_averaged_position_by_position():
    net = First({"mean": (5,)}, lambda net, p, x: net.first((x - p.mean) * p.mean).relu())
    net.first = nn.Linear(5, WIDTH)
    graph = trace(net, verify=torch.randn(4, 5))
    assert not graph.barriers and not any(graph.axes["p.mean"])
    assert "position by position" in " ".join(graph.notes)


PARTS = {
    "in place": lambda y: torch.cat([y[:, :4].mul_(2), y[:, 4:]], 1),
    "out of place": lambda y: torch.cat([y[:, :4].tanh(), y[:, 4:]], 1),
    "scaled": lambda y: torch.cat([y[:, 4:], y[:, :4] * 3], 1),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("stop_at", [None, "first"])
def test_features_that_an_operator_reads_separately_form_a_space(name, stop_at):
    net = First({}, lambda net, p, x: PARTS[name](net.first(x)))
    net.first = nn.Linear(5, WIDTH)
    graph = trace(net, stop_at, verify=torch.randn(4, 5))
    if stop_at is None:
        assert sorted(space.size for space in graph.spaces.values()) == [4, 4, 6]
    else:
        assert not graph.crossings[0].absorbed


def test_an_error_inside_a_rule_is_a_barrier_that_names_the_operator(monkeypatch):
    from lightning_zipit.graph import registry

    def faulty(ctx, *args, **kwargs):
        raise KeyError("L")

    monkeypatch.setitem(registry.OPERATORS, torch.ops.aten.tanh.default, registry.Operator(faulty))
    net = First({}, lambda net, p, x: torch.tanh(net.first(x)))
    net.first = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, WIDTH))
    (reason,) = trace(net, example_input=torch.randn(3, 5)).barriers.values()
    assert "`tanh`" in reason and "KeyError" in reason


class Loud(nn.ReLU):
    def forward(self, x):
        return super().forward(x).flip(1)


class Padded(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return F.conv1d(x, weight.flip(0), bias, self.stride, self.padding)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * torch.arange(1.0, 1 + self.out_features)


class Lenient(nn.BatchNorm1d):
    def _check_input_dim(self, input):
        pass


class Noisy(nn.Dropout):
    def forward(self, x):
        return x * torch.arange(1.0, 9.0)[:, None]


class Attending(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Named(nn.Conv1d):
    """Computes the same as its base class."""

    def __init__(self, *args, label="", **kwargs):
        super().__init__(*args, **kwargs)
        self.label = label

    def extra_repr(self):
        return self.label


class Spare(nn.Conv1d):
    """Has a parameter that no rule explains, and the forward of its base class."""

    def __init__(self, *args):
        super().__init__(*args)
        self.spare = nn.Parameter(torch.rand(8))


def around(layer):
    return nn.Sequential(nn.Conv1d(3, 8, 1), layer, nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1))


@pytest.mark.parametrize(
    "layer",
    [Loud(), Padded(8, 8, 3, padding=1), nn.Sequential(nn.Flatten(2), Scaled(9, 9)), Lenient(8), Noisy()],
    ids=lambda layer: type(layer).__name__,
)
def test_subclass_with_another_forward_is_traced_or_a_barrier(layer):
    net, x = around(layer).eval(), torch.randn(3, 3, 9)
    graph = trace(net, example_input=x)
    assert graph.barriers == trace(net, verify=x).barriers


def test_an_instance_with_a_forward_of_its_own_has_no_rule():
    layer = nn.ReLU()
    layer.forward = lambda x: torch.cumsum(x, 1)
    assert "cumsum" in trace(around(layer), verify=torch.randn(3, 3, 9)).barriers


def test_subclass_without_overrides_inherits_the_rule():
    graph = trace(around(Named(8, 8, 3, label="middle")), verify=torch.randn(3, 3, 9))
    assert graph.axes["1.weight"][0].spaces == ("1",)
    assert any("spare" in why for why in trace(around(Spare(8, 8, 1))).barriers.values())


class Heads(nn.Module):
    def __init__(self, heads, split=True):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.heads, self.split = heads, split

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.embed(x)).chunk(3, -1)
        if self.split:
            q, k, v = (part.reshape(batch, length, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        result = F.scaled_dot_product_attention(q, k, v)
        return self.out(result.transpose(1, 2).reshape(batch, length, 8) if self.split else result)


@pytest.mark.parametrize(("heads", "split"), [(1, True), (1, False), (2, True)])
def test_attention_with_one_head_and_without_an_axis_of_heads(heads, split):
    graph = trace(Heads(heads, split), verify=torch.randn(3, 5, 6))
    assert not graph.barriers and graph.axes["out.weight"][1] is not None


class Residual(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(depth + 1))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = x + block(x)
        return self.blocks[-1](x.flatten(0, 1).reshape_as(x))


def test_a_chain_of_residual_blocks_is_walked_once():
    start = time.perf_counter()
    trace(Residual(30), example_input=torch.randn(2, 3, 4))
    assert time.perf_counter() - start < 20  # 2^30 steps would be hours


class Kronecker(nn.Module):
    """Multiplies by a parameter with an operator that has no rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return torch.kron(x, self.weight)


def test_trunk_that_starts_with_an_unexplained_parameter_is_refused():
    with pytest.raises(TraceError, match=r"the order of entries is unknown in `0\.weight`"):
        trace(nn.Sequential(Kronecker()), merge_heads=True, example_input=torch.randn(2, 4))


class Apart(nn.Module):
    """Unbinds parts with features along two axes. Each part is a barrier."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.second(self.first(x).relu()).unflatten(1, (2, 2, 2)).unbind(1)
        return self.last((a.cumsum(1) * b.cumsum(2)).flatten(1))


@torch.no_grad()
def test_parts_of_a_tensor_are_not_crossings():
    net = Apart()
    graph = trace(net)
    assert not any("unbind" in crossing.node for crossing in graph.crossings)
    other, order = copy.deepcopy(net), torch.randperm(6)
    other.first.weight.copy_(net.first.weight[order])
    other.first.bias.copy_(net.first.bias[order])
    other.second.weight.copy_(net.second.weight[:, order])
    x = torch.randn(64, 5)
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(refine=None))
    for output in AllHeads(merged.trunk, merged.heads)(x).values():
        assert torch.allclose(output, net(x), atol=1e-4)
