"""Interface of a refinement, which adapts merged networks to the calibration data."""

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
    """Merged networks and their sources: the input of a refinement.

    Attributes:
        trunk: the shared part. It maps the input, or the output of a stem, to a tuple of the inputs of the heads.
        heads: the last part of each task's network.
        stems: the first part of each task's network; empty if the trunk starts at the input.
        sources: the source network of each task, in eval mode. A refinement must not change them.
        graphs: the merge graph of each task's network.
        maps: the merge and unmerge matrices of each feature space.
        models: the model index of each task. Several tasks have the same index if their source is a merged model.
        weights: the weight of each model; ``None`` for equal weights.
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
        """Trunk and heads by their names in reports and error messages: ``trunk`` and ``heads.TASK``."""
        return {"trunk": self.trunk, **{f"heads.{task}": head for task, head in self.heads.items()}}

    @property
    def runs_per_task(self) -> bool:
        """Whether the trunk computes different values for each task, because of stems or a batch norm per task."""
        return bool(self.stems) or has_task_norms(self.trunk)

    def enter_trunk(self, inputs: Inputs, task: str) -> tuple[Any, ...]:
        """Compute the arguments of the trunk for one task.

        Args:
            inputs: a batch, as in :meth:`Refining.add`.
            task: the name of the task.
        """
        view = view_of(inputs, task).copies  # the first layer may change its input in place
        entering = tuple(self.stems[task](*view)) if self.stems else view
        return (*entering, task) if has_task_norms(self.trunk) else entering

    def output(self, inputs: Inputs, task: str) -> Any:
        """Compute the output of the merged networks for one task. For the arguments, see :meth:`enter_trunk`."""
        return self.heads[task](*self.trunk(*self.enter_trunk(inputs, task)))

    def source_output(self, inputs: Inputs, task: str) -> Any:
        """Compute the output of the source network of one task. For the arguments, see :meth:`enter_trunk`."""
        return view_of(inputs, task).run(self.sources[task])

    def working_copy(self) -> MergedNetworks:
        """Copy trunk, heads and stems, in eval mode, to the device of the batches and the dtype of the sources."""
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
    """Change of the running statistics of a batch norm by re-estimation.

    Attributes:
        mean: the change of the means in old standard deviations, averaged over features.
        variance: the ratio of new to old variances, as geometric mean over features. It is below 1 if merging reduced
            the variance of features (the variance collapse of REPAIR, arXiv 2211.08403).
    """

    mean: float
    variance: float


@dataclass(frozen=True)
class Changes:
    """The changes that a refinement made, for the merge report.

    Attributes:
        fits: per layer, the ratio of its target's variance that the layer explains (at most 1).
        shifts: per batch norm, the change of its running statistics.
        notes: sentences for the report.
    """

    fits: Mapping[str, float] = field(default_factory=dict)
    shifts: Mapping[str, NormShift] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Refining(ABC):
    """A running refinement, which receives the batches of one pass over the calibration data.

    The methods are called without gradients and outside of inference mode.

    Args:
        merged: working copies of the merged networks, and their sources.
    """

    def __init__(self, merged: MergedNetworks) -> None:
        self.merged = merged

    @abstractmethod
    def add(self, inputs: Inputs, tasks: Iterable[str]) -> None:
        """Add a batch.

        Args:
            inputs: one input for all networks, or one input per task.
            tasks: the tasks to which the batch belongs.
        """

    @abstractmethod
    def finish(self) -> Changes:
        """Change the parameters and buffers of trunk and heads in place, after the last batch.

        With several processes, each process has seen only its own batches. Sum over all processes with
        :func:`~lightning_zipit.refine.all_reduce_sums`, so that all processes hold the same values afterwards. If a
        value is NaN or Inf, the merge ends with an error. Otherwise the values are copied to the merged networks.

        Returns:
            The changes, for the report.
        """


class Refinement(ABC):
    """Base class of refinements: the settings. Subclass it and :class:`Refining` to write your own.

    Attributes:
        per_task: whether the trunk gets a separate batch norm for each task.
        pre_activations: whether features are measured and matched in front of the activation.
    """

    per_task: bool = False
    pre_activations: bool = False

    def needs_data(self, networks: Iterable[nn.Module]) -> bool:
        """Whether the refinement of these source networks needs a pass over the calibration data."""
        return True

    @abstractmethod
    def start(self, merged: MergedNetworks) -> Refining:
        """Start refining.

        Args:
            merged: working copies of the merged networks, and their sources.
        """
