"""Which layers are fitted, and to what; those that cannot be keep what merging gave them, and the report says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import relative_error
from torch import nn
from torchvision.models import ConvNeXt, EfficientNet, SwinTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.graph.layers import Layer, find_stops
from lightning_zipit.matchers import Average
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine import LeastSquares, Repair, least_squares

REFINEMENTS = (Repair(positions=None), LeastSquares(positions=None))


def reorder(order, outputs=(), inputs=()):
    """Reorder by hand the outputs of layers, or the features of norms, and the inputs of layers."""
    with torch.no_grad():
        seen = set()
        for module in outputs:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim and id(tensor) not in seen:
                    tensor.copy_(tensor[order].clone())
                    seen.add(id(tensor))
        for module in inputs:
            module.weight.copy_(module.weight[:, order].clone())


class Mixer(nn.Module):
    """Linear layers over tokens, then over features."""

    def __init__(self):
        super().__init__()
        self.embed, self.t1, self.t2 = nn.Linear(6, 12), nn.Linear(9, 14), nn.Linear(14, 9)
        self.c1, self.c2, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return self.out((x + self.c2(F.gelu(self.c1(x)))).mean(1))

    def permute(self):
        reorder(torch.randperm(12), (self.embed, self.c2), (self.c1, self.out))


class NormOfTwo(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.c0, self.bn, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.c1, self.c2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.other = self.bn

    def forward(self, x):
        x = self.bn(self.c1(self.c0(x).relu())).relu()
        return self.out(self.other(self.c2(x)).relu().mean((2, 3)))

    def permute(self):
        reorder(torch.randperm(8), (self.c0, self.bn, self.other, self.c1, self.c2), (self.c1, self.c2, self.out))


class NormsOfOneScale(NormOfTwo):
    """Two batch norms that share scale and shift."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)
        self.other.weight, self.other.bias = self.bn.weight, self.bn.bias


class NoShift(NormOfTwo):
    """Batch norms without a shift, or without a scale too."""

    def __init__(self):
        super().__init__()
        self.bn, self.other = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)
        self.other.register_parameter("bias", None)


class Again(nn.Module):
    """A layer that is applied twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.more = self.again

    def forward(self, x):
        return self.last(self.more(self.again(self.first(x).tanh()).tanh()).tanh())

    def permute(self):
        layers = (self.again,) if self.more is self.again else (self.again, self.more)
        reorder(torch.randperm(8), (self.first, *layers), (*layers, self.last))


class ReadToo(Again):
    """A layer whose weight is read by a function, too; to ask for a type is no use."""

    def forward(self, x):
        x = self.again(self.first(x.to(self.first.weight.dtype)).tanh()).tanh()
        return self.last(F.linear(x, self.again.weight).tanh())


class OneBias(Again):
    """Two layers of one bias."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(8, 8)
        self.more.bias = self.again.bias


class Hooked(Again):
    """A layer whose output a hook changes."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(8, 8)
        self.again.register_forward_hook(lambda module, args, output: 2 * output)


LEFT = {  # the shape of a sample, what keeps its weights, and why
    NormOfTwo: ((3, 8, 8), ["trunk.bn"], "used more than once"),
    NormsOfOneScale: ((3, 8, 8), ["trunk.bn", "trunk.other"], "used more than once"),
    NoShift: ((3, 8, 8), ["trunk.bn", "trunk.other"], "no scale and shift"),
    Again: ((6,), ["trunk.again"], "used more than once"),
    ReadToo: ((6,), ["trunk.again"], "used more than once"),
    OneBias: ((6,), ["trunk.again", "trunk.more"], "used more than once"),
    Hooked: ((6,), ["trunk.again"], "or hooks"),
}


def pair(make, shape):
    """A network, a copy with its features in another order, and inputs."""
    torch.manual_seed(0)
    net, x = make(), torch.randn(48, *shape)
    with torch.no_grad():
        for norm in (module for module in net.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))):
            norm.momentum = None
            for parameter, center in ((norm.weight, 1), (norm.bias, 0)):
                if parameter is not None:
                    parameter.uniform_(center - 0.2, center + 0.2)
        net.train()(x)
        permuted = copy.deepcopy(net.eval())
        permuted.permute()
        assert torch.allclose(net(x), permuted(x), atol=1e-4)
    return {"a": net, "b": permuted}, x


@torch.no_grad()
@pytest.mark.parametrize("how", REFINEMENTS, ids=["repair", "least squares"])
@pytest.mark.parametrize("make", LEFT)
def test_layers_that_cannot_be_fitted_keep_their_weights_and_are_reported(make, how):
    shape, left, why = LEFT[make]
    nets, x = pair(make, shape)
    merged = merge_backbones(nets, [x], MergeSettings(refine=how))
    assert relative_error(AllHeads(merged.trunk, merged.heads)(x), nets["a"](x)) < 1e-3
    (note,) = (note for note in merged.report.notes if note.startswith("The refinement skipped these layers"))
    assert why in note and note.count("`") == 2 * len(left) and all(f"`{name}`" in note for name in left)
    assert not set(left).intersection(merged.report.fits)


def test_layers_with_too_many_inputs_are_reported(monkeypatch):
    monkeypatch.setattr(least_squares, "MOST_INPUTS", 9)
    nets, x = pair(Mixer, (9, 6))
    notes = merge_backbones(nets, [x], MergeSettings()).report.notes
    own = ", ".join(f"`heads.{task}.{name}`" for task in "ab" for name in ("t2", "c1", "c2", "out"))
    assert notes[-1].endswith(f"{own} (too many inputs).")


class Summed(nn.Module):
    """A convolution, to whose output something is added."""

    def __init__(self, add):
        super().__init__()
        self.c1, self.c2, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.context, self.shift = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8, 1, 1))
        self.norm, self.add = nn.BatchNorm2d(8), add

    def forward(self, x):
        return self.out(self.add(self, self.c1(x).relu()).relu().mean((2, 3)))

    def permute(self):
        order = torch.randperm(8)
        reorder(order, (self.c1, self.c2, self.context, self.norm), (self.c2, self.context, self.out))
        self.shift.copy_(self.shift[order])


def in_place(net, x):
    y = net.c2(x)
    y += x
    return y


def computed_between(net, x):
    """What is added is known behind the layer, and in front of its norm."""
    y = net.c2(x)
    pooled = x.mean((2, 3), keepdim=True)
    return pooled + net.norm(y)


SUMS = {  # and whether the layer is fitted to the sum
    "x + y": (lambda net, x: x + net.c2(x), True),
    "y + x": (lambda net, x: net.c2(x) + x, True),
    "torch.add": (lambda net, x: torch.add(input=x, other=net.c2(x)), True),
    "add": (lambda net, x: x.add(net.c2(x)), True),
    "add_": (lambda net, x: net.c2(x).add_(x), True),
    "+=": (in_place, True),
    "behind dropout": (lambda net, x: x + F.dropout(net.c2(x), training=False), True),
    "scaled": (lambda net, x: x + net.shift * net.c2(x), True),
    "scaled by a number": (lambda net, x: x + net.c2(x) * 0.5, True),
    "moved": (lambda net, x: x + net.c2(x).flatten(2).transpose(1, 2).movedim(1, 2).unflatten(2, (8, 8)), True),
    "mirrored": (lambda net, x: x + net.c2(x).flip(3), True),
    "of a pooled value": (lambda net, x: x.mean((2, 3), keepdim=True) + net.c2(x), True),
    "of a parameter": (lambda net, x: net.shift + net.c2(x), True),
    "of one channel": (lambda net, x: x.mean(1, keepdim=True) + net.c2(x), True),
    "of another layer": (lambda net, x: net.context(x.mean((2, 3), keepdim=True)) + net.c2(x), True),
    "of a layer that is broadcast": (lambda net, x: x + net.c2(x.mean((2, 3), keepdim=True)), False),
    "behind a norm": (lambda net, x: x + net.norm(net.c2(x)), True),
    "behind a norm, scaled": (lambda net, x: x + net.shift * net.norm(net.c2(x)), True),
    "of what is computed between": (computed_between, False),
    "of twice the same": (lambda net, x: (y := net.c2(x)) + y, False),
    "with a factor": (lambda net, x: torch.add(net.c2(x), x, alpha=2), False),
    "with a factor, as a method": (lambda net, x: x.add(net.c2(x), alpha=-0.5), False),
    "with a number": (lambda net, x: net.c2(x) + 0.5, False),
    "a difference": (lambda net, x: net.c2(x) - x, False),
    "a difference from": (lambda net, x: x - net.c2(x), False),
    "a square": (lambda net, x: x + (y := net.c2(x)) * y, False),
    "a gate": (lambda net, x: x + net.c2(x) * x.sigmoid(), False),
    "scaled by position": (lambda net, x: x + net.c2(x) * torch.arange(8), False),
    "repeated": (lambda net, x: x + net.c2(x)[:, :, :, :4].repeat(1, 1, 1, 2), False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SUMS)
def test_a_layer_is_fitted_to_a_sum_of_its_own_shape(name):
    add, to_sum = SUMS[name]
    nets, x = pair(lambda: Summed(add), (3, 8, 8))
    graph = trace(nets["a"], example_input=x[:1])
    stops, _ = find_stops(graph, nets["a"], list(graph.trunk_graph()))
    (stop,) = (stop for stop in stops if stop.name == "c2")
    assert (stop.beside is not None) == (stop.target.name not in ("c2", "norm")) == to_sum
    for how in REFINEMENTS:
        merged = merge_backbones(nets, list(x.split(20)), MergeSettings(refine=how))
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x), nets["a"](x)) < 1e-3


class Position(nn.Module):
    """Positions without a batch axis, added in front."""

    def __init__(self):
        super().__init__()
        self.position, self.embed = nn.Parameter(torch.randn(9, 12)), nn.Linear(6, 12)
        self.mid, self.out = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.mid(self.position + self.embed(x)).relu().mean(1))

    def permute(self):
        order = torch.randperm(12)
        reorder(order, (self.embed,), (self.mid,))
        self.position.copy_(self.position[:, order])


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, 4])
@pytest.mark.parametrize("width", [1, 1.5])
def test_summand_without_batch_axis_counts_for_every_sample(positions, width):
    nets, x = pair(Position, (9, 6))
    settings = MergeSettings(width=width, refine=LeastSquares(positions))
    merged = merge_backbones(nets, list(x.split(20)), settings)
    assert relative_error(AllHeads(merged.trunk, merged.heads)(x), nets["a"](x)) < 1e-3


class TokensInHead(nn.Module):
    """Tokens are mixed behind the cut, on features that the head absorbs later, and in front of a norm of tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 9), nn.Linear(9, 4)
        self.t1, self.t2, self.c1 = nn.Linear(9, 14), nn.Linear(14, 9), nn.Linear(9, 9)
        self.t3, self.t4, self.norm = nn.Linear(9, 14), nn.Linear(14, 9), nn.BatchNorm1d(9)

    def forward(self, x):
        x = self.embed(x).relu()
        batch = x.shape[0]
        x = x + self.t2(self.t1(x.transpose(1, 2)).relu()).transpose(1, 2)
        x = self.norm(self.c1(x).view(batch, 9, 9)).relu()
        x = x + self.t4(self.t3(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.out(x.mean(1))

    def permute(self):
        reorder(torch.randperm(9), (self.embed,), (self.c1,))


@torch.no_grad()
def test_layers_over_tokens_are_fitted_in_a_head_once_features_are_its_own():
    nets, x = pair(TokensInHead, (9, 6))
    merged = merge_backbones(nets, [x], MergeSettings("embed", refine=LeastSquares(positions=None)))
    assert relative_error(AllHeads(merged.trunk, merged.heads)(x), nets["a"](x)) < 1e-3
    own = {f"heads.{task}.{name}" for task in "ab" for name in ("c1", "t3", "t4", "out")}
    assert set(merged.report.fits) == {"trunk.embed", *own}
    (note,) = (note for note in merged.report.notes if "The refinement skipped" in note)
    assert all(f"`heads.{task}.{name}`" in note for task in "ab" for name in ("t1", "t2"))


def efficientnet():
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 2, 1, 1), MBConvConfig(4, 3, 2, 8, 12, 3, 1, 1)]
    return EfficientNet(blocks, dropout=0.2, stochastic_depth_prob=0.2, num_classes=5, last_channel=24)


def convnext():
    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)], 0.2, layer_scale=0.5, num_classes=5)


def swin():
    return SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.2, num_classes=5)


@pytest.mark.parametrize(
    ("make", "fitted"),
    [(efficientnet, 4), (convnext, 4), (swin, 4)],  # of a Swin's, attention ends as many, and is not fitted
)
def test_layers_that_end_a_residual_branch_are_fitted_to_the_sum(make, fitted):
    """Through what does nothing in eval mode, layer scale, and changes between channels first and last."""
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(16, 3, 32, 32)
    graph = trace(net, example_input=x[:1])
    stops, _ = find_stops(graph, net, list(graph.trunk_graph()))
    assert sum(isinstance(stop, Layer) and stop.beside is not None for stop in stops) == fitted
    nets = {"a": net, "b": make().eval()}
    distances = {}
    for refine in (None, LeastSquares(positions=None)):
        merged = merge_backbones(nets, [x], MergeSettings(matcher=Average(), refine=refine))
        outputs = AllHeads(merged.trunk, merged.heads)(x)
        distances[refine] = sum((outputs[task] - net(x)).square().mean() for task, net in nets.items())
    zipped, fit = distances.values()
    assert fit < 0.8 * zipped


def test_layers_of_trunk_and_head_that_share_a_tensor_are_fitted_in_both():
    """Each has a copy of it."""
    nets, x = pair(OneBias, (6,))
    report = merge_backbones(nets, [x], MergeSettings("again")).report
    assert {"trunk.again", "heads.a.more", "heads.b.more"} < set(report.fits)
    assert not any("The refinement skipped" in note for note in report.notes)
