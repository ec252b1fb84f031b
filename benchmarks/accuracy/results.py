"""Results: a CSV file with a row for each merge, and means over pairs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import get_type_hints


@dataclass(frozen=True)
class Row:
    """One merged network, or the ensemble of the sources.

    Attributes:
        group: the name of the :class:`~accuracy.experiments.Group`.
        pair: the name of the pair in the group.
        sources: a digest of the source networks' weights.
        stage: the paper's name of the cut; empty for the ensemble.
        matcher: the name of the matcher in the tables.
        setting: the hyperparameters of the matcher.
        refine: the name of the refinement.
        held_joint: joint accuracy on held-out training images, in percent; NaN for a matcher with only one setting.
        held_mean: the mean accuracy over tasks on these images.
        joint: joint accuracy on test images.
        mean: the mean accuracy over tasks on test images.
        tasks: accuracy of each task on test images, as text.
        flops: FLOPs of one forward pass of one image.
        parameters: number of parameters of the network.
        seconds: time of merging and evaluation.
    """

    group: str
    pair: str
    sources: str
    stage: str
    matcher: str
    setting: str
    refine: str
    held_joint: float
    held_mean: float
    joint: float
    mean: float
    tasks: str
    flops: int
    parameters: int
    seconds: float

    @property
    def key(self) -> tuple[str, ...]:
        """The fields that identify a row."""
        return astuple(self)[:7]


class Results:
    """The rows of a CSV file. A later row replaces an earlier row with the same key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        types = get_type_hints(Row)
        self.rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for record in csv.DictReader(file):
                    if None in record or None in record.values():
                        continue  # the incomplete last line of an interrupted run
                    row = Row(**{name: types[name](value) for name, value in record.items()})
                    self.rows[row.key] = row

    def add(self, row: Row) -> None:
        """Add a row, and write it to the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self.path.exists() and self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self.path.stat().st_size == 0:
                writer.writerow(field.name for field in fields(Row))
            elif not begun:
                file.write("\n")
            writer.writerow(astuple(row))
        self.rows[row.key] = row


@dataclass(frozen=True)
class Mean:
    """Mean accuracies and sample standard deviations of one merge method over the pairs of a group, in percent."""

    group: str
    stage: str
    matcher: str
    setting: str
    refine: str
    pairs: int
    joint: float
    joint_std: float
    mean: float
    mean_std: float
    flops: int
    parameters: int


def deviation(values: Sequence[float]) -> float:
    """Compute the sample standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def choose(rows: Iterable[Row]) -> list[list[Row]]:
    """Choose the best setting of the matcher on held-out images, for each merge method.

    Settings are compared by their mean joint accuracy over pairs. Settings with missing pairs are ignored.

    Returns:
        The rows of one group, stage, matcher and refinement, a row for each pair.
    """
    return [
        max(settings, key=lambda rows: statistics.fmean(row.held_joint for row in rows))
        for settings in by_way(rows).values()
    ]


def by_way(rows: Iterable[Row]) -> dict[tuple[str, ...], list[list[Row]]]:
    """Group the rows by group, stage, matcher and refinement, then by setting; keep settings with the most pairs."""
    ways: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        way = ways.setdefault((row.group, row.stage, row.matcher, row.refine), {})
        way.setdefault(row.setting, {})[row.pair] = row
    found = {}
    for way, settings in ways.items():
        most = max(map(len, settings.values()))
        found[way] = [list(by_pair.values()) for by_pair in settings.values() if len(by_pair) == most]
    return found


def average(rows: Sequence[Row]) -> Mean:
    """Average rows that differ only in the pair."""
    first = rows[0]
    joint, mean = [row.joint for row in rows], [row.mean for row in rows]
    return Mean(
        first.group,
        first.stage,
        first.matcher,
        first.setting,
        first.refine,
        len(rows),
        statistics.fmean(joint),
        deviation(joint),
        statistics.fmean(mean),
        deviation(mean),
        first.flops,
        first.parameters,
    )


def write_means(means: Sequence[Mean], path: Path) -> None:
    """Write the means to a CSV file, with accuracies to two decimals."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Mean)], lineterminator="\n")
        writer.writeheader()
        for row in means:
            writer.writerow({k: f"{v:.2f}" if isinstance(v, float) else v for k, v in asdict(row).items()})
