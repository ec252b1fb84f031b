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
        trunk: the shared part. It takes the input, or what a stem returns; a trunk with a batch norm per task also
            takes the name of the task, last. It returns a tuple: what the heads take.
        heads: the last part of each task's network.
        report: what was merged, and what it costs.
        example: zeros of the shape and type of one calibration sample, ``(1, …)``, by task where each task has its own
            input.
        graphs: the merge graph of each source network.
        widths: the number of features of each space whose width differs from the sources'.
        stems: the first part of each task's network, from its input to a tuple; empty without ``start_at``.
    """

    trunk: nn.Module
    heads: dict[str, nn.Module]
    report: MergeReport
    example: Inputs
    graphs: dict[str, MergeGraph]
    widths: dict[str, int] = field(default_factory=dict)
    stems: dict[str, nn.Module] = field(default_factory=dict)

    def refined(self, changes: Changes) -> MergedBackbone:
        """The same networks with a report that includes what a refinement changed."""
        notes = (*self.report.notes, *changes.notes)
        report = replace(self.report, fits=dict(changes.fits), shifts=dict(changes.shifts), notes=notes)
        return replace(self, report=report)
