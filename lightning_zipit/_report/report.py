"""Report of a merge: the matching per space, and the cost per network."""

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
    """Report of a merge: matching, fits, notes and cost.

    Attributes:
        spaces: the measurements of each feature space, in the order of the network.
        sources: the cost of each source network by task.
        merged: the cost of the merged network for all tasks together.
        notes: the parts that are matched by index instead of by activation, with reasons; see
            :attr:`MergeGraph.notes`.
        fits: for ``refine="least_squares"``, the ratio of its target's variance that each layer explains, in the order
            of the network. The name of a layer is ``trunk.`` or ``heads.TASK.`` plus its name in the backbone.
        models: the names of the models, in the order of ``losses`` and ``dead``. These are the tasks, unless a source
            is a merged model with several tasks.
        shifts: for ``refine="batch_norm"``, the change of the statistics of each batch norm by re-estimation. Norms
            are named like layers in ``fits``.
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
        """Return the matching of every space as a printable table."""
        table = Table()
        for heading in ("space", "read by", "features", "merged", "within", "across", "alone", "similarity", "lowest"):
            table.add_column(heading, justify="left" if heading in ("space", "read by") else "right", overflow="fold")
        for space in self.spaces:
            counts = map(str, (space.size, space.width, space.within, space.across, space.alone))
            shown = ("–" if math.isnan(value) else f"{value:.3f}" for value in (space.similarity, space.lowest))
            table.add_row(space.name, space.tap, *counts, *shown)
        return table

    def summary(self) -> str:
        """Return one line with the cost of the merged network, of one source and of the ensemble."""
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
        """Print the report and its diagnosis: with the width of the terminal, or as plain text without a terminal."""
        console = Console()
        if console.is_terminal:
            console.print(self)
        else:
            print(self, end="")
        for finding in self.diagnose():
            print(f"Possible problem: {finding}")

    def diagnose(self) -> list[Finding]:
        """Find likely causes of low accuracy, and suggest remedies.

        The kinds of findings are: spaces that are matched no better than at random (``"chance"``), too little
        calibration data (``"samples"``), features that are constant on the calibration data (``"dead"``), a task that
        loses more than another (``"crowded"``), a depth after which the models have little in common
        (``"collapse"``), and batch norms whose statistics changed strongly by re-estimation (``"norms"``).

        Returns:
            The findings; an empty list if no problem was found.
        """
        return diagnose(self.spaces, self.models, self.shifts)

    def _fit_lines(self) -> Iterator[str]:
        if self.fits:
            lowest = min(self.fits, key=self.fits.__getitem__)
            mean = sum(self.fits.values()) / len(self.fits)
            yield (
                f"{len(self.fits)} layers were fitted. They explain {mean:.1%} of the variance of their targets on "
                f"average, and at least {self.fits[lowest]:.1%} (`{lowest}`)."
            )

    def _shift_lines(self) -> Iterator[str]:
        if self.shifts:
            means = {name: shift.mean for name, shift in self.shifts.items()}
            ratios = {name: shift.variance for name, shift in self.shifts.items()}
            most, least = max(means, key=means.__getitem__), min(ratios, key=ratios.__getitem__)
            yield (
                f"{len(self.shifts)} batch norms were re-estimated. Their means moved by {_mean(means.values()):.2f} "
                f"standard deviations on average, and by at most {means[most]:.2f} (`{most}`). Their variances are "
                f"{_mean(ratios.values()):.2f} times the merged ones on average, and at least {ratios[least]:.2f} "
                f"times (`{least}`)."
            )

    def metrics(self) -> dict[str, float]:
        """Summarise the report as scalar metrics: means over spaces, layers or norms, and costs."""
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
        """Convert the report to dicts, lists and numbers."""
        lists = {"notes": list(self.notes), "models": list(self.models)}
        return asdict(self) | lists | {"spaces": [asdict(space) for space in self.spaces]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """Create a report from the result of :meth:`to_dict`."""
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
        """Convert to one row per space. Values of one model have the keys ``losses/MODEL`` and ``dead/MODEL``."""
        rows = []
        for space in self.spaces:
            row = asdict(space) | {"alone": space.alone}
            for name in ("losses", "dead"):
                known = row.pop(name) or (None,) * len(self.models)
                row |= {f"{name}/{model}": value for model, value in zip(self.models, known, strict=True)}
            rows.append(row)
        return rows

    def to_csv(self) -> str:
        """Convert :meth:`to_rows` to CSV with a header. Values that were not measured are empty."""
        rows = [{name: "" if value != value else value for name, value in row.items()} for row in self.to_rows()]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=[*rows[0]] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    def to_json(self) -> str:
        """Convert :meth:`to_dict` to JSON. Values that were not measured are null."""
        return json.dumps(_without_nan(self.to_dict()), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file. An existing file is replaced atomically."""
        with replacing(Path(path)) as file:
            file.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MergeReport:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: if the file is not a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a report that MergeReport.save wrote: {type(error).__name__}: {error}"
            ) from error


def _mean(values: Iterable[float]) -> float:
    """Compute the mean; NaN without values."""
    known = list(values)
    return sum(known) / len(known) if known else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of a dataclass from JSON: lists to tuples, null to NaN."""
    return {
        name: tuple(value) if isinstance(value, list) else math.nan if value is None else value
        for name, value in content.items()
    }


def _short(number: float) -> str:
    """Format a count with three digits and a unit."""
    for unit in ("", " k", " M", " G"):
        if float(f"{number:.3g}") < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
