"""The interface of a refinement: what adapts merged networks to the calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.views import Inputs, view_of
from lightning_zipit._matching.maps import Maps
from lightning_zipit.graph import MergeGraph
from lightning_zipit.refine.task_norms import has_task_norms


@dataclass(frozen=True)
class MergedNetworks:
    """Merged networks and their sources: what a refinement is given.

    Attributes:
        trunk: the shared part; it takes what a stem returns, or the input, and returns a tuple of what heads take.
        heads: the last part of each task.
        stems: the first part of each task; empty if the trunk takes the input.
        sources: the source network of each task, in eval mode. A refinement must not change them.
        graphs: the merge graph of each task.
        maps: the merge and unmerge matrices of each feature space.
        models: the number of the model of each task. Several tasks have one number if their model was merged before.
        weights: how much each model counts; ``None`` if all count the same.
        device: the device of the batches.
    """

    trunk: nn.Module
    heads: Mapping[str, nn.Module]
    stems: Mapping[str, nn.Module]
    sources: Mapping[str, nn.Module]
    graphs: Mapping[str, MergeGraph]
    maps: Maps
    models: Mapping[str, int]
    weights: Sequence[float] | None
    device: torch.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Trunk and heads by their names in reports and errors: ``trunk`` and ``heads.TASK``."""
        return {"trunk": self.trunk, **{f"heads.{task}": head for task, head in self.heads.items()}}

    @property
    def runs_per_task(self) -> bool:
        """Whether the trunk computes different values for each task: it has stems or norms of a task."""
        return bool(self.stems) or has_task_norms(self.trunk)

    def enter_trunk(self, inputs: Inputs, task: str) -> tuple[Any, ...]:
        """The arguments of the trunk for one task.

        Args:
            inputs: a batch, as a refinement gets it.
            task: the name of the task.
        """
        view = view_of(inputs, task).clone()  # a first layer may work in place
        entering = tuple(self.stems[task](view)) if self.stems else (view,)
        return (*entering, task) if has_task_norms(self.trunk) else entering

    def output(self, inputs: Inputs, task: str) -> Any:
        """What the merged networks return for one task; arguments as for :meth:`enter_trunk`."""
        return self.heads[task](*self.trunk(*self.enter_trunk(inputs, task)))

    def source_output(self, inputs: Inputs, task: str) -> Any:
        """What the source network of one task returns; arguments as for :meth:`enter_trunk`."""
        return self.sources[task](view_of(inputs, task).clone())

    def working_copy(self) -> MergedNetworks:
        """The same with copies of trunk, heads and stems, in eval mode, on the device and of the sources' type."""
        dtype = next(next(iter(self.sources.values())).parameters()).dtype

        def copied(module: nn.Module) -> nn.Module:
            return copy_module(module).to(device=self.device, dtype=dtype).eval()

        return replace(
            self,
            trunk=copied(self.trunk),
            heads={task: copied(head) for task, head in self.heads.items()},
            stems={task: copied(stem) for task, stem in self.stems.items()},
        )


@dataclass(frozen=True)
class NormShift:
    """How far the running statistics of a batch norm were from what they are after re-estimation.

    Attributes:
        mean: how far the means moved, in deviations before; the mean over features.
        variance: the variances after, as a ratio to those before; the geometric mean over features. Below 1 where
            merging made features vary less (the variance collapse of REPAIR, arXiv 2211.08403).
    """

    mean: float
    variance: float


@dataclass(frozen=True)
class Changes:
    """What a refinement changed, for the merge report.

    Attributes:
        fits: per layer, the share of the variance of its target that it explains (1 at best).
        shifts: per batch norm, how far its running statistics moved.
        notes: sentences for the report.
    """

    fits: Mapping[str, float] = field(default_factory=dict)
    shifts: Mapping[str, NormShift] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Refining(ABC):
    """A refinement at work: it takes the batches of one pass over the calibration data.

    The methods run without gradients and outside of inference mode.

    Args:
        merged: working copies of the merged networks, and their sources.
    """

    def __init__(self, merged: MergedNetworks) -> None:
        self.merged = merged

    @abstractmethod
    def add(self, inputs: Inputs, tasks: Iterable[str]) -> None:
        """Take a batch.

        Args:
            inputs: the input of the networks, or the input of each network by task.
            tasks: the tasks that the batch belongs to.
        """

    @abstractmethod
    def finish(self) -> Changes:
        """Change the parameters and buffers of trunk and heads in place, after the last batch.

        With several processes, each has seen its own batches; sum over them with
        :func:`~lightning_zipit.refine.all_reduce_sums`. Afterwards all processes must hold the same values. If a value
        is then NaN or Inf, the merge ends with an error; otherwise the values are copied to the merged networks.

        Returns:
            What changed.
        """


class Refinement(ABC):
    """Settings of a refinement, and how to start it. Subclass it, and :class:`Refining`, to add a refinement.

    Attributes:
        per_task: whether the trunk gets a batch norm for each task.
        pre_activations: whether features are measured, and so matched, in front of their activation functions.
    """

    per_task: bool = False
    pre_activations: bool = False

    def needs_data(self, networks: Iterable[nn.Module]) -> bool:
        """Whether these source networks make a pass over the calibration data necessary."""
        return True

    @abstractmethod
    def start(self, merged: MergedNetworks) -> Refining:
        """Start refining.

        Args:
            merged: working copies of the merged networks, and their sources.
        """
