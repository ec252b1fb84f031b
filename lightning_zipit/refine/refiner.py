"""The last pass over the calibration data: what follows merging, on copies that run where the batches are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zipit._common.collectives import exchange
from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.views import Inputs, view_of
from lightning_zipit._merging.maps import Maps
from lightning_zipit._report.report import measure_shifts
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.refine.batch_norm import BatchNormEstimator
from lightning_zipit.refine.finite import check_results
from lightning_zipit.refine.settings import BatchNorm, LayerByLayer, Refinement
from lightning_zipit.refine.walk import Walk


class Refiner:
    """Refines copies of merged networks batch by batch, and takes what was found over into them in the end.

    Args:
        merged: the merged networks.
        networks: the source networks by task, in eval mode.
        how: what to do.
        maps: the matching of each space.
        device: where the batches are, and ``networks``.
        weights: how much each model counts; all the same by default.
        models: the number of the model that each network is a part of, by task.
    """

    def __init__(
        self,
        merged: MergedBackbone,
        networks: Mapping[str, nn.Module],
        how: Refinement,
        maps: Maps,
        device: torch.device,
        weights: Sequence[float] | None,
        models: Mapping[str, int],
    ) -> None:
        self.merged, self.networks, self.how = merged, dict(networks), how
        self.maps, self.weights, self.models = maps, weights, models
        self.batches: list[Inputs] = []
        self._suspects: set[str] = set()  # the tasks whose batches gave NaN or Inf
        dtype = next(next(iter(networks.values())).parameters()).dtype

        def working(module: nn.Module) -> nn.Module:
            return copy_module(module).to(device=device, dtype=dtype).eval()

        with torch.inference_mode(False):
            self.trunk = working(merged.trunk)
            self.heads = {task: working(head) for task, head in merged.heads.items()}
            self.stems = {task: working(stem) for task, stem in merged.stems.items()}
            if not isinstance(how, LayerByLayer):  # which starts from the merged statistics
                self.estimator = BatchNormEstimator(_parts(self.trunk, self.heads))

    def add(self, x: Inputs, tasks: Iterable[str]) -> None:
        """Add a batch to the running statistics of the trunk and of the heads of ``tasks``, or keep it for the end.

        Stems are what they are in the sources, and keep their statistics.

        Args:
            x: an input of the backbones, or one of each by task.
            tasks: the tasks that the batch belongs to.
        """
        if isinstance(self.how, LayerByLayer):
            self.batches.append(x)
            return
        per_task = isinstance(self.how, BatchNorm) and self.how.per_task
        if isinstance(x, Tensor) and not self.stems and not per_task:
            crossing = self._collect(self.trunk, x)
            for task in tasks:
                self._collect_head(task, crossing)
            return
        for task in tasks:
            view = view_of(x, task)
            entering = self.stems[task](view) if self.stems else (view,)
            self._collect_head(task, self._collect(self.trunk, *entering, *(task,) * per_task))

    def _collect_head(self, task: str, crossing: Sequence[Any]) -> None:
        tensors = [each for each in crossing if isinstance(each, Tensor) and each.is_floating_point()]
        if not all(bool(each.isfinite().all()) for each in tensors):
            self._suspects.add(task)
        self._collect(self.heads[task], *crossing)

    def _collect(self, part: nn.Module, *inputs: Any) -> Any:
        """Run a part of the merged network, and add what it is given to its running statistics."""
        with self.estimator.collecting(part):
            return part(*inputs)

    def finish(self) -> MergedBackbone:
        """After the last batch: refine, and take what was found over.

        Returns:
            The merged networks, changed, with a report that says so.

        Raises:
            CalibrationError: if a batch norm has seen fewer than two samples, or there is NaN or Inf.
        """
        parts, working = _parts(self.merged.trunk, self.merged.heads), _parts(self.trunk, self.heads)
        report = self.merged.report
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(self.how, LayerByLayer):
                with torch.autocast(next(self.trunk.parameters()).device.type, enabled=False):
                    walk = self._walk(self.how)
                    report = replace(report, fits=walk.run())
                report = replace(report, notes=(*report.notes, *_kept(walk.left)))
            else:
                self.estimator.finish(sorted(set().union(*exchange(lambda: self._suspects))))
                report = replace(report, shifts=measure_shifts(parts, working))
            check_results(parts, working)
            for name, module in parts.items():
                for old, new in zip(module.state_dict().values(), working[name].state_dict().values(), strict=True):
                    old.copy_(new)
        return replace(self.merged, report=report)

    def _walk(self, how: LayerByLayer) -> Walk:
        return Walk(
            self.trunk,
            self.heads,
            self.networks,
            self.merged.graphs,
            self.maps,
            self.batches,
            how,
            self.weights,
            self.models,
            self.stems,
        )


def _kept(left: Mapping[str, str]) -> tuple[str, ...]:
    """A note for people on what was not refined, if anything was not."""
    named: dict[str, list[str]] = {}
    for name, why in left.items():
        named.setdefault(why, []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in named.items())
    return (f"Kept the weights that merging gave them: {listed}.",) * bool(listed)


def _parts(trunk: nn.Module, heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {"trunk": trunk, **{f"heads.{task}": head for task, head in heads.items()}}
