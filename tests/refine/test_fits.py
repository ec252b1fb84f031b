"""Fits of single layers, compared with least squares over a design matrix that is written out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.matchers import Average
from lightning_zipit.refine import LeastSquares

RIDGE = 0.02

KINDS = {
    "linear": (lambda bias: nn.Linear(6, 6, bias), (6,)),
    "linear over tokens": (lambda bias: nn.Linear(6, 6, bias), (5, 6)),
    "one dimension": (lambda bias: nn.Conv1d(6, 6, 3, bias=bias), (6, 7)),
    "one dimension, strided, padded, dilated": (lambda bias: nn.Conv1d(6, 6, 2, 2, 1, 2, bias=bias), (6, 7)),
    "one by one": (lambda bias: nn.Conv2d(6, 6, 1, bias=bias), (6, 4, 3)),
    "padded": (lambda bias: nn.Conv2d(6, 6, 3, padding=1, bias=bias), (6, 4, 3)),
    "strided": (lambda bias: nn.Conv2d(6, 6, 3, stride=(2, 1), bias=bias), (6, 5, 4)),
    "rectangular, dilated": (lambda bias: nn.Conv2d(6, 6, (1, 2), 1, (0, 1), (1, 2), bias=bias), (6, 3, 4)),
    "reflecting": (lambda bias: nn.Conv2d(6, 6, 3, 1, 1, bias=bias, padding_mode="reflect"), (6, 4, 3)),
    "circular": (lambda bias: nn.Conv2d(6, 6, 3, 1, 1, bias=bias, padding_mode="circular"), (6, 4, 3)),
    "same": (lambda bias: nn.Conv2d(6, 6, (3, 1), padding="same", bias=bias), (6, 4, 3)),
    "grouped": (lambda bias: nn.Conv2d(6, 6, 3, 1, 1, groups=2, bias=bias), (6, 4, 3)),
    "depthwise": (lambda bias: nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=bias), (6, 4, 3)),
    "depthwise, one dimension": (lambda bias: nn.Conv1d(6, 6, 3, 1, 1, groups=6, bias=bias), (6, 7)),
}
OUTSIDE = {
    "zeros": lambda index, size: index if 0 <= index < size else None,
    "circular": lambda index, size: index % size,
    "reflect": lambda index, size: size - 1 - abs(size - 1 - abs(index)),
}


class Net(nn.Module):
    """A first layer, the layer in question with what may lie behind it, and a last layer."""

    def __init__(self, make, bias, behind, rank):
        super().__init__()
        linear = isinstance(make(bias), nn.Linear)
        self.first = nn.Linear(4, 6) if linear else (nn.Conv1d, nn.Conv2d)[rank - 2](4, 6, 1)
        self.layer, self.shortcut, self.out = make(bias), make(True), nn.Linear(6, 3)
        self.norm = (nn.BatchNorm1d if linear or rank == 2 else nn.BatchNorm2d)(6)
        self.scale = nn.Parameter(torch.rand(6, *[1] * (0 if linear else rank - 1)) + 0.5)
        self.behind, self.around = behind, (1,) * 0 if rank == 1 else ((1,) if linear else tuple(range(2, rank + 1)))

    def forward(self, x):
        x = self.first(x).relu()
        summand = self.shortcut(x) if "sum" in self.behind else 0
        x = self.layer(x)
        if "norm" in self.behind:
            x = self.norm(x)
        if "scale" in self.behind:
            x = x * self.scale
        if "sum" in self.behind:
            x = summand + x
        x = x.relu()
        return self.out(x.mean(self.around) if self.around else x)


def make_net(name, bias, behind):
    make, shape = KINDS[name]
    net = Net(make, bias, behind, len(shape))
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5), net.norm.bias.normal_()
        net.norm.running_mean.normal_(), net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


def input_of(name):
    make, shape = KINDS[name]
    linear = isinstance(make(True), nn.Linear)
    return torch.randn(30, *((*shape[:-1], 4) if linear else (4, *shape[1:])))


def written_out(layer, x):
    """What each output of a layer is a product of its weights with: ``(groups, samples × positions, inputs)``."""
    x = x.double()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if x.ndim == 3:
        x = x[:, :, None]
    kernel, stride, dilation = ((1, *each)[-2:] for each in (layer.kernel_size, layer.stride, layer.dilation))
    if layer.padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before, after = [each // 2 for each in total], [each - each // 2 for each in total]
    else:
        before = after = (0, *layer.padding)[-2:]
    sizes = [
        (x.shape[2 + axis] + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(2)
    ]
    inside, groups = OUTSIDE[layer.padding_mode], []
    for channels in torch.arange(x.shape[1]).chunk(layer.groups):
        rows = []
        for sample in x:
            for top in range(sizes[0]):
                for left in range(sizes[1]):
                    row = []
                    for channel in channels.tolist():
                        for down in range(kernel[0]):
                            for right in range(kernel[1]):
                                i = inside(top * stride[0] - before[0] + down * dilation[0], x.shape[2])
                                j = inside(left * stride[1] - before[1] + right * dilation[1], x.shape[3])
                                row.append(0.0 if i is None or j is None else float(sample[channel, i, j]))
                    rows.append(row)
        groups.append(rows)
    return torch.tensor(groups, dtype=torch.float64)


def as_rows(layer, value):
    return (value if isinstance(layer, nn.Linear) else value.movedim(1, -1)).reshape(-1, 6).double()


def best_fit(design, target, prior, strength, intercept):
    """The weights and bias of one group that minimise Σ‖W x + b - t‖² + n λ‖W - prior‖², from one stacked system."""
    count, inputs = design.shape
    held = math.sqrt(count * strength)
    columns = torch.cat([design, torch.ones(count, 1).double()] if intercept else [design], 1)
    rows = torch.eye(inputs, columns.shape[1]).double() * held  # the bias is held to nothing
    found = torch.linalg.lstsq(torch.cat([columns, rows]), torch.cat([target, held * prior.T])).solution
    return found[:inputs].T, found[inputs] if intercept else torch.zeros(target.shape[1]).double()


@torch.no_grad()
def behind_layer(net, x, behind):
    """What a source computes up to the target."""
    x = net.first(x).relu()
    value = net.layer(x)
    value = net.norm(value) if "norm" in behind else value
    value = value * net.scale if "scale" in behind else value
    return net.shortcut(x) + value if "sum" in behind else value


@torch.no_grad()
def in_one(layer, norm, scale, behind):
    """A layer with what lies behind it as one layer: weights ``(outputs, inputs)`` and bias."""
    weight = layer.weight.flatten(1).double()
    bias = torch.zeros(6).double() if layer.bias is None else layer.bias.double()
    if "norm" in behind:
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight, bias = weight * factor[:, None], (bias - norm.running_mean) * factor + norm.bias
    if "scale" in behind:
        weight, bias = weight * scale.double().reshape(-1, 1), bias * scale.double().flatten()
    return weight, bias


CASES = [
    *((name, True, "") for name in KINDS),
    *((name, False, "norm, sum") for name in KINDS if name != "linear over tokens"),  # its norm would be of tokens
    *(("linear", *case) for case in ((False, ""), (True, "norm"), (True, "scale, sum"))),
    *(("linear over tokens", *case) for case in ((False, "sum"), (True, "scale, sum"))),
    *(("grouped", *case) for case in ((False, ""), (False, "sum"), (True, "norm, scale, sum"))),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "bias", "behind"), CASES)
def test_fitted_layer_equals_dense_least_squares(name, bias, behind):
    nets, x = {task: make_net(name, bias, behind) for task in "ab"}, input_of(name)
    averaged = copy.deepcopy(nets["a"])  # matched by number, the merged weights are the means
    for parameter, *others in zip(*(each.state_dict().values() for each in (averaged, *nets.values())), strict=True):
        parameter.copy_(sum(others) / 2)
    how = LeastSquares(positions=None, ridge=RIDGE)
    merged = merge_backbones(nets, list(x.split(15)), MergeSettings(matcher=Average(), refine=how))
    trunk, layer = merged.trunk, merged.trunk.layer

    reached = trunk.first(x).relu()
    target = sum(behind_layer(net, x, behind) for net in nets.values()) / 2
    if "sum" in behind:
        target = target - trunk.shortcut(reached)
    design, target = written_out(layer, reached), as_rows(layer, target)
    prior, _ = in_one(averaged.layer, averaged.norm, averaged.scale, behind)
    weight, shift = in_one(layer, trunk.norm if "norm" in behind else None, averaged.scale, behind)
    for group, own in zip(design, torch.arange(6).chunk(len(design)), strict=True):
        strength = (RIDGE + 1 / len(x)) * group.square().mean()
        expected = best_fit(group, target[:, own], prior[own], strength, bias or "norm" in behind)
        assert torch.allclose(weight[own], expected[0], atol=2e-4)
        assert torch.allclose(shift[own], expected[1], atol=2e-4)


class ChannelsLast(nn.Module):
    """A residual block whose linear layer has the channels last, and whose outputs are scaled channel by channel."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.out = nn.Conv2d(4, 6, 1), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def residual(self, x):
        return x + self.scale * self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x):
        return self.out(self.residual(self.first(x).relu()).relu().mean((2, 3)))


@torch.no_grad()
def test_permuted_and_scaled_outputs_are_fitted_to_the_sum():
    nets, x = {task: ChannelsLast().eval() for task in "ab"}, torch.randn(30, 4, 4, 3)
    nets["a"].scale[2] = nets["b"].scale[2] = 0  # its weights say nothing, and stay as they are
    how = LeastSquares(positions=None, ridge=RIDGE)
    trunk = merge_backbones(nets, list(x.split(15)), MergeSettings(matcher=Average(), refine=how)).trunk
    reached, scale = trunk.first(x).relu(), sum(net.scale for net in nets.values()).double() / 2
    target = sum(net.residual(net.first(x).relu()) for net in nets.values()) / 2 - reached
    design, target = (value.movedim(1, -1).reshape(-1, 6).double() for value in (reached, target))
    zipped = sum(net.layer.weight for net in nets.values()).double() / 2
    strength = (RIDGE + 1 / len(x)) * design.square().mean()
    weight, bias = best_fit(design, target, zipped * scale.view(6, 1), strength, True)
    seen = scale.flatten() != 0
    assert torch.allclose((trunk.layer.weight * scale.view(6, 1))[seen], weight[seen], atol=2e-4)
    assert torch.allclose((trunk.layer.bias * scale.flatten())[seen], bias[seen], atol=2e-4)
    assert torch.allclose(trunk.layer.weight[~seen].double(), zipped[~seen])
