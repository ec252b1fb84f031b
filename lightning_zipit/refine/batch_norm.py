"""Re-estimates the running statistics of batch norm, which merging invalidates (ZipIt!, section 4.3, after REPAIR)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit.collectives import all_reduce_sums, is_distributed
from lightning_zipit.errors import CalibrationError


class BatchNormEstimator:
    """One cumulative average (momentum ``None``) over batches for the batch norms of some modules.

    Args:
        modules: the modules whose running statistics shall be estimated, by the name that an error gives them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.norms: dict[str, _BatchNorm] = {
            f"{prefix}.{name}": norm
            for prefix, module in modules.items()
            for name, norm in module.named_modules()
            if isinstance(norm, _BatchNorm) and norm.track_running_stats
        }
        for norm in self.norms.values():
            norm.reset_running_stats()

    @contextmanager
    def collecting(self, module: nn.Module) -> Iterator[None]:
        """Inside, a forward of ``module`` adds its batch to the statistics; all else stays in eval mode."""
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.training, norm.momentum = True, None
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.training, norm.momentum = False, momentum

    def finish(self) -> None:
        """Average over the batches of all processes: a few collectives, the same on every rank.

        Raises:
            CalibrationError: naming the norms that no batch of two or more samples has reached.
        """
        if is_distributed():
            average_over_processes(list(self.norms.values()))
        empty = [name for name, norm in self.norms.items() if not norm.num_batches_tracked]
        if empty:
            raise CalibrationError(
                f"No batch of two or more samples reached batch norm {', '.join(empty[:5])}, so that its "
                f"statistics cannot "
                "be re-estimated. Use a larger batch size, or refine=None to keep the merged statistics."
            )


def average_over_processes(norms: Sequence[_BatchNorm]) -> None:
    """Average running statistics over the batches of all processes, in one all-reduce."""
    sums = []
    for norm in norms:
        batches = norm.get_buffer("num_batches_tracked")
        statistics = torch.stack([norm.get_buffer("running_mean"), norm.get_buffer("running_var")])
        sums.append(torch.cat([batches[None].double(), (statistics.double() * batches).flatten()]))
    all_reduce_sums(sums)
    for norm, packed in zip(norms, sums, strict=True):
        mean, variance = (packed[1:] / packed[0].clamp(min=1)).chunk(2)
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
        norm.get_buffer("num_batches_tracked").copy_(packed[0])


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a network has batch norm with running statistics."""
    return any(isinstance(child, _BatchNorm) and child.track_running_stats for child in module.modules())
