"""Fits a layer to a target in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._calibration.statistics import AT_ONCE, add_gram
from lightning_zipit.errors import CalibrationError
from lightning_zipit.graph.layers import Fitted, groups_of

MOST_INPUTS = 8192
"""Layers with more inputs keep their weights: the normal equations of one take half a GiB at this size."""

MOST_TRIES = 40
"""Strengths of the ridge that are tried, each ten times the last: rounding is made up for long before."""


def patches(layer: Fitted, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """What a layer multiplies its weights with, group by group.

    Args:
        layer: a convolution of one or two dimensions, or a linear layer.
        x: its input.
        positions: which output positions to take of every sample, counted row by row, ``(batch, count)``; all by
            default.

    Returns:
        ``(groups, samples × positions, inputs of a group)``; the product with the weights of the group, ``(outputs,
        inputs)``, is the layer's output without bias.
    """
    if isinstance(layer, nn.Linear):
        return taken(x.reshape(len(x), -1, x.shape[-1]), positions).reshape(1, -1, x.shape[-1])
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
    else:
        padding = tuple(int(size) for size in layer.padding)
    sizes: list[tuple[int, ...]] = [layer.kernel_size, layer.dilation, padding, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, sizes = x.unsqueeze(2), [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)]
    if positions is not None:
        columns = _windows(x, positions, *sizes)
    elif sizes == [(1, 1), (1, 1), (0, 0), (1, 1)]:
        columns = x.flatten(2).mT
    else:
        columns = F.unfold(x, *sizes).mT
    return columns.unflatten(2, (layer.groups, -1)).movedim(2, 0).flatten(1, 2)


def _windows(
    x: Tensor,
    positions: Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """What :func:`torch.nn.functional.unfold` gives, at some positions of each sample: ``(batch, count, inputs)``."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).movedim(1, 3)
    height, width = x.shape[1:3]
    per_row = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    steps = [torch.arange(size, device=x.device) * step for size, step in zip(kernel, dilation, strict=True)]
    offsets = (steps[0][:, None] * width + steps[1]).flatten()  # of the inputs of a window from its corner
    corners = positions // per_row * stride[0] * width + positions % per_row * stride[1]
    corners = corners + torch.arange(len(x), device=x.device)[:, None] * height * width
    index = corners[:, :, None] + offsets
    found = x.reshape(-1, x.shape[3]).index_select(0, index.flatten())
    return found.unflatten(0, index.shape).mT.flatten(2)


def samples(layer: Fitted, value: Tensor, positions: Tensor | None = None) -> Tensor:
    """Values of the shape of a layer's output, ``(samples × positions, outputs)``, in the order of :func:`patches`."""
    rows = value.reshape(len(value), -1, value.shape[-1]) if isinstance(layer, nn.Linear) else value.flatten(2).mT
    return taken(rows, positions).flatten(0, 1)


def taken(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Of ``(batch, positions, …)``, those in ``(batch, count)``, or all."""
    if positions is None:
        return rows
    return rows[torch.arange(len(rows), device=rows.device)[:, None], positions]


class NormalEquations:
    """Sums over samples from which the best weights of a layer follow; they add up over batches and processes.

    Args:
        groups: the number of groups.
        inputs: inputs of a group.
        outputs: outputs of a group.
        device: where the samples are.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = zeros(1)[:1]
        self.inputs, self.outputs = zeros(inputs), zeros(outputs)
        # Of the Gram matrices, what lies below the diagonal means nothing.
        self.gram, self.cross, self.power = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            x: ``(groups, samples, inputs)``.
            target: ``(groups, samples, outputs)``.
        """
        # In double precision throughout: what rounding would differ by with the split into batches, a nearly singular
        # Gram matrix magnifies. (Forwards on a CPU give a sample the same digits in any batch of two or more.)
        rows = max(1, AT_ONCE // (len(x) * (x.shape[2] + target.shape[2])))
        for some, wanted in zip(x.split(rows, 1), target.split(rows, 1), strict=True):
            x, target = some.double(), wanted.double()
            self.count += x.shape[1]
            self.inputs += x.sum(1)
            self.outputs += target.sum(1)
            self.power += target.square().sum(1)
            self.cross += x.mT @ target
            if len(x) > 1:
                self.gram += x.mT @ x
            else:
                add_gram(self.gram[0], x[0].T)

    @property
    def sums(self) -> list[Tensor]:
        """All sums; they add up over processes."""
        return [self.count, self.inputs, self.outputs, self.gram, self.cross, self.power]

    @property
    def totals(self) -> Tensor:
        """What is not finite if any sum is not: off the diagonal, the Gram matrix is no larger than on it."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        return torch.cat([sums.flatten() for sums in (self.inputs, self.outputs, self.power, diagonal)])

    def centred(self) -> CentredEquations:
        """The equations of the samples less their mean."""
        mean, offset = self.inputs / self.count, self.outputs / self.count
        gram = self.gram.triu()
        gram += gram.triu(1).mT
        squares = gram.diagonal(dim1=1, dim2=2).mean(1) / self.count[0]
        gram.div_(self.count).baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        cross = torch.baddbmm(self.cross / self.count, mean[:, :, None], offset[:, None, :], alpha=-1)
        return CentredEquations(mean, offset, gram, cross, (self.power / self.count - offset.square()).sum(), squares)


class CentredEquations(NamedTuple):
    """What the weights of a layer and their fit follow from.

    Attributes:
        mean: of the inputs, ``(groups, inputs)``.
        offset: the mean of the targets, ``(groups, outputs)``.
        gram: the covariance of the inputs, ``(groups, inputs, inputs)``.
        cross: that of inputs and targets, ``(groups, inputs, outputs)``.
        variance: of all targets together.
        squares: the mean square of the inputs of each group, ``(groups,)``.
    """

    mean: Tensor
    offset: Tensor
    gram: Tensor
    cross: Tensor
    variance: Tensor
    squares: Tensor

    def solve(self, prior: Tensor, ridge: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """The weights and bias that minimise Σ‖W x + b - t‖² + λ‖W - prior‖².

        Args:
            prior: ``(groups, outputs, inputs)``.
            ridge: λ as a share of the mean square of the inputs. Where they hardly vary beside their mean, little but
                rounding tells samples apart, and the weights stay near the prior.
            intercept: whether there is a bias; without one it is 0.

        Returns:
            float64 ``(groups, outputs, inputs)`` and ``(groups, outputs)``.

        Raises:
            CalibrationError: if there is no solution, as where sums are not finite.
        """
        gram, cross = self.gram, self.cross
        if not intercept:
            gram = torch.baddbmm(gram, self.mean[:, :, None], self.mean[:, None, :])
            cross = torch.baddbmm(cross, self.mean[:, :, None], self.offset[:, None, :])
        strength = ridge * self.squares.clamp(min=torch.finfo(torch.float32).tiny)
        for _ in range(MOST_TRIES):
            held = gram.clone()
            held.diagonal(dim1=1, dim2=2).add_(strength[:, None])
            factor, failed = torch.linalg.cholesky_ex(held)
            if not failed.any():
                break
            strength = torch.where(failed > 0, strength * 10, strength)
        else:
            raise CalibrationError(
                "A layer's normal equations have no solution: its inputs are too large, or NaN or Inf. Merge with "
                "refine='batch_norm' or None instead, or look for such values in weights and data."
            )
        weight = torch.cholesky_solve(cross + strength[:, None, None] * prior.double().mT, factor).mT
        bias = self.offset - self._through(weight)
        return weight, bias if intercept else torch.zeros_like(bias)

    def explained(self, weight: Tensor, bias: Tensor) -> float:
        """The share of the target's variance that weights explain, over all outputs; 1 at best."""
        fitted = 2 * (weight * self.cross.mT).sum() - ((weight @ self.gram) * weight).sum()
        shift = (self._through(weight) + bias - self.offset).square().sum()
        return ((fitted - shift) / self.variance.clamp(min=torch.finfo(torch.float64).tiny)).item()

    def moments_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of W x per output, ``(groups, outputs)`` each."""
        return self._through(weight), ((weight @ self.gram) * weight).sum(2).clamp(min=0)

    def _through(self, weight: Tensor) -> Tensor:
        return (weight @ self.mean[:, :, None]).squeeze(2)


def solve_layer(
    layer: Fitted, norm: _BatchNorm | None, equations: CentredEquations, ridge: float, scale: Tensor | None = None
) -> float:
    """Set the weights of a layer, and the norm behind it, to the solution of its normal equations.

    The norm gets the statistics of what the layer gives now, and the scale and shift that undo them: in eval mode it
    is then no more than a bias.

    Args:
        layer: the layer; its weights are what the solution is held to.
        norm: the batch norm behind it.
        equations: with the samples of all processes.
        ridge: see :meth:`CentredEquations.solve`.
        scale: what the network multiplies the outputs by before they reach the target, ``(outputs,)``. An output that
            it multiplies by 0 keeps its weights.

    Returns:
        The share of the target's variance that the layer explains.
    """
    old: Tensor = layer.weight.detach()
    old_weight, old_bias = folded(layer, norm)
    scale = torch.ones_like(old_bias) if scale is None else scale.double()
    prior = (old_weight * scale[:, None]).unflatten(0, (groups_of(layer), -1))
    weight, bias = equations.solve(prior, ridge, intercept=norm is not None or layer.bias is not None)
    explained = equations.explained(weight, bias)
    silent = scale == 0
    new_weight = torch.where(silent[:, None], old_weight, weight.flatten(0, 1) / scale[:, None])
    new_bias = torch.where(silent, old_bias, bias.flatten() / scale)
    layer.weight.copy_(new_weight.reshape(old.shape))
    if norm is not None:
        moments = equations.moments_of(new_weight.unflatten(0, (groups_of(layer), -1)))
        mean, variance = (moment.flatten() for moment in moments)
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(new_bias + mean)
    if layer.bias is not None:
        layer.bias.copy_(new_bias if norm is None else torch.zeros_like(layer.bias))
    return explained


def folded(layer: Fitted, norm: _BatchNorm | None) -> tuple[Tensor, Tensor]:
    """A layer and the batch norm behind it as one layer: weights ``(outputs, inputs)`` and bias, float64."""
    weight = layer.weight.detach().flatten(1).double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if norm is None:
        return weight, bias
    factor = norm.weight.detach().double() / (norm.get_buffer("running_var").double() + norm.eps).sqrt()
    return weight * factor[:, None], (bias - norm.get_buffer("running_mean").double()) * factor + norm.bias.detach()
