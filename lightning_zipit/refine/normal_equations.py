"""Normal equations of linear regression, summed over batches and processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_zipit._calibration.statistics import AT_ONCE, add_gram
from lightning_zipit.errors import CalibrationError

MOST_TRIES = 40
"""Strengths of the ridge that are tried, each ten times the last: rounding is made up for long before."""


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
