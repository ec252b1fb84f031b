"""Batch-norm re-estimation: recompute running statistics, which merging invalidates (ZipIt!, section 4.3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._common.calls import Call
from lightning_zipit._common.collectives import all_reduce_sums, exchange
from lightning_zipit._common.views import Inputs
from lightning_zipit.errors import CalibrationError
from lightning_zipit.refine.finite import REMEDY
from lightning_zipit.refine.moments import FeatureMoments
from lightning_zipit.refine.refinement import Changes, MergedNetworks, NormShift, Refinement, Refining


@dataclass(frozen=True)
class BatchNorm(Refinement):
    """Re-estimate the running statistics of batch norms: in the trunk on all data, in a head on the data of its task.

    Args:
        per_task: give the trunk a separate batch norm for each task, with the statistics of the task's data. The trunk
            then runs once for each requested task.
    """

    per_task: bool = False

    def needs_data(self, networks: Iterable[nn.Module]) -> bool:
        return any(map(has_batch_norm, networks))

    def start(self, merged: MergedNetworks) -> Refining:
        return ReEstimation(merged)


class ReEstimation(Refining):
    """Re-estimate the running statistics of the batch norms in trunk and heads; see :class:`BatchNorm`.

    The batch norms of stems keep their statistics, because stems are not merged.

    Args:
        merged: working copies of the merged networks, and their sources.
    """

    def __init__(self, merged: MergedNetworks) -> None:
        super().__init__(merged)
        self._before = statistics_of(merged.parts)
        self._estimator = BatchNormEstimator(merged.parts)
        self._suspects: set[str] = set()  # tasks whose batches produced NaN or Inf

    def add(self, inputs: Inputs, tasks: Iterable[str]) -> None:
        if isinstance(inputs, Call) and not self.merged.runs_per_task:
            crossing = self._collect(self.merged.trunk, *inputs.copies)
            for task in tasks:
                self._collect_head(task, crossing)
            return
        for task in tasks:
            self._collect_head(task, self._collect(self.merged.trunk, *self.merged.enter_trunk(inputs, task)))

    def finish(self) -> Changes:
        self._estimator.finish(sorted(set().union(*exchange(lambda: self._suspects))))
        return Changes(shifts=measure_shifts(self._before, statistics_of(self.merged.parts)))

    def _collect_head(self, task: str, crossing: Sequence[Any]) -> None:
        tensors = [each for each in crossing if isinstance(each, Tensor) and each.is_floating_point()]
        if not all(bool(each.isfinite().all()) for each in tensors):
            self._suspects.add(task)
        self._collect(self.merged.heads[task], *crossing)

    def _collect(self, part: nn.Module, *inputs: Any) -> Any:
        """Run a part of the merged network, and add the inputs of its norms to their statistics."""
        with self._estimator.collecting(part):
            return part(*inputs)


class BatchNormEstimator:
    """Estimate mean and variance of the inputs of batch norms over all samples.

    Every position of every sample counts once, independent of the split into batches and processes. The statistics are
    known only after the last batch. Until then, a norm normalises each batch by the mean and variance of this batch,
    like in training mode. A batch with one value per feature has no variance. Such a batch is normalised by the old
    statistics.

    Args:
        modules: the modules in eval mode, by their names in error messages.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.norms: dict[str, Estimate] = {}
        self._estimates: dict[int, Estimate] = {}  # by the id of the running mean, which several norms may share
        for prefix, module in modules.items():
            for name, norm in running_norms(module):
                mean = norm.get_buffer("running_mean")
                self.norms[f"{prefix}.{name}"] = self._estimates.setdefault(id(mean), Estimate(norm))

    @contextmanager
    def collecting(self, module: nn.Module) -> Iterator[None]:
        """Context manager: a forward of ``module`` adds its batch to the statistics."""
        hooks = [
            norm.register_forward_pre_hook(self._estimates[id(norm.get_buffer("running_mean"))].add, with_kwargs=True)
            for _, norm in running_norms(module)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, suspects: Collection[str] = ()) -> None:
        """Sum the statistics over all processes, and write them into the norms. Every rank must call this.

        Args:
            suspects: the tasks whose batches produced NaN or Inf, for the error message.

        Raises:
            CalibrationError: if a norm has received fewer than two samples, or NaN or Inf. It names the norms.
        """
        estimates = list(self._estimates.values())
        all_reduce_sums([sums for each in estimates for sums in (each.moments.sums, each.calls)])
        empty = [f"`{name}`" for name, each in self.norms.items() if each.moments.count < 2]
        if empty:
            raise CalibrationError(
                f"The statistics of batch norm {', '.join(empty[:5])} cannot be re-estimated: fewer than two samples "
                "reached it. Use more calibration data, or refine=None to keep the merged statistics."
            )
        bad = [f"`{name}`" for name, each in self.norms.items() if not bool(each.moments.sums.isfinite().all())]
        if bad:
            of = f" in batches of task {', '.join(map(repr, suspects))}" * bool(suspects)
            raise CalibrationError(f"NaN or Inf in the inputs of batch norm {', '.join(bad[:5])}{of}. {REMEDY}")
        for each in estimates:
            each.finish()


class Estimate:
    """Accumulate the statistics of one batch norm.

    Args:
        norm: the batch norm.

    Attributes:
        moments: the moments of all samples so far.
        calls: the number of calls of the norm, ``(1,)``.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.mean, self.variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        self.batches = norm.get_buffer("num_batches_tracked")
        self._before = self.mean.clone(), self.variance.clone()
        self.moments = FeatureMoments(len(self.mean), self.mean.device, self.mean)
        self.calls = self.moments.sums.new_zeros(1)

    def add(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add an input of the norm (forward hook). The norm then normalises it by the input's own mean and variance."""
        x: Tensor = args[0] if args else kwargs["input"]
        count = x.numel() // x.shape[1]
        if not count:
            return
        values, axes = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.ndim)]
        mean = values.mean(axes)
        variance = (values - mean.reshape(-1, *[1] * (x.ndim - 2))).square().mean(axes)
        self.moments.add_summary(count, mean, variance)
        self.calls += 1
        self._set(*((mean, variance) if count > 1 else self._before))

    def finish(self) -> None:
        """Write the statistics of all samples into the norm."""
        self._set(self.moments.mean, self.moments.variance)
        self.batches.copy_(self.calls[0])

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        self.mean.copy_(mean)
        self.variance.copy_(variance)


def running_norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """List the batch norms with running statistics of a module, with their names."""
    norms = [(name, norm) for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)]
    return [(name, norm) for name, norm in norms if norm.track_running_stats]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a network has a batch norm with running statistics."""
    return bool(running_norms(module))


def statistics_of(parts: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return running mean and variance (plus ε) of each batch norm by its full name, float64 on the CPU."""
    return {
        f"{prefix}.{name}".rstrip("."): (
            norm.get_buffer("running_mean").detach().double().cpu().clone(),
            norm.get_buffer("running_var").detach().double().cpu() + norm.eps,
        )
        for prefix, module in parts.items()
        for name, norm in running_norms(module)
    }


def measure_shifts(
    before: Mapping[str, tuple[Tensor, Tensor]], after: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, NormShift]:
    """Compare the running statistics of batch norms before and after re-estimation; see :func:`statistics_of`."""
    shifts = {}
    for name, (mean, variance) in before.items():
        new_mean, new_variance = after[name]
        distance = (new_mean - mean).abs() / variance.sqrt()
        shifts[name] = NormShift(float(distance.mean()), float((new_variance / variance).log().mean().exp()))
    return shifts
