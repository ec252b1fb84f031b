"""Statistics of a calibration in a file: kept for other merges, taken up after an interruption, added up over sites."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_zipit._calibration.fingerprint import digest_operators, digest_tensors, fingerprint
from lightning_zipit._calibration.statistics import STATES, FeatureStatistics
from lightning_zipit._common.collectives import exchange, rank_and_size
from lightning_zipit._common.files import find_output_problem, replacing
from lightning_zipit._common.messages import inform_on_rank_zero
from lightning_zipit._common.views import Inputs, Sample, zeros_like_sample
from lightning_zipit.errors import ConfigurationError, StatisticsError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.notes import read_barriers

FORMAT = 3
"""Raised with every change of what the numbers in a file are: one that does not say all of it could be misread."""

HEADER = "lightning_zipit"

GATHER_ANEW = "delete the file, or name another, to gather anew."

SAVE_EVERY = 30.0
"""Seconds of calibration that an interruption may cost."""


@dataclass(frozen=True)
class CalibrationStatistics:
    """What calibrations of the same networks have gathered.

    Statistics that were gathered at several sites, or from parts of the data, add up to those of all of it.

    Attributes:
        fingerprints: per task, a digest of the network that it was gathered from.
        input_shape: the shape of one sample.
        input_dtype: the type of the samples, such as ``"float32"``.
        barriers: nodes of the networks that cannot be merged, as :attr:`MergeGraph.barriers` has them.
        statistics: by tap, the features of all networks side by side.
        seen: how many samples of each loader are in them, of a calibration that has not ended yet; else empty.
        cuts: where they serve merges with several ``stop_at`` (``""`` for ``None``), the barriers of each.
        start_at: the module that the trunk starts at; ``None`` for the input.
        views: type and shape of a sample of each network, where each has a view of its own; else empty.
        positions: how many positions of each sample they are of; ``None`` for all.
        verified: whether the table of axes was proved on the first batch.
        operators: per task, a digest of what its network computes with its weights.

    Example:
        >>> import torch
        >>> import lightning_zipit as zipit
        >>> def gather(path):
        ...     settings = zipit.MergeSettings(statistics=path)
        ...     zipit.merge_backbones(networks, torch.randn(2, 8, 3), settings)
        >>> networks = {task: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for task in "ab"}
        >>> folder = getfixture("tmp_path")
        >>> gather(folder / "here.safetensors")
        >>> gather(folder / "there.safetensors")
        >>> here, there = (CalibrationStatistics.load(folder / f"{name}.safetensors") for name in ("here", "there"))
        >>> joint = here + there
        >>> joint.count
        32
        >>> joint.save(folder / "joint.safetensors")
    """

    fingerprints: dict[str, str]
    input_shape: tuple[int, ...]
    input_dtype: str
    barriers: dict[str, str]
    statistics: dict[str, FeatureStatistics]
    seen: dict[int, int] = field(default_factory=dict)
    cuts: dict[str, dict[str, str]] = field(default_factory=dict)
    start_at: str | None = None
    views: tuple[Sample, ...] = ()
    positions: int | None = None
    verified: bool = False
    operators: dict[str, str] = field(default_factory=dict)

    def barriers_of(self, stop_at: str | None) -> dict[str, str]:
        """The nodes that cannot be merged in a merge with this ``stop_at``."""
        return self.cuts.get(stop_at or "", self.barriers)

    @property
    def count(self) -> int:
        """The largest number of samples (images × positions) that any of the statistics has."""
        return max((int(each.count) for each in self.statistics.values()), default=0)

    @property
    def example(self) -> Tensor:
        """Zeros of the shape and type of one sample, ``(1, …)``."""
        return zeros_like_sample((self.input_dtype, self.input_shape))

    def example_of(self, tasks: Sequence[str]) -> Inputs:
        """:attr:`example`, or that of each task where each has a view of its own.

        Raises:
            StatisticsError: if there is not one view for each task.
        """
        if not self.views:
            return self.example.clone()
        if len(self.views) != len(tasks):
            raise StatisticsError(f"The statistics are of {len(self.views)} views of a sample, for {len(tasks)} tasks.")
        return {task: zeros_like_sample(view).clone() for task, view in zip(tasks, self.views, strict=True)}

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of the samples of both.

        Raises:
            StatisticsError: if they belong to other networks, or were gathered in another way.
        """
        for attribute, what in (
            ("fingerprints", "networks"),
            ("input_shape", "inputs of the shape"),
            ("input_dtype", "inputs of the type"),
            ("barriers", "networks with the barriers"),
            ("cuts", "merges with the cuts"),
            ("start_at", "merges with start_at"),
            ("views", "views"),
            ("positions", "merges with positions"),
            ("operators", "networks with the operators"),
        ):
            mine, theirs = getattr(self, attribute), getattr(other, attribute)
            if mine != theirs:
                raise StatisticsError(
                    f"Statistics of {what} {mine} cannot be added to those of {what} {theirs}: gather both alike."
                )
        if set(self.statistics) != set(other.statistics):
            raise StatisticsError("Statistics of other spaces cannot be added: gather both with the same `stop_at`.")
        if self.seen or other.seen:
            raise StatisticsError("Statistics of a calibration that has not ended cannot be added to others.")
        joint = {tap: mine + other.statistics[tap] for tap, mine in self.statistics.items()}
        return replace(self, statistics=joint, verified=self.verified and other.verified)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; one that is there is replaced once the new one is complete.

        Raises:
            ConfigurationError: if there is no such folder.
            OSError: if the file cannot be written.
        """
        if problem := find_output_problem(path, "statistics"):
            raise ConfigurationError(problem)
        tensors = {
            f"{tap}.{name}": getattr(statistics, name).detach().cpu().contiguous()
            for tap, statistics in self.statistics.items()
            for name in STATES
        }
        header = {
            "format": FORMAT,
            "fingerprints": self.fingerprints,
            "input_shape": list(self.input_shape),
            "input_dtype": self.input_dtype,
            "barriers": self.barriers,
            "seen": {str(loader): samples for loader, samples in self.seen.items()},
            "cuts": self.cuts,
            "start_at": self.start_at,
            "views": [[dtype, list(shape)] for dtype, shape in self.views],
            "positions": self.positions,
            "verified": self.verified,
            "operators": self.operators,
        }
        text = json.dumps({**header, "digest": digest_tensors(tensors, json.dumps(header, sort_keys=True))})
        with replacing(Path(path)) as file:
            save_file(tensors, file, {HEADER: text})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStatistics:
        """Read a file that :meth:`save` wrote; nothing in it is executed.

        Raises:
            StatisticsError: if the file is missing, damaged, or of another format.
        """
        if not Path(path).is_file():
            raise StatisticsError(f"There is no statistics file {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            digest = header.pop("digest")
            if header["format"] != FORMAT:
                raise ValueError(f"it has format {header['format']}, and this version reads format {FORMAT}")
            if digest != digest_tensors(tensors, json.dumps(header, sort_keys=True)):
                raise ValueError("its content has changed since it was written")
            known = cls(
                {str(task): str(digest) for task, digest in header["fingerprints"].items()},
                tuple(int(size) for size in header["input_shape"]),
                str(header["input_dtype"]),
                read_barriers(header["barriers"]),
                _restore(tensors, len(header["fingerprints"])),
                {int(loader): int(samples) for loader, samples in header["seen"].items()},
                {str(stop_at): dict(barriers) for stop_at, barriers in header["cuts"].items()},
                header["start_at"],
                tuple((str(dtype), tuple(map(int, shape))) for dtype, shape in header["views"]),
                header["positions"],
                bool(header["verified"]),
                {str(task): str(digest) for task, digest in header["operators"].items()},
            )
            for dtype, shape in ((known.input_dtype, known.input_shape), *known.views):
                if not zeros_like_sample((dtype, shape)).numel():
                    raise ValueError(f"samples of the shape {shape} hold nothing")
        except Exception as error:  # whatever a damaged file makes of its parts
            raise StatisticsError(
                f"{path} cannot be read as a statistics file: {error}. Delete it, or name another, to gather anew."
            ) from error
        return known


def _restore(tensors: Mapping[str, Tensor], num_models: int) -> dict[str, FeatureStatistics]:
    restored = {}
    for tap in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        states = {name: tensors[f"{tap}.{name}"] for name in STATES}
        restored[tap] = FeatureStatistics([len(states["origin"]) // num_models] * num_models)
        restored[tap].merge_state(states)
        if not all(tensor.isfinite().all() for tensor in states.values()):
            raise ValueError(f"the statistics of {tap} are not finite")
    return restored


class StatisticsRecord:
    """Keeps the statistics of one calibration in a file.

    A complete file stands for the calibration. While one is under way, every process keeps what it has gathered in a
    file of its own beside it, to go on from there after an interruption.

    Args:
        path: the file.
        networks: the source networks by task.

    Raises:
        StatisticsError: if a file that is there cannot be read, or belongs to other networks.
        ConfigurationError: if the file cannot be written, or is not the same for all processes.

    Attributes:
        complete: what the file holds, if it is there.
        resumed: what this process had gathered before it was interrupted.
    """

    def __init__(self, path: str | Path, networks: Mapping[str, nn.Module]) -> None:
        self.path = Path(path)
        if problem := find_output_problem(self.path, "statistics"):
            raise ConfigurationError(problem)
        self.fingerprints = {task: fingerprint(network) for task, network in networks.items()}
        rank, processes = rank_and_size()
        self._own = self.path.with_name(f"{self.path.stem}.part-{rank}-of-{processes}{self.path.suffix}")
        others = [found for found in self.path.parent.glob(f"{self.path.stem}.part-*-of-*{self.path.suffix}")]
        strangers = [found.name for found in others if not found.stem.endswith(f"-of-{processes}")]
        there = exchange(self.path.is_file)
        if len(set(there)) > 1:
            raise ConfigurationError(
                f"Only some of the processes see {self.path}: put `statistics` on a file system that all nodes share."
            )
        if strangers and not there[0]:
            raise ConfigurationError(
                f"{strangers[0]} holds what a calibration with another number of processes had gathered: start as "
                "many to go on from there, or delete such files to begin anew."
            )
        self.complete = self._read(self.path) if there[0] else None
        self.resumed = self._read(self._own) if self.complete is None and self._own.is_file() else None
        self._saved = time.monotonic()
        if self.complete is not None:
            inform_on_rank_zero(f"The statistics are taken from {self.path}; nothing is calibrated.")
        elif self.resumed is not None:
            inform_on_rank_zero(f"The calibration goes on after {sum(self.resumed.seen.values())} samples.")

    def _read(self, path: Path) -> CalibrationStatistics:
        known = CalibrationStatistics.load(path)
        way_out = "Delete it, or name another, to gather anew."
        if list(known.fingerprints.values()) != list(self.fingerprints.values()):
            raise StatisticsError(
                f"{path} holds statistics of other networks (of tasks {list(known.fingerprints)}): the weights of "
                f"{_changed(known.fingerprints, self.fingerprints)} are not those that they were gathered from. "
                f"{way_out}"
            )
        if path == self.path and known.seen:
            raise StatisticsError(f"{path} holds a part of a calibration only. {way_out}")
        return known

    def check_settings(self, verify: bool, **settings: Any) -> None:
        """Compare what a merge is asked to do with what the files were gathered for.

        Args:
            verify: whether the table of axes shall be proved: without a calibration, it is not.
            settings: by the names that they have in the files, those that the numbers in these depend on.

        Raises:
            StatisticsError: if they were gathered for others.
        """
        for known in (self.complete, self.resumed):
            for name, wanted in settings.items() if known is not None else ():
                if (found := getattr(known, name)) != wanted:
                    raise StatisticsError(
                        f"{self.path} was gathered with {name}={found!r}, and this merge has {name}={wanted!r}. "
                        f"Merge with {name}={found!r}, or {GATHER_ANEW}"
                    )
        if verify and self.complete is not None and not self.complete.verified:
            raise StatisticsError(
                f"{self.path} was gathered with verify=False, so that its table of axes was never proved. Merge with "
                f"verify=False, too, or {GATHER_ANEW}"
            )

    def check_operators(self, graphs: Mapping[str, MergeGraph]) -> None:
        """Compare what the networks compute with what those computed that the files were gathered from.

        Args:
            graphs: the merge graph of each network, in the order of the tasks.

        Raises:
            StatisticsError: if they compute something else, with the same weights.
        """
        found = {task: digest_operators(graph) for task, graph in graphs.items()}
        for known in (self.complete, self.resumed):
            if known is not None and list(known.operators.values()) != list(found.values()):
                raise StatisticsError(
                    f"{self.path} was gathered from networks that computed something else: the operators of "
                    f"{_changed(known.operators, found)}, or their arguments, have changed. To go on, undo that, or "
                    f"{GATHER_ANEW}"
                )

    def is_known(self, loader: int, before: int, samples: int) -> bool:
        """Whether a batch is in the statistics that were resumed.

        Args:
            loader: the number of its loader.
            before: how many samples that loader has given before it.
            samples: how many it has.

        Raises:
            StatisticsError: if it is in part.
        """
        known = self.resumed.seen.get(loader, 0) if self.resumed is not None else 0
        if before < known < before + samples:
            raise StatisticsError(
                f"The batches are not those of the calibration that was interrupted: {known} samples of loader "
                f"{loader} were seen, which is not the end of a batch now. Use the same batch size, or delete "
                f"{self._own} to begin anew."
            )
        return before < known

    def keep(self, gathered: Callable[[], CalibrationStatistics]) -> None:
        """Save what this process has gathered so far, if the last time is long ago."""
        if time.monotonic() - self._saved >= SAVE_EVERY:
            gathered().save(self._own)
            self._saved = time.monotonic()

    def discard(self) -> None:
        """Delete the file of this process alone."""
        self._own.unlink(missing_ok=True)


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    if len(old) != len(new):
        return f"{len(new)} tasks instead of {len(old)}"
    pairs = zip(old.values(), new.items(), strict=True)
    return ", ".join(repr(task) for before, (task, after) in pairs if before != after)
