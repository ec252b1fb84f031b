"""Many merges of the same models, from one calibration: which setting is worth its cost."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_zipit._lightning import unsupported_strategy
from lightning_zipit.calibration import statistics_bytes
from lightning_zipit.collectives import share
from lightning_zipit.errors import CalibrationError, ConfigurationError, StatisticsError, ZipItError
from lightning_zipit.files import find_output_problem
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.taps import tapped_by_all
from lightning_zipit.matchers import GreedyZip
from lightning_zipit.metrics import JointAccuracy
from lightning_zipit.module import ZipItModule
from lightning_zipit.multihead import Ensemble, MultiHeadModule, MultiTaskModule
from lightning_zipit.report import Cost, MergeReport
from lightning_zipit.session import as_measured
from lightning_zipit.settings import MergeSettings, default_matcher
from lightning_zipit.statistics_file import fingerprint
from lightning_zipit.sweep_result import Mode, ResultsFile, SweepResult, SweepRow, describe

TARGET_KEYS = ("label", "labels", "target", "targets", "y")


def grid(choices: Mapping[str, Any], **fixed: Any) -> list[MergeSettings]:
    """Every combination of the choices.

    Args:
        choices: from an argument of :class:`~lightning_zipit.MergeSettings` to one value, or to a list of those to try;
            ``alpha`` and ``beta`` stand for ``matcher=GreedyZip(alpha, beta)``.
        fixed: what all have in common.

    Returns:
        The settings, without repetition; the last choice changes fastest.

    Raises:
        ConfigurationError: with all that is wrong with any of them.

    Example:
        >>> settings = grid({"stop_at": ["layer1", None], "alpha": [0.1, 0.5], "refine": None})
        >>> [(each.stop_at, each.matcher.alpha) for each in settings]
        [('layer1', 0.1), ('layer1', 0.5), (None, 0.1), (None, 0.5)]
    """
    listed = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in choices.items()}
    problems = [
        f"`{name}` lists nothing to try: give one value at least." for name, tried in listed.items() if not tried
    ]
    greedy = {name: listed.pop(name, [None]) for name in ("alpha", "beta")}
    greedy = {name: tried for name, tried in greedy.items() if tried != [None]}
    if greedy and listed.get("matcher", [None]) != [None]:
        problems.append("`alpha` and `beta` are those of GreedyZip: give them, or `matcher`, not both.")
    elif greedy:
        listed["matcher"] = [matcher for chosen in _product(greedy) for matcher in _make(GreedyZip, chosen, problems)]
    settings: list[MergeSettings] = []
    for chosen in _product(listed) if not problems else ():
        chosen["matcher"] = chosen.get("matcher") or default_matcher(chosen.get("combine"))
        settings += _make(MergeSettings, chosen | fixed, problems)
    if problems:
        raise ConfigurationError.collect(list(dict.fromkeys(problems)))
    return list({tuple(describe(each).items()): each for each in settings}.values())


def _product(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _make(made: Callable[..., Any], arguments: Mapping[str, Any], problems: list[str]) -> list[Any]:
    """One object, or none and its problem."""
    try:
        return [made(**arguments)]
    except ValueError as error:
        problems.append(str(error))
        return []


def find_target(batch: Any) -> Tensor:
    """The labels in a batch: its second item, or a well-known key.

    Raises:
        ConfigurationError: if there are none.
    """
    found = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            "`classes` needs labels: a validation batch must have them as its second item, or as one of the keys "
            f"{', '.join(TARGET_KEYS)}."
        )
    return found


class JointEvaluation(Callback):
    """Measures the :class:`~lightning_zipit.JointAccuracy` while ``trainer.validate`` runs over a merged module.

    Args:
        classes: per task, the global label of each output of its head. Batches have the labels of their task.
        get_input: from a batch to the backbone's input.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]], get_input: Callable[[Any], Tensor]) -> None:
        self.metric = JointAccuracy(classes)
        self.get_input = get_input

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, MultiTaskModule)
        task, target = pl_module.task_of(dataloader_idx), find_target(batch)
        own = self.metric.classes[task].to(target.device)
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < len(own):
            raise ConfigurationError(
                f"`classes` gives task {task!r} {len(own)} classes, but its validation data has labels from "
                f"{int(target.min())} to {int(target.max())}: labels number the outputs of the task's head, from 0."
            )
        self.metric.to(target.device).update(pl_module(self.get_input(batch)), own[target])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.metric.compute(), sync_dist=True)


@dataclass(frozen=True)
class Evaluation:
    """Runs ``trainer.validate`` and reads off metrics.

    Args:
        trainer: the Trainer.
        tasks: the tasks.
        dataloaders: validation loaders, one per task; ``None`` for those of the data module.
        datamodule: where they come from instead.
        metric: what every task's ``validation_step`` logs.
        classes: global labels, for the joint accuracy.
        get_input: from a batch to the backbone's input.
    """

    trainer: Trainer
    tasks: tuple[str, ...]
    dataloaders: Any
    datamodule: LightningDataModule | None
    metric: str | None
    classes: Mapping[str, Sequence[int]] | None
    get_input: Callable[[Any], Tensor]

    @property
    def decides(self) -> str:
        """The name of the metric that settings are compared by."""
        return self.metric or "joint"

    @property
    def names(self) -> list[str]:
        """The names of all metrics."""
        if self.metric is None:
            return ["joint", "mean", *self.tasks]
        return [self.metric, *(f"{task}/{self.metric}" for task in self.tasks), *["joint"] * bool(self.classes)]

    def problems(self) -> list[str]:
        """What stands in the way and is known before any data is touched."""
        found = []
        if self.metric is None and self.classes is None:
            found.append(
                "There is nothing to compare settings by: give `metric`, which your validation_step logs, or "
                "`classes`, the global labels of each task."
            )
        if self.classes is not None and set(self.classes) != set(self.tasks):
            found.append(f"`classes` has the tasks {list(self.classes)}, but the models are {list(self.tasks)}.")
        elif self.classes is not None:
            _make(JointAccuracy, {"classes": self.classes}, found)
        own = self.datamodule is not None and (
            type(self.datamodule).val_dataloader is not LightningDataModule.val_dataloader
        )
        if self.dataloaders is None and not own:
            found.append(
                "There is no validation data: pass `val_dataloaders`, one per task, or a `datamodule` whose "
                "`val_dataloader` returns them."
            )
        return found

    def __call__(self, module: MultiTaskModule) -> dict[str, float]:
        """The metrics of a module.

        Raises:
            ConfigurationError: if a task does not log the metric.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        joint = [JointEvaluation(self.classes, self.get_input)] if self.classes else []
        callbacks.extend(joint)
        datamodule = None if self.dataloaders is not None else self.datamodule
        try:
            self.trainer.validate(module, self.dataloaders, datamodule=datamodule, verbose=False)
        finally:
            callbacks[:] = [callback for callback in callbacks if callback not in joint]
            self.trainer.datamodule = None  # type: ignore[attr-defined]  # else its hooks run with the next merge
        # What is logged without sync_dist is that of one process.
        everyone = share(lambda: {name: float(value) for name, value in self.trainer.callback_metrics.items()})
        logged = {name: sum(each[name] for each in everyone) / len(everyone) for name in everyone[0]}
        if self.metric:
            missing = [task for task in self.tasks if f"{task}/{self.metric}" not in logged]
            if missing:
                raise ConfigurationError(
                    f"`metric`: the validation_step of {', '.join(map(repr, missing))} logs no {self.metric!r}. "
                    f"What is logged is {', '.join(logged) or 'nothing'}."
                )
            logged[self.metric] = sum(logged[f"{task}/{self.metric}"] for task in self.tasks) / len(self.tasks)
        return {name: logged[name] for name in self.names}


@dataclass(frozen=True)
class Sweep:
    """Merges and evaluates one setting after the other.

    Args:
        trainer: the Trainer.
        make_module: makes a module to merge, with its calibration data.
        merge: merges it.
        settings: the settings to try.
        evaluation: what is measured.
        statistics: the file of the statistics.
        mode: whether the metric is to be high or low.
    """

    trainer: Trainer
    make_module: Callable[[], ZipItModule]
    merge: Callable[[ZipItModule, MergeSettings], MultiHeadModule]
    settings: list[MergeSettings]
    evaluation: Evaluation
    statistics: Path
    mode: Mode

    def run(self, results: str | Path) -> SweepResult:
        """Do all settings that are not done yet.

        Args:
            results: the CSV file.

        Raises:
            ConfigurationError: with all that is wrong with settings, models, loaders and files, before any data is
                touched; or with the error of the first setting, where all fail.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics are those of other models or settings.
        """
        module = self.make_module()
        with quiet():
            self._check(module, results)
        file = ResultsFile(results, self._digest(module), self.evaluation.names)
        done = {number: row for number, each in enumerate(self.settings) if (row := _finished(file.find(each)))}
        ensemble = file.find(None)
        first: Exception | None = None
        todo = [(number, each) for number, each in enumerate(self.settings) if number not in done]
        datamodule, attached = module.datamodule, self.trainer.datamodule  # type: ignore[attr-defined]
        with quiet(), self._progress(len(done)) as show, _restored(self.trainer, datamodule, attached):
            if todo and ensemble is None:
                show("the ensemble", 0)
                ensemble = SweepRow(None, self._evaluate(Ensemble(module.models, module.backbone)))
            for number, each in todo:
                text = describe(each)
                show(", ".join(text[name] for name in ("stop_at", "matcher", "refine")), 0)
                done[number], outcome = self._attempt(each)
                if isinstance(outcome, Exception):
                    first = first or outcome
                elif ensemble is not None and not ensemble.flops:
                    ensemble = _with_costs(ensemble, outcome.ensemble, outcome)
                    file.keep(ensemble, self.trainer.is_global_zero)
                file.keep(done[number], self.trainer.is_global_zero)
                show(None, 1)
        self.trainer.strategy.barrier("ZipIt.sweep")  # no process reads the file before it is complete
        if first is not None and all(row.error for row in done.values()):
            raise first
        rows = tuple(done[number] for number in range(len(self.settings)))
        return SweepResult(rows, self.evaluation.decides, self.mode, ensemble, self._merge_alone)

    def _merge_alone(self, settings: MergeSettings) -> MultiHeadModule:
        served = replace(settings, statistics=self.statistics, also=tuple(self.settings))
        return self.merge(self.make_module(), served)

    def _attempt(self, settings: MergeSettings) -> tuple[SweepRow, MergeReport | Exception]:
        """The row of one setting, and the report of its merge or what stood in its way."""
        try:
            merged = self._merge_alone(settings)
            report, row = merged.report, SweepRow(settings, self._evaluate(merged))
        except StatisticsError:
            raise
        except Exception as error:
            if isinstance(error, CalibrationError) and not self.statistics.is_file():
                raise  # the next setting would go through the same data
            return SweepRow(settings, error=f"{type(error).__name__}: {error}"), error
        assert report is not None
        return _with_costs(row, report.merged, report), report

    def _evaluate(self, module: MultiTaskModule) -> dict[str, float]:
        with isolate_rng():
            return self.evaluation(module)

    def _check(self, module: ZipItModule, results: str | Path) -> None:
        """Look for everything that is wrong before any data is touched."""
        problems = self.evaluation.problems()
        errors: list[Exception] = []
        # Processes that are not there yet have files of their own.
        known = self.statistics if self.trainer.world_size == 1 and not problems else None
        module.trainer = self.trainer
        if problem := unsupported_strategy(self.trainer):
            problems.append(problem)
        no_data = module.dataloaders is None and module.datamodule is None
        if no_data and not self.statistics.is_file():
            problems.append("There is no calibration data: pass `dataloaders` or `datamodule`.")
        for path, argument in ((results, "results"), (self.statistics, "statistics")):
            problems += [problem] if (problem := find_output_problem(path, argument)) else []
        graphs: dict[str | None, MergeGraph] = {}
        for stop_at in dict.fromkeys(each.stop_at for each in self.settings):
            each = next(each for each in self.settings if each.stop_at == stop_at)
            try:
                module.prepare(replace(each, statistics_memory=float("inf"), statistics=known))
                if module.session is not None and module.session.graphs:
                    graphs[stop_at] = next(iter(module.session.graphs.values()))
            except ZipItError as error:
                problems.append(str(error))
                errors.append(error)
            finally:
                module.release()
        if graphs and not problems:
            tapped = tapped_by_all([as_measured(graphs[s.stop_at], s) for s in self.settings if s.stop_at in graphs])
            needed = sum(statistics_bytes(tapped, name, len(module.models)) for name in tapped.spaces) / 2**30
            limit = self.settings[0].statistics_memory
            if needed > limit:
                problems.append(
                    f"The statistics for all settings take {needed:.1f} GiB, more than statistics_memory={limit}: give "
                    "more, or fewer cuts."
                )
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1 and errors:
            raise errors[0]
        if problems:
            raise ConfigurationError.collect(problems)

    def _digest(self, module: ZipItModule) -> str:
        """Of all that rows depend on beside their settings."""
        classes = self.evaluation.classes
        prints = {task: fingerprint(model) for task, model in module.models.items()}
        start = None if module.base is None else fingerprint(module.base)
        labels = {task: list(map(int, classes[task])) for task in classes} if classes else None
        text = json.dumps([prints, start, module.backbone, labels])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @contextmanager
    def _progress(self, done: int) -> Iterator[Callable[[str | None, int], None]]:
        """One bar for the sweep, where the Trainer has bars; its own are put away meanwhile."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        before = list(callbacks)
        shown = any(isinstance(callback, ProgressBar) for callback in before) and self.trainer.is_global_zero
        callbacks[:] = [callback for callback in before if not isinstance(callback, ProgressBar)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, disable=not shown, transient=True) as bar:
                task = bar.add_task("", total=len(self.settings), completed=done)
                yield lambda text, steps: bar.update(task, description=text, advance=steps)
        finally:
            callbacks[:] = before


@contextmanager
def quiet() -> Iterator[None]:
    """No information from Lightning: each merge and validation would say the same again."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _finished(row: SweepRow | None) -> SweepRow | None:
    """A row that need not be done again: one with an error is."""
    return None if row is None or row.error else row


def _with_costs(row: SweepRow, cost: Cost, report: MergeReport) -> SweepRow:
    one = next(iter(report.sources.values())).flops
    return replace(row, flops=cost.flops, relative_flops=cost.flops / one, parameters=cost.parameters)


@contextmanager
def _restored(trainer: Trainer, datamodule: LightningDataModule | None, attached: Any) -> Iterator[None]:
    """Afterwards, Trainer and data module are connected as they were."""
    before = datamodule.trainer if datamodule is not None else None
    try:
        yield
    finally:
        trainer.datamodule = attached  # type: ignore[attr-defined]
        if datamodule is not None:
            datamodule.trainer = before
