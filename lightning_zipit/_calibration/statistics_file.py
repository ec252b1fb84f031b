"""Statistics files: reuse a calibration for other merges, resume it, and add up the statistics of several sites."""

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
from lightning_zipit._common.calls import Call
from lightning_zipit._common.collectives import exchange, rank_and_size
from lightning_zipit._common.files import find_output_problem, replacing
from lightning_zipit._common.messages import inform_on_rank_zero
from lightning_zipit._common.samples import Description, inputs_of
from lightning_zipit._common.views import Inputs, all_views
from lightning_zipit.errors import ConfigurationError, StatisticsError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.notes import read_barriers

FORMAT = 4
"""Version of the file format. Raise it with every change in the meaning of the content, so that no file is misread."""

HEADER = "lightning_zipit"

CALIBRATE_AGAIN = "delete the file, or give another path, to calibrate again."

SAVE_EVERY = 30.0
"""Seconds between two saves: the longest calibration time that an interruption can lose."""


@dataclass(frozen=True)
class CalibrationStatistics:
    """The statistics of a calibration, with everything that must match in another merge.

    Statistics from several sites, or from parts of the data, can be added. The sum equals the statistics of all data.

    Attributes:
        fingerprints: per task, a digest of the weights of its source network.
        inputs: a description of one sample: the structure of the arguments of the networks, and shapes and dtypes of
            tensors; ``None`` if it cannot be described.
        barriers: the nodes of the networks that cannot be merged; see :attr:`MergeGraph.barriers`.
        statistics: the statistics of all networks side by side, by tap key.
        seen: for an incomplete calibration, the number of samples by loader index; otherwise empty.
        cuts: for merges with several ``stop_at``, the barriers by ``stop_at`` (``""`` stands for ``None``).
        start_at: the module at which the trunk starts; ``None`` for the input.
        positions: the number of positions that were measured of each sample; ``None`` for all.
        verified: whether the table of axes was proved on the first batch.
        operators: per task, a digest of the operators of its network.

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
    inputs: Description | None
    barriers: dict[str, str]
    statistics: dict[str, FeatureStatistics]
    seen: dict[int, int] = field(default_factory=dict)
    cuts: dict[str, dict[str, str]] = field(default_factory=dict)
    start_at: str | None = None
    positions: int | None = None
    verified: bool = False
    operators: dict[str, str] = field(default_factory=dict)

    def barriers_of(self, stop_at: str | None) -> dict[str, str]:
        """Return the nodes that cannot be merged, by name, for a merge with this ``stop_at``."""
        return self.cuts.get(stop_at or "", self.barriers)

    @property
    def count(self) -> int:
        """The largest number of samples (images × positions) over all spaces."""
        return max((int(each.count) for each in self.statistics.values()), default=0)

    def example_of(self, tasks: Sequence[str]) -> Inputs:
        """Return one example for all tasks, or an example per task if each task has its own view.

        Raises:
            StatisticsError: if the number of views differs from the number of tasks, or samples are not described.
        """
        if self.inputs is None:
            raise StatisticsError(
                "The statistics file does not describe a sample, because the arguments of the networks are of types "
                "other than tuples, lists and dicts. Give such arguments with `get_input`, and calibrate again."
            )
        example = inputs_of(self.inputs)
        if isinstance(example, Call):
            return example
        if len(example) != len(tasks):
            raise StatisticsError(
                f"The statistics have {len(example)} views of a sample, but this merge has {len(tasks)} tasks."
            )
        return dict(zip(tasks, example.values(), strict=True))

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Return the statistics of the samples of both.

        Raises:
            StatisticsError: if they belong to different networks, or to different settings of a merge.
        """
        for attribute, what in (
            ("fingerprints", "networks"),
            ("inputs", "inputs"),
            ("barriers", "networks with the barriers"),
            ("cuts", "merges with the cuts"),
            ("start_at", "merges with start_at"),
            ("positions", "merges with positions"),
            ("operators", "networks with the operators"),
        ):
            mine, theirs = getattr(self, attribute), getattr(other, attribute)
            if mine != theirs:
                raise StatisticsError(
                    f"Statistics of {what} {mine} cannot be added to those of {what} {theirs}: calibrate both with the "
                    "same networks and settings."
                )
        if set(self.statistics) != set(other.statistics):
            raise StatisticsError(
                "Statistics of different feature spaces cannot be added: calibrate both with the same `stop_at`."
            )
        if self.seen or other.seen:
            raise StatisticsError(
                "Statistics of an incomplete calibration cannot be added: let both calibrations finish first."
            )
        joint = {tap: mine + other.statistics[tap] for tap, mine in self.statistics.items()}
        return replace(self, statistics=joint, verified=self.verified and other.verified)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. An existing file is replaced atomically.

        Raises:
            ConfigurationError: if the folder does not exist.
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
            "inputs": self.inputs,
            "barriers": self.barriers,
            "seen": {str(loader): samples for loader, samples in self.seen.items()},
            "cuts": self.cuts,
            "start_at": self.start_at,
            "positions": self.positions,
            "verified": self.verified,
            "operators": self.operators,
        }
        text = json.dumps({**header, "digest": digest_tensors(tensors, json.dumps(header, sort_keys=True))})
        with replacing(Path(path)) as file:
            save_file(tensors, file, {HEADER: text})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStatistics:
        """Read a file that :meth:`save` wrote. No code from the file is executed.

        Raises:
            StatisticsError: if the file is missing, damaged, or of another format.
        """
        if not Path(path).is_file():
            raise StatisticsError(f"The statistics file {path} does not exist.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            digest = header.pop("digest")
            if header["format"] != FORMAT:
                raise ValueError(f"it has format {header['format']}, but this version reads format {FORMAT}")
            if digest != digest_tensors(tensors, json.dumps(header, sort_keys=True)):
                raise ValueError("its content has changed since it was written")
            known = cls(
                {str(task): str(digest) for task, digest in header["fingerprints"].items()},
                header["inputs"],
                read_barriers(header["barriers"]),
                _restore(tensors, len(header["fingerprints"])),
                {int(loader): int(samples) for loader, samples in header["seen"].items()},
                {str(stop_at): dict(barriers) for stop_at, barriers in header["cuts"].items()},
                header["start_at"],
                header["positions"],
                bool(header["verified"]),
                {str(task): str(digest) for task, digest in header["operators"].items()},
            )
            if known.inputs is not None:
                _check_sample(known.inputs)
        except Exception as error:  # a damaged file can cause any error
            raise StatisticsError(
                f"{path} cannot be read as a statistics file: {error}. Delete the file, or give another path, to "
                "calibrate again."
            ) from error
        return known


def _check_sample(inputs: Description) -> None:
    if not all(tensor.numel() for view in all_views(inputs_of(inputs)) for tensor in view.tensors):
        raise ValueError("a sample is empty")


def _restore(tensors: Mapping[str, Tensor], num_models: int) -> dict[str, FeatureStatistics]:
    restored = {}
    for tap in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        states = {name: tensors[f"{tap}.{name}"] for name in STATES}
        restored[tap] = FeatureStatistics([len(states["origin"]) // num_models] * num_models)
        restored[tap].merge_state(states)
        if not all(tensor.isfinite().all() for tensor in states.values()):
            raise ValueError(f"the statistics of {tap} contain NaN or Inf")
    return restored


class StatisticsRecord:
    """The statistics file of one calibration.

    A complete file replaces the calibration. During a calibration, every process saves its own statistics to a partial
    file in the same folder. An interrupted calibration resumes from these files.

    Args:
        path: the path of the statistics file.
        networks: the source networks by task.

    Raises:
        StatisticsError: if an existing file cannot be read, or belongs to other networks.
        ConfigurationError: if the file cannot be written, or if only some of the processes see it.

    Attributes:
        complete: the content of the complete file, if it exists.
        resumed: the content of this process's partial file, if the calibration was interrupted.
    """

    def __init__(self, path: str | Path, networks: Mapping[str, nn.Module]) -> None:
        self.path = Path(path)
        if problem := find_output_problem(self.path, "statistics"):
            raise ConfigurationError(problem)
        self.fingerprints = {task: fingerprint(network) for task, network in networks.items()}
        rank, processes = rank_and_size()
        self._own = self.path.with_name(f"{self.path.stem}.part-{rank}-of-{processes}{self.path.suffix}")
        others = [found for found in self.path.parent.glob(f"{self.path.stem}.part-*-of-*{self.path.suffix}")]
        foreign = [found.name for found in others if not found.stem.endswith(f"-of-{processes}")]
        exists = exchange(self.path.is_file)
        if len(set(exists)) > 1:
            raise ConfigurationError(
                f"Only some of the processes see {self.path}: put `statistics` on a file system that all nodes share."
            )
        if foreign and not exists[0]:
            raise ConfigurationError(
                f"{foreign[0]} belongs to an interrupted calibration with another number of processes. Start the "
                "same number of processes to resume it, or delete its `.part-` files to calibrate again."
            )
        self.complete = self._read(self.path) if exists[0] else None
        self.resumed = self._read(self._own) if self.complete is None and self._own.is_file() else None
        self._saved = time.monotonic()
        if self.complete is not None:
            inform_on_rank_zero(f"Calibration is skipped: the statistics are read from {self.path}.")
        elif self.resumed is not None:
            inform_on_rank_zero(f"The calibration resumes after {sum(self.resumed.seen.values())} samples.")

    def _read(self, path: Path) -> CalibrationStatistics:
        known = CalibrationStatistics.load(path)
        remedy = "Delete the file, or give another path, to calibrate again."
        if list(known.fingerprints.values()) != list(self.fingerprints.values()):
            raise StatisticsError(
                f"{path} holds statistics of other networks (tasks {list(known.fingerprints)}): "
                f"{_difference('the weights', known.fingerprints, self.fingerprints)}. {remedy}"
            )
        if path == self.path and known.seen:
            raise StatisticsError(f"{path} holds an incomplete calibration. {remedy}")
        return known

    def check_settings(self, verify: bool, **settings: Any) -> None:
        """Compare the settings of a merge with the settings in the files.

        Args:
            verify: whether the merge requires a proof of the table of axes. A merge without calibration does not prove
                the table itself.
            settings: the settings on which the statistics depend, by their names in the files.

        Raises:
            StatisticsError: if a file was written with other settings.
        """
        for known in (self.complete, self.resumed):
            for name, wanted in settings.items() if known is not None else ():
                if (found := getattr(known, name)) != wanted:
                    raise StatisticsError(
                        f"{self.path} was written with {name}={found!r}, but this merge has {name}={wanted!r}. "
                        f"Merge with {name}={found!r}, or {CALIBRATE_AGAIN}"
                    )
        if verify and self.complete is not None and not self.complete.verified:
            raise StatisticsError(
                f"{self.path} was written with verify=False, so its table of axes was never proved. Merge with "
                f"verify=False, too, or {CALIBRATE_AGAIN}"
            )

    def check_operators(self, graphs: Mapping[str, MergeGraph]) -> None:
        """Compare the operators of the networks with the operators in the files.

        Args:
            graphs: the merge graph of each network by task, in the order of the tasks.

        Raises:
            StatisticsError: if the operators of a network have changed.
        """
        found = {task: digest_operators(graph) for task, graph in graphs.items()}
        for known in (self.complete, self.resumed):
            if known is not None and list(known.operators.values()) != list(found.values()):
                raise StatisticsError(
                    f"{self.path} was written for networks with other operators: "
                    f"{_difference('the operators or their arguments', known.operators, found)}. Restore the old "
                    f"operators, or {CALIBRATE_AGAIN}"
                )

    def is_known(self, loader: int, before: int, samples: int) -> bool:
        """Whether the resumed statistics include a batch.

        Args:
            loader: the index of the batch's loader.
            before: the number of samples of that loader before the batch.
            samples: the number of samples in the batch.

        Raises:
            StatisticsError: if the statistics include only a part of the batch.
        """
        known = self.resumed.seen.get(loader, 0) if self.resumed is not None else 0
        if before < known < before + samples:
            parts = self.path.with_name(f"{self.path.stem}.part-*{self.path.suffix}")
            raise StatisticsError(
                f"The batches differ from those of the interrupted calibration: it had seen {known} samples of loader "
                f"{loader}, which is not a batch boundary now. Use the same batch size, or delete the files {parts} to "
                "calibrate again."
            )
        return before < known

    def keep(self, current: Callable[[], CalibrationStatistics]) -> None:
        """Save the statistics of this process, if the last save was at least ``SAVE_EVERY`` seconds ago."""
        if time.monotonic() - self._saved >= SAVE_EVERY:
            current().save(self._own)
            self._saved = time.monotonic()

    def discard(self) -> None:
        """Delete the partial file of this process."""
        self._own.unlink(missing_ok=True)


def _difference(what: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describe the difference between the digests in a file and those of a merge, by task."""
    if len(old) != len(new):
        return f"this merge has {len(new)} tasks instead of {len(old)}"
    pairs = zip(old.values(), new.items(), strict=True)
    tasks = ", ".join(repr(task) for before, (task, after) in pairs if before != after)
    return f"{what} differ for the tasks {tasks}"
