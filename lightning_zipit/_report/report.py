"""What a merge did, in numbers: per space the matching, per network the cost."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from lightning_zipit import functional as F
from lightning_zipit._calibration.statistics import Moments
from lightning_zipit._common.files import replacing
from lightning_zipit._common.views import Inputs, each_view
from lightning_zipit._matching.cca import mixed_agreement
from lightning_zipit._merging.maps import DenseMap, SpaceMap
from lightning_zipit._report.diagnosis import Finding, diagnose
from lightning_zipit.errors import CheckpointError
from lightning_zipit.graph import FeatureSpace
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.refine.refinement import NormShift


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
        similarity: mean similarity of the pairs of features that share a cluster, at most 1; NaN where there are none
            or the space was not measured. Where merged features are combinations of all, that of what the models give
            to them, in pairs of models.
        lowest: the lowest similarity of such a pair.
        chance: what the mean would be if each model's features were dealt out to the clusters at random.
        deviation: of that mean from one deal to another.
        losses: of each model, the share of its features' variance that is lost when every feature becomes the mean of
            its cluster; see :func:`~lightning_zipit.functional.zip_losses`.
        samples: how many the similarity comes from: images times positions, where there are positions.
        dead: of each model, how many features are constant on the calibration data.
    """

    name: str
    tap: str
    size: int
    width: int
    within: int
    across: int
    similarity: float
    lowest: float = math.nan
    chance: float = math.nan
    deviation: float = math.nan
    losses: tuple[float, ...] = ()
    samples: int = 0
    dead: tuple[int, ...] = ()

    @property
    def alone(self) -> int:
        """Clusters of one feature: what was left as it is."""
        return self.width - self.within - self.across


class Measure(NamedTuple):
    """What is known of a space's statistics beside the similarity; see :class:`SpaceReport`."""

    samples: int = 0
    dead: tuple[int, ...] = ()

    @classmethod
    def of(cls, moments: Moments, num_models: int) -> Measure:
        """That of statistics of N models, side by side."""
        constant = (moments.covariance.diagonal() == 0).view(num_models, -1).sum(1)
        return cls(moments.count, tuple(constant.tolist()))


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
        models: the models' names, in the order of ``losses`` and ``dead``; the tasks, unless a model that was merged
            before stands for several of them.
        shifts: for ``refine="batch_norm"``, how far re-estimation moved each batch norm from what merging gave it;
            norms are named as in ``fits``.
    """

    spaces: tuple[SpaceReport, ...]
    sources: dict[str, Cost]
    merged: Cost
    notes: tuple[str, ...] = ()
    fits: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, NormShift] = field(default_factory=dict)
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.models:
            object.__setattr__(self, "models", tuple(self.sources))

    @property
    def ensemble(self) -> Cost:
        """The cost of running all source networks."""
        return sum(self.sources.values(), Cost(0, 0))

    def to_table(self) -> Table:
        """The matching of every space, for people."""
        table = Table()
        for heading in ("space", "read by", "features", "merged", "within", "across", "alone", "similarity", "lowest"):
            table.add_column(heading, justify="left" if heading in ("space", "read by") else "right", overflow="fold")
        for space in self.spaces:
            counts = map(str, (space.size, space.width, space.within, space.across, space.alone))
            shown = ("–" if math.isnan(value) else f"{value:.3f}" for value in (space.similarity, space.lowest))
            table.add_row(space.name, space.tap, *counts, *shown)
        return table

    def summary(self) -> str:
        """One line: what the merged network costs beside one source and the ensemble."""
        one = next(iter(self.sources.values()))
        return (
            f"merged {_short(self.merged.flops)} FLOPs, {_short(self.merged.parameters)} parameters; "
            f"one source {_short(one.flops)}, {_short(one.parameters)}; "
            f"ensemble {_short(self.ensemble.flops)}, {_short(self.ensemble.parameters)}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.to_table()
        for line in (self.summary(), *self._describe_fits(), *self._describe_shifts(), *self.notes):
            yield Text(line)

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=160).print(self)
        return buffer.getvalue()

    def show(self) -> None:
        """Print the report and its diagnosis: as wide as the terminal, or plain where the output is no terminal."""
        console = Console()
        if console.is_terminal:
            console.print(self)
        else:
            print(self, end="")
        for finding in self.diagnose():
            print(f"Look at this: {finding}")

    def diagnose(self) -> list[Finding]:
        """What is likely to cost accuracy, judged by what was measured: each with what to try.

        Findings are of spaces that are matched no better than at random (``"chance"``), of too little calibration data
        (``"samples"``), of features that are constant on it (``"dead"``), of a task that loses more than another
        (``"crowded"``), of a depth from which on the models have little in common (``"collapse"``), and of batch norms
        that re-estimation moved far (``"norms"``).

        Returns:
            The findings; none for a merge in which nothing stands out.
        """
        return diagnose(self)

    def _describe_fits(self) -> Iterator[str]:
        if self.fits:
            lowest = min(self.fits, key=self.fits.__getitem__)
            mean = sum(self.fits.values()) / len(self.fits)
            yield (
                f"{len(self.fits)} layers were fitted and explain {mean:.1%} of their targets on average, the least "
                f"{self.fits[lowest]:.1%} (`{lowest}`)."
            )

    def _describe_shifts(self) -> Iterator[str]:
        if self.shifts:
            means = {name: shift.mean for name, shift in self.shifts.items()}
            ratios = {name: shift.variance for name, shift in self.shifts.items()}
            most, least = max(means, key=means.__getitem__), min(ratios, key=ratios.__getitem__)
            yield (
                f"{len(self.shifts)} batch norms were re-estimated: means moved by {_mean(means.values()):.2f} "
                f"deviations on average, the most {means[most]:.2f} (`{most}`); variances are "
                f"{_mean(ratios.values()):.2f} of the merged ones, the least {ratios[least]:.2f} (`{least}`)."
            )

    def metrics(self) -> dict[str, float]:
        """The report in a few numbers: means over spaces, layers or norms, and what merging and the ensemble cost."""
        known = [space for space in self.spaces if not math.isnan(space.similarity)]
        numbers = {
            "similarity": _mean(space.similarity for space in known),
            "lowest_similarity": min((space.lowest for space in known), default=math.nan),
            "loss": _mean(_mean(space.losses) for space in known),
            "fit": _mean(self.fits.values()),
            "mean_shift": _mean(shift.mean for shift in self.shifts.values()),
            "variance_ratio": _mean(shift.variance for shift in self.shifts.values()),
            "flops": float(self.merged.flops),
            "parameters": float(self.merged.parameters),
            "flops_of_ensemble": float(self.ensemble.flops),
        }
        for kind in ("within", "across", "alone"):
            numbers[kind] = float(sum(getattr(space, kind) for space in self.spaces))
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and numbers."""
        lists = {"notes": list(self.notes), "models": list(self.models)}
        return asdict(self) | lists | {"spaces": [asdict(space) for space in self.spaces]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """The report that :meth:`to_dict` wrote."""
        return cls(
            spaces=tuple(SpaceReport(**_read(space)) for space in content["spaces"]),
            sources={task: Cost(**cost) for task, cost in content["sources"].items()},
            merged=Cost(**content["merged"]),
            notes=tuple(content.get("notes", ())),
            fits=_read(content.get("fits", {})),
            shifts={name: NormShift(**_read(shift)) for name, shift in content.get("shifts", {}).items()},
            models=tuple(content.get("models", ())),
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per space, with what belongs to one model under ``losses/MODEL`` and ``dead/MODEL``."""
        rows = []
        for space in self.spaces:
            row = asdict(space) | {"alone": space.alone}
            for name in ("losses", "dead"):
                known = row.pop(name) or (None,) * len(self.models)
                row |= {f"{name}/{model}": value for model, value in zip(self.models, known, strict=True)}
            rows.append(row)
        return rows

    def to_csv(self) -> str:
        """:meth:`to_rows` as CSV, with a header; what was not measured is left empty."""
        rows = [{name: "" if value != value else value for name, value in row.items()} for row in self.to_rows()]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=[*rows[0]] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; what was not measured is null."""
        return json.dumps(_without_nan(self.to_dict()), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file; one that is there is replaced."""
        with replacing(Path(path)) as file:
            file.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MergeReport:
        """Read the report that :meth:`save` wrote.

        Raises:
            CheckpointError: if the file holds no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds no report of a merge, as MergeReport.save writes it: {type(error).__name__}: {error}"
            ) from error


def _mean(values: Any) -> float:
    """NaN where there are none."""
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(held) for held in value]
    return None if value != value else value


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON made of a dataclass: lists for tuples, and null for NaN."""
    return {
        name: tuple(value) if isinstance(value, list) else math.nan if value is None else value
        for name, value in content.items()
    }


def _short(number: float) -> str:
    """A count with three digits and the unit that they need."""
    for unit in ("", " k", " M", " G"):
        if float(f"{number:.3g}") < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def report_space(
    space: FeatureSpace,
    space_map: SpaceMap | DenseMap,
    similarity: Tensor | None,
    measure: Measure | None = None,
) -> SpaceReport:
    """Count the clusters of a space.

    Args:
        space: the space.
        space_map: its matching.
        similarity: ``(N·C, N·C)``, where the space was measured; the covariance for one with dense maps.
        measure: what else is known of its statistics.
    """
    if isinstance(space_map, DenseMap):
        return _report_mixed(space, space_map, similarity, measure)
    labels, num_models = space_map.labels, space_map.num_models
    size = len(labels) // num_models
    members = torch.zeros(num_models, int(labels.max()) + 1)  # features of each model in each cluster
    for model in range(num_models):
        members[model].index_add_(0, space_map.targets(model), torch.ones(size))
    models = (members > 0).sum(0)
    within, across = int(((models == 1) & (members.sum(0) > 1)).sum()), int((models > 1).sum())
    found = SpaceReport(
        space.name, space.tap.reader if space.tap else "", size, space_map.width, within, across, math.nan
    )
    if measure is not None:
        found = replace(found, samples=measure.samples, dead=measure.dead)
    if similarity is None:
        return found
    similarity = F.correlation(similarity.cpu())  # a covariance becomes one; all others are scaled already
    matched = similarity[(labels[:, None] == labels).fill_diagonal_(False)]
    if len(matched):
        found = replace(found, similarity=float(matched.mean()), lowest=float(matched.min()))
    chance, deviation = F.by_chance(similarity, labels, num_models)
    losses = tuple(F.zip_losses(similarity, labels, num_models).tolist())
    return replace(found, chance=chance, deviation=deviation, losses=losses)


def _report_mixed(
    space: FeatureSpace, space_map: DenseMap, similarity: Tensor | None, measure: Measure | None
) -> SpaceReport:
    tap, width = space.tap.reader if space.tap else "", space_map.width
    found = SpaceReport(space.name, tap, space.size, width, 0, width, math.nan)
    if measure is not None:
        found = replace(found, samples=measure.samples, dead=measure.dead)
    if similarity is None:
        return found
    matched, losses = mixed_agreement(similarity, *space_map.matrices)
    if len(matched):
        found = replace(found, similarity=float(matched.mean()), lowest=float(matched.min()))
    return replace(found, losses=tuple(losses.tolist()))


def measure_cost(module: nn.Module, x: Inputs) -> Cost:
    """Count the FLOPs of one forward and the parameters of a network.

    Args:
        module: a network; a copy of it is run, in eval mode.
        x: an input of one sample, on its device, or one of each task.

    Returns:
        FLOPs (by :class:`torch.utils.flop_counter.FlopCounterMode`) and parameters.
    """
    working = working_copy(module)

    def count(samples: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            working(each_view(x, lambda one: one.expand(samples, *one.shape[1:])))
        return int(counter.get_total_flops())

    # Batch norm without running statistics cannot do with one sample, which then is what a second one does not add.
    alone = all(child.running_mean is not None for child in module.modules() if isinstance(child, _BatchNorm))
    flops = count(1) if alone else 2 * count(2) - count(3)
    return Cost(flops, sum(parameter.numel() for parameter in module.parameters()))
