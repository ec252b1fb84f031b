"""What a merge gives, before it is a LightningModule."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_zipit._common.views import Inputs
from lightning_zipit._report.report import MergeReport
from lightning_zipit.graph import MergeGraph


@dataclass(frozen=True)
class MergedBackbone:
    """The networks that a merge made.

    Attributes:
        trunk: from the input, or from what the stems hand over, to a tuple of what the heads take; with a batch norm
            per task, it takes the name of the task last.
        heads: per task, from what the trunk hands over to the network's output.
        report: what the merge did.
        example: zeros of the shape and type of one calibration sample, ``(1, …)``, by task where each has its own.
        graphs: the merge graph of each source network.
        widths: per space its number of features, where that is not the sources'.
        stems: per task, from its input to a tuple of what the trunk takes; empty without ``start_at``.
    """

    trunk: nn.Module
    heads: dict[str, nn.Module]
    report: MergeReport
    example: Inputs
    graphs: dict[str, MergeGraph]
    widths: dict[str, int] = field(default_factory=dict)
    stems: dict[str, nn.Module] = field(default_factory=dict)
