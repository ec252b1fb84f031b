"""What a merge did, in numbers: per space the matching, per network the cost."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_zipit.graph import FeatureSpace
from lightning_zipit.merging import SpaceMap


@dataclass(frozen=True)
class SpaceReport:
    """The matching of one feature space.

    Attributes:
        name: the module that writes the space first.
        tap: the module that reads it where it was measured, "the cut", or "" where it was matched by number.
        size: features of one model.
        width: features of the merged network.
        within: clusters of two or more features that lie within one model.
        across: clusters with features of several models.
        similarity: mean similarity of the pairs of features that share a cluster; NaN where there are none or the
            space was not measured.
    """

    name: str
    tap: str
    size: int
    width: int
    within: int
    across: int
    similarity: float


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        flops: floating point operations of one sample's forward (a multiply-add counts as two).
        parameters: number of parameters.
    """

    flops: int
    parameters: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        spaces: one entry per feature space, in the order of the network.
        sources: the cost of each source network by task.
        merged: the cost of the merged network for all tasks together.
        notes: what is not merged by what it does, and why; see :attr:`MergeGraph.notes`.
        fits: for ``refine="least_squares"``, the share of the variance of its target that each layer explains, in the
            order of the network; layers are named ``trunk.`` or ``heads.TASK.`` and what they are called in the
            backbone.
    """

    spaces: tuple[SpaceReport, ...]
    sources: dict[str, Cost]
    merged: Cost
    notes: tuple[str, ...] = ()
    fits: dict[str, float] = field(default_factory=dict)

    @property
    def ensemble(self) -> Cost:
        """The cost of running all source networks."""
        return sum(self.sources.values(), Cost(0, 0))

    def to_table(self) -> Table:
        """The matching of every space, for people."""
        table = Table()
        for heading in ("space", "read by", "features", "merged", "within", "across", "similarity"):
            table.add_column(heading, justify="left" if heading in ("space", "read by") else "right", overflow="fold")
        for space in self.spaces:
            similarity = f"{space.similarity:.3f}" if space.similarity == space.similarity else "–"
            counts = map(str, (space.size, space.width, space.within, space.across))
            table.add_row(space.name, space.tap, *counts, similarity)
        return table

    def summary(self) -> str:
        """One line: what the merged network costs beside one source and the ensemble."""
        one = next(iter(self.sources.values()))
        return (
            f"merged {_short(self.merged.flops)} FLOPs, {_short(self.merged.parameters)} parameters; "
            f"one source {_short(one.flops)}, {_short(one.parameters)}; "
            f"ensemble {_short(self.ensemble.flops)}, {_short(self.ensemble.parameters)}"
        )

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=140)
        console.print(self.to_table())
        for line in (self.summary(), *self._describe_fits(), *self.notes):
            console.print(line, highlight=False, markup=False)
        return buffer.getvalue()

    def _describe_fits(self) -> Iterator[str]:
        if self.fits:
            lowest = min(self.fits, key=self.fits.__getitem__)
            mean = sum(self.fits.values()) / len(self.fits)
            yield (
                f"{len(self.fits)} layers were fitted and explain {mean:.1%} of their targets on average, the least "
                f"{self.fits[lowest]:.1%} (`{lowest}`)."
            )

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and numbers."""
        return asdict(self) | {"spaces": [asdict(space) for space in self.spaces], "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """The report that :meth:`to_dict` wrote."""
        return cls(
            spaces=tuple(SpaceReport(**space) for space in content["spaces"]),
            sources={task: Cost(**cost) for task, cost in content["sources"].items()},
            merged=Cost(**content["merged"]),
            notes=tuple(content.get("notes", ())),
            fits=dict(content.get("fits", {})),
        )


def _short(number: float) -> str:
    """A count with three digits and the unit that they need."""
    for unit in ("", " k", " M", " G"):
        if float(f"{number:.3g}") < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def report_space(space: FeatureSpace, space_map: SpaceMap, similarity: Tensor | None) -> SpaceReport:
    """Count the clusters of a space.

    Args:
        space: the space.
        space_map: its matching.
        similarity: ``(N·C, N·C)``, where the space was measured.
    """
    labels, num_models = space_map.labels, space_map.num_models
    size = len(labels) // num_models
    members = torch.zeros(num_models, int(labels.max()) + 1)  # features of each model in each cluster
    for model in range(num_models):
        members[model].index_add_(0, space_map.targets(model), torch.ones(size))
    models = (members > 0).sum(0)
    pairs = float((members.sum(0) * (members.sum(0) - 1)).sum())
    mean = float("nan")
    if similarity is not None and pairs:
        similarity = similarity.cpu()
        of_cluster = similarity.new_zeros(members.shape[1], len(labels)).index_add_(0, labels, similarity)
        inside = of_cluster[labels, torch.arange(len(labels))].sum() - similarity.diagonal().sum()
        mean = float(inside / pairs)
    within = int(((models == 1) & (members.sum(0) > 1)).sum())
    tap = space.tap.reader if space.tap else ""
    return SpaceReport(space.name, tap, size, space_map.width, within, int((models > 1).sum()), mean)


def measure_cost(module: nn.Module, x: Tensor) -> Cost:
    """Count the FLOPs of one forward and the parameters of a network.

    Args:
        module: a network in eval mode.
        x: an input of one sample, on its device.

    Returns:
        FLOPs (by :class:`torch.utils.flop_counter.FlopCounterMode`) and parameters.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return Cost(counter.get_total_flops(), sum(parameter.numel() for parameter in module.parameters()))
