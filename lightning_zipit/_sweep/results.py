"""Results of a sweep: one row per setting, the Pareto front, and the CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_zipit._calibration.fingerprint import digest_tensors
from lightning_zipit._common.files import locked, replacing
from lightning_zipit._common.options import options_of
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.settings import MergeSettings

if TYPE_CHECKING:
    from lightning_zipit._lightning.multihead import MultiHeadModule

Mode = Literal["max", "min"]
SETTINGS = tuple(name for name, declared in options_of(MergeSettings).items() if declared.column)
COSTS = ("total_flops", "relative_flops", "total_parameters")
WAY_OUT = "Delete the file, or give another file as `results`."


@dataclass(frozen=True)
class SweepRow:
    """The result of one setting.

    Attributes:
        settings: the options of the merge; ``None`` for the ensemble of the sources.
        metrics: the metrics by name; empty if the merge failed.
        flops: the FLOPs of one sample, for all tasks together.
        relative_flops: the FLOPs as a ratio to one source.
        parameters: the number of parameters.
        error: the error if the merge failed, otherwise empty.
    """

    settings: MergeSettings | None
    metrics: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    relative_flops: float = float("nan")
    parameters: int = 0
    error: str = ""


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the Pareto-optimal points (lower cost, higher value).

    Args:
        costs: the cost of each point.
        values: the value of each point; NaN for no result.

    Returns:
        The indices in the order of cost. Of equal points, only the first is included.

    Example:
        >>> pareto_front([3.0, 1.0, 2.0, 2.0], [0.9, 0.5, 0.4, 0.8])
        [1, 3, 0]
    """
    front: list[int] = []
    known = [number for number, value in enumerate(values) if value == value]
    for number in sorted(known, key=lambda number: (costs[number], -values[number])):
        if not front or values[number] > values[front[-1]]:
            front.append(number)
    return front


@dataclass(frozen=True)
class SweepResult:
    """The rows of a sweep.

    Attributes:
        rows: one row per setting, in the order of the grid or the search.
        metric: the name of the metric that ranks the settings.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower metric is better.
        ensemble: the row of the unmerged source models, for comparison.
        missing: the number of settings that other processes, with other shares, have not finished yet.
    """

    rows: tuple[SweepRow, ...]
    metric: str
    mode: Mode = "max"
    ensemble: SweepRow | None = None
    missing: int = 0
    _merge: Callable[[MergeSettings], MultiHeadModule] | None = field(default=None, repr=False, compare=False)

    @property
    def pareto(self) -> tuple[SweepRow, ...]:
        """The Pareto-optimal rows (better metric, fewer FLOPs), in ascending order of FLOPs."""
        sign = 1 if self.mode == "max" else -1
        values = [sign * row.metrics.get(self.metric, float("nan")) for row in self.rows]
        return tuple(self.rows[number] for number in pareto_front([row.flops for row in self.rows], values))

    @property
    def best(self) -> SweepRow:
        """The row with the best metric; among equal rows, the one with the fewest FLOPs.

        Raises:
            ConfigurationError: if no setting has a result.
        """
        if not self.pareto:
            raise ConfigurationError("No setting of the sweep has a result. See `error` of the rows for the reasons.")
        return self.pareto[-1]

    def merge(self, row: SweepRow | None = None) -> MultiHeadModule:
        """Repeat the merge of a row, from the statistics of the sweep.

        Args:
            row: the row; by default the best row.

        Returns:
            The merged module. It is also attached to the Trainer.

        Raises:
            ConfigurationError: if the row is the ensemble, or no setting has a result.
        """
        settings = (row or self.best).settings
        if settings is None or self._merge is None:
            raise ConfigurationError(
                "This row is not a merge of this sweep. Give one of the `rows` of a result that ZipIt.sweep returned."
            )
        return self._merge(settings)

    def to_table(self, rows: Sequence[SweepRow] | None = None) -> Table:
        """Make a table of rows with the options that differ.

        Args:
            rows: the rows; by default the Pareto front and the ensemble.
        """
        if rows is None:
            rows = [*self.pareto, *([self.ensemble] if self.ensemble is not None else [])]
        table = Table()
        texts = [as_columns(row.settings) for row in self.rows if row.settings is not None]
        varied = [name for name in SETTINGS if len({text[name] for text in texts}) > 1]
        metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
        for heading in varied or ["setting"]:
            table.add_column(heading, overflow="fold")
        for heading in (*metrics, "MFLOPs", "× one source"):
            table.add_column(heading, justify="right")
        for row in rows:
            text = as_columns(row.settings) if row.settings is not None else {}
            named = [text.get(name, "") for name in varied[1:]]
            first = text.get(varied[0], "") if varied and text else "merged" if text else "ensemble"
            numbers = [f"{row.metrics.get(name, float('nan')):.4f}" for name in metrics]
            costs = [f"{row.flops / 1e6:.2f}", f"{row.relative_flops:.2f}"]
            cells = [first, *named, *([f"error: {row.error}"] if row.error else [*numbers, *costs])]
            table.add_row(*map(escape, cells))
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=140)
        console.print(self.to_table())
        failed = sum(bool(row.error) for row in self.rows)
        more = f"; {failed} failed" * bool(failed) + f"; {self.missing} are not finished yet" * bool(self.missing)
        console.print(
            f"{len(self.pareto)} of {len(self.rows)} settings are Pareto-optimal in {self.metric} and FLOPs{more}."
        )
        return buffer.getvalue()

    def plot(self) -> tuple[Any, Any]:
        """Plot the metric over FLOPs, with a line through the Pareto front. This needs matplotlib.

        Returns:
            Figure and axes.

        Raises:
            ConfigurationError: if matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ConfigurationError("`plot` needs matplotlib: pip install 'lightning-zipit[plots]'.") from error
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        groups: dict[str, list[SweepRow]] = {}
        for row in self.rows:
            if row.settings is not None and not row.error:
                groups.setdefault(as_columns(row.settings)["stop_at"], []).append(row)
        for name, rows in groups.items():
            axes.scatter(*self._points(rows), label=f"stop_at {name}", s=25)
        if self.ensemble is not None:
            axes.scatter(*self._points([self.ensemble]), label="ensemble", marker="*", color="black", s=80)
        axes.plot(*self._points(self.pareto), color="gray", linewidth=1, zorder=0, label="Pareto front")
        axes.set(xlabel="MFLOPs for one sample", ylabel=self.metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure, axes

    def _points(self, rows: Sequence[SweepRow]) -> tuple[list[float], list[float]]:
        return [row.flops / 1e6 for row in rows], [row.metrics[self.metric] for row in rows]


def as_columns(settings: MergeSettings) -> dict[str, str]:
    """Return the settings as text, by column. These texts identify a row of a sweep."""
    return {name: to_text(getattr(settings, name)) for name in SETTINGS}


def to_text(value: Any) -> str:
    """Return a text that identifies the value of an option."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    items = getattr(value, "__dict__", {})
    # The text of a large tensor leaves entries out: a digest tells two tensors apart.
    tensors = {name: digest_tensors({name: item}) for name, item in items.items() if isinstance(item, Tensor)}
    if type(value).__repr__ is not object.__repr__ and not tensors:
        return repr(value)
    shown = (f"{name}={tensors[name] if name in tensors else repr(item)}" for name, item in items.items())
    return f"{type(value).__name__}({', '.join(shown)})"


class ResultsFile:
    """CSV file of the rows. Several processes may write to it, and it is valid after each row.

    Columns are read by name. An option without a column has its default value. Unknown columns, such as columns of
    another version, are kept.

    Args:
        path: the file.
        models: a digest of everything that the rows depend on, except their settings.
        metrics: the names of the metrics.

    Raises:
        ConfigurationError: if the file exists and cannot be read, has no column for a metric, or belongs to other
            models.
    """

    def __init__(self, path: str | Path, models: str, metrics: Sequence[str]) -> None:
        self.path, self.models, self.metrics = Path(path), models, tuple(metrics)
        self.columns = ("models", "network", *SETTINGS, *self.metrics, *COSTS, "error")
        self._unknown: tuple[str, ...] = ()  # columns
        self._records: dict[tuple[str, ...], dict[str, str]] = {}
        self.read()

    def read(self) -> None:
        """Read the current rows of the file, including rows of other processes."""
        self._records |= self._in_file()

    def _in_file(self) -> dict[tuple[str, ...], dict[str, str]]:
        if not self.path.exists():
            return {}
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                records, header = list(reader), tuple(reader.fieldnames or ())
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The results file {self.path} cannot be read: {error}. {WAY_OUT}") from error
        self._check(header, records)
        self._unknown = tuple(name for name in header if name not in self.columns)
        keyed = [(self._key(complete), complete) for complete in map(self._with_defaults, records)]
        times = Counter(key for key, _ in keyed)
        # If rows differ only in unknown columns, it is unknown which of them belongs to these settings.
        return {key: record for key, record in keyed if times[key] == 1}

    def _check(self, header: Sequence[str], records: Sequence[Mapping[str, str]]) -> None:
        if missing := [name for name in self.columns if name not in header and name not in SETTINGS]:
            raise ConfigurationError(
                f"The results file {self.path} lacks the columns {', '.join(map(repr, missing))} of this sweep. "
                f"{WAY_OUT}"
            )
        if any(record["models"] != self.models for record in records):
            raise ConfigurationError(
                f"The results file {self.path} belongs to other models: their weights, tasks, `backbone`, `base` or "
                f"`classes` differ. {WAY_OUT}"
            )
        for number, record in enumerate(records, 2):
            try:
                if None in record:
                    raise ValueError("it has more cells than columns")
                self._to_row(record, None)
            except (TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"Line {number} of the results file {self.path} cannot be read: {error}. {WAY_OUT}"
                ) from error

    def _with_defaults(self, record: Mapping[str, str]) -> dict[str, str]:
        """Fill in the defaults of options that have no column."""
        defaults = as_columns(MergeSettings()) if record["network"] == "merged" else dict.fromkeys(SETTINGS, "")
        return {**defaults, **record}

    def _key(self, record: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(record[name] for name in ("network", *SETTINGS))

    def _record(self, row: SweepRow) -> dict[str, str]:
        settings = dict.fromkeys(SETTINGS, "") if row.settings is None else as_columns(row.settings)
        numbers = (row.flops, row.relative_flops, row.parameters)
        return {
            "models": self.models,
            "network": "ensemble" if row.settings is None else "merged",
            **settings,
            **{name: str(row.metrics.get(name, "")) for name in self.metrics},
            **{name: "" if row.error else str(number) for name, number in zip(COSTS, numbers, strict=True)},
            "error": " ".join(row.error.split()),
        }

    def _to_row(self, record: Mapping[str, str], settings: MergeSettings | None) -> SweepRow:
        if record["error"]:
            return SweepRow(settings, error=record["error"])
        metrics = {name: float(record[name]) for name in self.metrics}
        flops, relative, parameters = (record[name] for name in COSTS)
        return SweepRow(settings, metrics, int(flops), float(relative), int(parameters))

    def find(self, settings: MergeSettings | None) -> SweepRow | None:
        """Return the row of a setting, or with ``None`` the row of the ensemble; ``None`` if it does not exist yet."""
        record = self._records.get(self._key(self._record(SweepRow(settings))))
        return None if record is None else self._to_row(record, settings)

    def keep(self, row: SweepRow, write: bool = True) -> None:
        """Add a row, or replace the row with the same settings.

        Args:
            row: the row.
            write: also write the file. Only one process of a process group does this.
        """
        record = self._record(row)
        self._records[self._key(record)] = record
        if write:
            with locked(self.path):
                # Rows of other processes stay out of `_records`, because all ranks must find the same rows.
                stored = self._in_file()
                self._write([*{**stored, **self._records, **stored, self._key(record): record}.values()])

    def _write(self, records: Sequence[Mapping[str, str]]) -> None:
        columns = [*self.columns[:-1], *self._unknown, "error"]
        with replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(records)
