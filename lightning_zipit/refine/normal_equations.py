"""Normal equations of linear regression over batches and processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_zipit._calibration.statistics import AT_ONCE, add_gram
from lightning_zipit.errors import CalibrationError

MOST_TRIES = 40
"""Highest number of ridge strengths that are tried, each ten times the last. Far fewer compensate for rounding."""


class NormalEquations:
    """Sums over samples that determine the optimal weights of a layer. Sums of batches and processes can be added.

    Args:
        groups: the number of groups.
        inputs: the number of inputs of a group.
        outputs: the number of outputs of a group.
        device: the device of the samples.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = zeros(1)[:1]
        self.inputs, self.outputs = zeros(inputs), zeros(outputs)
        # The entries of the Gram matrices below the diagonal are undefined.
        self.gram, self.cross, self.power = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            x: ``(groups, samples, inputs)``.
            target: ``(groups, samples, outputs)``.
        """
        # Everything is in double precision: rounding depends on the split into batches, and a nearly singular Gram
        # matrix amplifies it. (A forward on a CPU computes a sample identically in any batch of two or more.)
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
        """All sums, to be added over processes."""
        return [self.count, self.inputs, self.outputs, self.gram, self.cross, self.power]

    @property
    def totals(self) -> Tensor:
        """Sums that are finite only if all sums are finite: the diagonal bounds the Gram matrix."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        return torch.cat([sums.flatten() for sums in (self.inputs, self.outputs, self.power, diagonal)])

    def centred(self) -> CentredEquations:
        """Compute the equations of the centred samples."""
        mean, offset = self.inputs / self.count, self.outputs / self.count
        gram = self.gram.triu()
        gram += gram.triu(1).mT
        squares = gram.diagonal(dim1=1, dim2=2).mean(1) / self.count[0]
        gram.div_(self.count).baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        cross = torch.baddbmm(self.cross / self.count, mean[:, :, None], offset[:, None, :], alpha=-1)
        return CentredEquations(mean, offset, gram, cross, (self.power / self.count - offset.square()).sum(), squares)


class CentredEquations(NamedTuple):
    """Normal equations of centred samples: they determine the weights of a layer, and the fit of any weights.

    Attributes:
        mean: the mean of the inputs, ``(groups, inputs)``.
        offset: the mean of the targets, ``(groups, outputs)``.
        gram: the covariance of the inputs, ``(groups, inputs, inputs)``.
        cross: the covariance of inputs and targets, ``(groups, inputs, outputs)``.
        variance: the sum of the variances of all targets.
        squares: the mean square of the inputs of each group, ``(groups,)``.
    """

    mean: Tensor
    offset: Tensor
    gram: Tensor
    cross: Tensor
    variance: Tensor
    squares: Tensor

    def solve(self, prior: Tensor, ridge: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Compute the weights and bias that minimise Σ‖W x + b - t‖² + λ‖W - prior‖².

        Args:
            prior: the weights of the regularisation term, ``(groups, outputs, inputs)``.
            ridge: λ as a ratio to the mean square of the inputs. If the inputs vary little compared with their mean,
                rounding dominates their differences, and the weights stay near the prior.
            intercept: whether the layer has a bias; otherwise it is 0.

        Returns:
            The weights, float64 ``(groups, outputs, inputs)``, and the bias, float64 ``(groups, outputs)``.

        Raises:
            CalibrationError: if the equations have no solution, for example because sums are not finite.
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
                "The normal equations of a layer have no solution: its inputs are too large, NaN or Inf. Check weights "
                "and data for such values, or merge with refine='batch_norm' or refine=None."
            )
        weight = torch.cholesky_solve(cross + strength[:, None, None] * prior.double().mT, factor).mT
        bias = self.offset - self._through(weight)
        return weight, bias if intercept else torch.zeros_like(bias)

    def explained(self, weight: Tensor, bias: Tensor) -> float:
        """Compute the ratio of the target's variance that weights explain, over all outputs; at most 1."""
        fitted = 2 * (weight * self.cross.mT).sum() - ((weight @ self.gram) * weight).sum()
        shift = (self._through(weight) + bias - self.offset).square().sum()
        return ((fitted - shift) / self.variance.clamp(min=torch.finfo(torch.float64).tiny)).item()

    def moments_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute mean and variance of W x per output, ``(groups, outputs)`` each."""
        return self._through(weight), ((weight @ self.gram) * weight).sum(2).clamp(min=0)

    def _through(self, weight: Tensor) -> Tensor:
        return (weight @ self.mean[:, :, None]).squeeze(2)
