"""The result of a merge, without Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from lightning_zipit._common.views import Inputs
from lightning_zipit._report.report import MergeReport
from lightning_zipit.graph import MergeGraph
from lightning_zipit.refine import Changes


@dataclass(frozen=True)
class MergedBackbone:
    """The merged networks.

    Attributes:
        trunk: the shared part. It maps the input, or the output of a stem, to a tuple of the inputs of the heads. A
            trunk with a batch norm per task also takes the task name, as its last argument.
        heads: the last part of each task's network.
        report: the report of the merge.
        example: zeros of the shape and dtype of one calibration sample, ``(1, …)``; one per task if each task has a
            separate input.
        graphs: the merge graph of each source network.
        widths: the number of features of each space whose width differs from the sources.
        stems: the first part of each task's network, which returns a tuple of the inputs of the trunk; empty without
            ``start_at``.
    """

    trunk: nn.Module
    heads: dict[str, nn.Module]
    report: MergeReport
    example: Inputs
    graphs: dict[str, MergeGraph]
    widths: dict[str, int] = field(default_factory=dict)
    stems: dict[str, nn.Module] = field(default_factory=dict)

    def refined(self, changes: Changes) -> MergedBackbone:
        """Return the same networks with a report that includes the changes of a refinement."""
        notes = (*self.report.notes, *changes.notes)
        report = replace(self.report, fits=dict(changes.fits), shifts=dict(changes.shifts), notes=notes)
        return replace(self, report=report)
