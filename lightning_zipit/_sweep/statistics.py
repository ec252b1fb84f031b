"""Statistics files of a sweep."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lightning_zipit._calibration.statistics_file import CalibrationStatistics
from lightning_zipit._phases.calibrate import as_measured, memory_of
from lightning_zipit.graph import MergeGraph
from lightning_zipit.settings import MergeSettings


@dataclass(frozen=True)
class Content:
    """Cuts and taps that a statistics file covers.

    Attributes:
        cuts: the last modules of the trunks; empty if the file serves a single merge.
        taps: the keys of the measured taps.
    """

    cuts: frozenset[str]
    taps: frozenset[str]


class StatisticsFiles:
    """The statistics file of each setting of a sweep.

    One file serves all settings. If later settings need statistics that a complete file lacks, these are gathered into
    a second file in the same folder, and so on. Each ``start_at`` has its own files, because a stem changes which
    features are measured.

    Args:
        path: the first file for settings without ``start_at``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._graphs: dict[tuple[str | None, str | None], MergeGraph] = {}
        self._contents: dict[Path, Content] = {}
        self._assigned: dict[tuple[str | None, str | None, frozenset[str]], Path] = {}

    def candidate(self, settings: MergeSettings) -> Path:
        """Return the first complete file that covers the cut of a setting, otherwise the file to write."""
        return next(iter(self._gathered_for(settings)), self._unwritten(settings.start_at))

    def assign(self, settings: MergeSettings, graph: MergeGraph | None) -> None:
        """Assign a file to a setting, before any file is written.

        Args:
            settings: the setting.
            graph: the merge graph of the setting's cut; ``None`` if it is unknown.
        """
        if graph is not None:
            self._graphs[settings.start_at, settings.stop_at] = graph
        taps = self._taps_of(settings)
        complete = [file for file in self._gathered_for(settings) if taps <= self._content(file).taps]
        self._assigned[settings.start_at, settings.stop_at, taps] = next(
            iter(complete), self._unwritten(settings.start_at)
        )

    def of(self, settings: MergeSettings) -> Path:
        """Return the file that was assigned to a setting."""
        key = settings.start_at, settings.stop_at, self._taps_of(settings)
        return self._assigned.get(key) or self.candidate(settings)

    def bytes_to_gather(self, settings: Collection[MergeSettings], num_models: int) -> int:
        """Compute the memory in bytes for the largest file to write, as far as the merge graphs are known."""
        sizes = [0]
        for file in {self.of(each) for each in settings}:
            merges = [
                (self._graphs[each.start_at, each.stop_at], each)
                for each in settings
                if self.of(each) == file and (each.start_at, each.stop_at) in self._graphs
            ]
            if merges and not file.is_file():
                sizes.append(memory_of(merges, num_models))
        return max(sizes)

    def _names(self, start_at: str | None) -> Iterator[Path]:
        start = "" if start_at is None else ".from-" + re.sub(r"[^\w.]", "_", start_at)
        for number in count(1):
            more = f".{number}" if number > 1 else ""
            yield self.path.with_name(f"{self.path.stem}{start}{more}{self.path.suffix}")

    def _unwritten(self, start_at: str | None) -> Path:
        return next(file for file in self._names(start_at) if not file.is_file())

    def _gathered_for(self, settings: MergeSettings) -> Iterator[Path]:
        """Find the complete files that cover the cut of a setting."""
        for file in self._names(settings.start_at):
            if not file.is_file():
                return
            cuts = self._content(file).cuts
            if not cuts or (settings.last_module or "") in cuts:
                yield file

    def _content(self, file: Path) -> Content:
        if file not in self._contents:
            known = CalibrationStatistics.load(file)
            self._contents[file] = Content(frozenset(known.cuts), frozenset(known.statistics))
        return self._contents[file]

    def _taps_of(self, settings: MergeSettings) -> frozenset[str]:
        """Return the keys of the taps that a merge measures; an empty set if its merge graph is unknown."""
        graph = self._graphs.get((settings.start_at, settings.stop_at))
        spaces = () if graph is None else as_measured(graph, settings).spaces.values()
        return frozenset(space.tap.key for space in spaces if space.tap is not None)
