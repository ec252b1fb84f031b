"""The report of a merge: the matching per space, the cost per network."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_zipit._common.files import replacing
from lightning_zipit._matching.measure import SpaceReport
from lightning_zipit._merging.cost import Cost
from lightning_zipit._report.diagnosis import Finding, diagnose
from lightning_zipit.errors import CheckpointError
from lightning_zipit.refine.refinement import NormShift


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        spaces: one entry per feature space, in the order of the network.
        sources: the cost of each source network by task.
        merged: the cost of the merged network for all tasks together.
        notes: what is matched by index instead of by activation, with reasons; see :attr:`MergeGraph.notes`.
        fits: for ``refine="least_squares"``, the ratio of the variance of its target that each layer explains, in the
            order of the network. A layer is named ``trunk.`` or ``heads.TASK.`` and its name in the backbone.
        models: the names of the models, in the order of ``losses`` and ``dead``: the tasks, unless a model that was
            merged before has several of them.
        shifts: for ``refine="batch_norm"``, how far re-estimation moved the statistics of each batch norm; norms are
            named as in ``fits``.
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
        """The matching of every space as a table to print."""
        table = Table()
        for heading in ("space", "read by", "features", "merged", "within", "across", "alone", "similarity", "lowest"):
            table.add_column(heading, justify="left" if heading in ("space", "read by") else "right", overflow="fold")
        for space in self.spaces:
            counts = map(str, (space.size, space.width, space.within, space.across, space.alone))
            shown = ("–" if math.isnan(value) else f"{value:.3f}" for value in (space.similarity, space.lowest))
            table.add_row(space.name, space.tap, *counts, *shown)
        return table

    def summary(self) -> str:
        """One line: the cost of the merged network, of one source and of the ensemble."""
        one = next(iter(self.sources.values()))
        return (
            f"merged {_short(self.merged.flops)} FLOPs, {_short(self.merged.parameters)} parameters; "
            f"one source {_short(one.flops)}, {_short(one.parameters)}; "
            f"ensemble {_short(self.ensemble.flops)}, {_short(self.ensemble.parameters)}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.to_table()
        for line in (self.summary(), *self._fit_lines(), *self._shift_lines(), *self.notes):
            yield Text(line)

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=160).print(self)
        return buffer.getvalue()

    def show(self) -> None:
        """Print the report and its diagnosis: as wide as the terminal, or as plain text elsewhere."""
        console = Console()
        if console.is_terminal:
            console.print(self)
        else:
            print(self, end="")
        for finding in self.diagnose():
            print(f"Look at this: {finding}")

    def diagnose(self) -> list[Finding]:
        """Find what is likely to cost accuracy, and what to try.

        A finding is about spaces that are matched no better than at random (``"chance"``), too little calibration data
        (``"samples"``), features that are constant on it (``"dead"``), a task that loses more than another
        (``"crowded"``), a depth after which the models have little in common (``"collapse"``), or batch norms that
        re-estimation moved far (``"norms"``).

        Returns:
            The findings; none for a merge in which nothing stands out.
        """
        return diagnose(self.spaces, self.models, self.shifts)

    def _fit_lines(self) -> Iterator[str]:
        if self.fits:
            lowest = min(self.fits, key=self.fits.__getitem__)
            mean = sum(self.fits.values()) / len(self.fits)
            yield (
                f"{len(self.fits)} layers were fitted and explain {mean:.1%} of their targets on average, the least "
                f"{self.fits[lowest]:.1%} (`{lowest}`)."
            )

    def _shift_lines(self) -> Iterator[str]:
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
        """The report in a few numbers: means over spaces, layers or norms, and costs."""
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
        """Read what :meth:`to_dict` wrote."""
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
        """One row per space; numbers of one model are under ``losses/MODEL`` and ``dead/MODEL``."""
        rows = []
        for space in self.spaces:
            row = asdict(space) | {"alone": space.alone}
            for name in ("losses", "dead"):
                known = row.pop(name) or (None,) * len(self.models)
                row |= {f"{name}/{model}": value for model, value in zip(self.models, known, strict=True)}
            rows.append(row)
        return rows

    def to_csv(self) -> str:
        """:meth:`to_rows` as CSV, with a header; what was not measured is empty."""
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
        """Write the report to a JSON file; an existing file is replaced."""
        with replacing(Path(path)) as file:
            file.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MergeReport:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if the file holds no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a report that MergeReport.save wrote: {type(error).__name__}: {error}"
            ) from error


def _mean(values: Iterable[float]) -> float:
    """The mean; NaN without values."""
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from JSON, which has lists for tuples and null for NaN."""
    return {
        name: tuple(value) if isinstance(value, list) else math.nan if value is None else value
        for name, value in content.items()
    }


def _short(number: float) -> str:
    """A count with three digits and a unit."""
    for unit in ("", " k", " M", " G"):
        if float(f"{number:.3g}") < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
