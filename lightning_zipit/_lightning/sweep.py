"""Sweep: merge and evaluate the same models with many settings, from one calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_zipit._calibration.fingerprint import fingerprint
from lightning_zipit._common.collectives import decide
from lightning_zipit._common.ending import attempt_together
from lightning_zipit._common.files import find_output_problem, locked
from lightning_zipit._common.messages import quiet
from lightning_zipit._lightning.evaluation import Evaluation
from lightning_zipit._lightning.internals import unsupported_strategy
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.multitask import Ensemble, MultiTaskModule
from lightning_zipit._report.report import Cost, MergeReport
from lightning_zipit._sweep.plan import Plan
from lightning_zipit._sweep.results import Mode, ResultsFile, SweepResult, SweepRow, as_columns
from lightning_zipit._sweep.statistics import StatisticsFiles
from lightning_zipit.errors import CalibrationError, ConfigurationError, StatisticsError, ZipItError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.settings import MergeSettings


@dataclass(frozen=True)
class Sweep:
    """Merges and evaluates the settings of a plan one by one.

    Args:
        trainer: the Trainer.
        make_module: makes a module to merge, with its calibration data.
        merge: merges such a module with given settings.
        plan: the settings to try.
        evaluation: computes the metrics of a merged module.
        statistics: the statistics files.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower metric is better.
    """

    trainer: Trainer
    make_module: Callable[[], ZipItModule]
    merge: Callable[[ZipItModule, MergeSettings], MultiHeadModule]
    plan: Plan
    evaluation: Evaluation
    statistics: StatisticsFiles
    mode: Mode

    def run(self, results: str | Path) -> SweepResult:
        """Try all settings that have no row yet, or whose row is an error.

        Args:
            results: the CSV file.

        Raises:
            ConfigurationError: with every problem of settings, models, loaders and files, before any data is read; or
                with the error of the first setting, if all settings fail.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics file belongs to other models.
        """
        module = self.make_module()
        with quiet():
            self._check(module, results)
        file = ResultsFile(results, self._digest(module), self.evaluation.names)
        ensemble, errors = file.find(None), list[Exception]()
        datamodule, attached = module.datamodule, self.trainer.datamodule  # type: ignore[attr-defined]

        def evaluate(settings: MergeSettings) -> SweepRow:
            nonlocal ensemble
            row = file.find(settings)
            if row is None or row.error:
                ensemble = ensemble or self._run_ensemble(module, show)
                text = as_columns(settings)
                show(", ".join(text[name] for name in ("stop_at", "matcher", "refine")), 0)
                row, outcome = self._attempt(settings)
                if isinstance(outcome, Exception):
                    errors.append(outcome)
                elif not ensemble.flops:
                    ensemble = _with_costs(ensemble, outcome.ensemble, outcome)
                    file.keep(ensemble, self.trainer.is_global_zero)
                file.keep(row, self.trainer.is_global_zero)
            show(None, 1)
            return row

        with quiet(), self._progress() as show, _restored(self.trainer, datamodule, attached):
            if self.plan.asks and self.trainer.world_size > 1:
                # This sets up the process group, in which rank 0 asks the study for all ranks.
                measured = self._run_ensemble(module, show)
                ensemble = ensemble or measured
            rows = self.plan.run(evaluate)
        self.trainer.strategy.barrier("ZipIt.sweep")  # no process may read the file before it is complete
        missing = 0
        if self.plan.share is not None:
            file.read()
            rows, ensemble = [row for each in self.plan.settings if (row := file.find(each))], file.find(None)
            missing = len(self.plan.settings) - len(rows)
        if errors and not missing and all(row.error for row in rows):
            raise errors[0]
        return SweepResult(tuple(rows), self.evaluation.decides, self.mode, ensemble, missing, self._merge_one)

    def _run_ensemble(self, module: ZipItModule, show: Callable[[str | None, int], None]) -> SweepRow:
        show("the ensemble", 0)
        return SweepRow(None, self._evaluate(Ensemble(module.models, module.backbone)))

    def _merge_one(self, settings: MergeSettings) -> MultiHeadModule:
        file = self.statistics.of(settings)
        also = tuple(each for each in self.plan.settings if self.statistics.of(each) == file)
        return self.merge(self.make_module(), replace(settings, statistics=file, also=also))

    def _gathering(self, settings: MergeSettings) -> AbstractContextManager[None]:
        """Context manager in which only this share gathers statistics, while other shares wait for the file."""
        file = self.statistics.of(settings)
        gathers = self.plan.share and not file.is_file()
        return locked(file) if gathers else nullcontext()

    def _attempt(self, settings: MergeSettings) -> tuple[SweepRow, MergeReport | Exception]:
        """Merge and evaluate one setting.

        Returns:
            The row of the setting, and the report of its merge or the error that all ranks have in common.
        """
        outcome = attempt_together(lambda: self._merge_and_evaluate(settings))
        if isinstance(outcome, Exception):
            no_statistics = isinstance(outcome, CalibrationError) and not decide(self.statistics.of(settings).is_file)
            if no_statistics or isinstance(outcome, StatisticsError):
                raise outcome  # the next setting would fail on the same data
            return SweepRow(settings, error=f"{type(outcome).__name__}: {outcome}"), outcome
        metrics, report = outcome
        return _with_costs(SweepRow(settings, metrics), report.merged, report), report

    def _merge_and_evaluate(self, settings: MergeSettings) -> tuple[dict[str, float], MergeReport]:
        with self._gathering(settings):
            merged = self._merge_one(settings)
        assert merged.report is not None
        return self._evaluate(merged), merged.report

    def _evaluate(self, module: MultiTaskModule) -> dict[str, float]:
        with isolate_rng():
            return self.evaluation(module)

    def _check(self, module: ZipItModule, results: str | Path) -> None:
        """Find all problems before any data is read."""
        problems = self.evaluation.problems()
        errors = self._assign_statistics(module, not problems)
        problems += [*self._argument_problems(module, results), *map(str, errors)]
        if not problems:
            needed = self.statistics.bytes_to_gather(self.plan.settings, len(module.models)) / 2**30
            limit = self.plan.settings[0].statistics_memory
            if needed > limit:
                problems.append(
                    f"The statistics for all settings need {needed:.1f} GiB, more than statistics_memory={limit}. "
                    "Raise `statistics_memory`, or try fewer values of `stop_at`."
                )
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1 and errors:
            raise errors[0]
        if problems:
            raise ConfigurationError.collect(problems)

    def _argument_problems(self, module: ZipItModule, results: str | Path) -> list[str]:
        problems = []
        if problem := unsupported_strategy(self.trainer):
            problems.append(problem)
        if self.plan.share and self.trainer.world_size > 1:
            problems.append("`share` cannot be used with a process group. Use a Trainer with devices=1.")
        no_data = module.dataloaders is None and module.datamodule is None
        if no_data and not all(self.statistics.of(each).is_file() for each in self.plan.settings):
            problems.append("No calibration data was given. Pass `dataloaders` or `datamodule`.")
        for path, argument in ((results, "results"), (self.statistics.path, "statistics")):
            problems += [problem] if (problem := find_output_problem(path, argument)) else []
        return problems

    def _assign_statistics(self, module: ZipItModule, reads: bool) -> list[ZipItError]:
        """Trace every cut, and assign a statistics file to every setting.

        Returns:
            The errors of cuts that cannot be merged.
        """
        errors: list[ZipItError] = []
        module.trainer = self.trainer
        for cut in dict.fromkeys((each.start_at, each.stop_at) for each in self.plan.settings):
            own = [each for each in self.plan.settings if (each.start_at, each.stop_at) == cut]
            try:
                graph = self._trace(module, own[0], reads)
                for each in own:
                    self.statistics.assign(each, graph)
            except ZipItError as error:
                errors.append(error)
        return errors

    def _trace(self, module: ZipItModule, settings: MergeSettings, reads: bool) -> MergeGraph | None:
        """Trace a setting without data; return ``None`` if its merge graph needs data."""
        known = self.statistics.candidate(settings) if reads else None
        if known is not None and self.trainer.world_size > 1 and not known.is_file():
            known = None  # several processes first gather into their own files
        try:
            module.prepare(replace(settings, statistics_memory=float("inf"), statistics=known))
            graphs = module.pipeline.graphs if module.pipeline is not None else {}
            return next(iter(graphs.values()), None)
        finally:
            module.release()

    def _digest(self, module: ZipItModule) -> str:
        """Compute a digest of everything that rows depend on, except their settings."""
        classes = self.evaluation.classes
        prints = {task: fingerprint(model) for task, model in module.models.items()}
        start = None if module.base is None else fingerprint(module.base)
        labels = {task: list(map(int, classes[task])) for task in classes} if classes else None
        text = json.dumps([prints, start, module.backbone, labels])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str | None, int], None]]:
        """Show one progress bar for the sweep instead of the Trainer's own bars, if the Trainer has any."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        before = list(callbacks)
        shown = any(isinstance(callback, ProgressBar) for callback in before) and self.trainer.is_global_zero
        callbacks[:] = [callback for callback in before if not isinstance(callback, ProgressBar)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, disable=not shown, transient=True) as bar:
                task = bar.add_task("", total=len(self.plan))
                yield lambda text, steps: bar.update(task, description=text, advance=steps)
        finally:
            callbacks[:] = before


def _with_costs(row: SweepRow, cost: Cost, report: MergeReport) -> SweepRow:
    one = next(iter(report.sources.values())).flops
    return replace(row, flops=cost.flops, relative_flops=cost.flops / one, parameters=cost.parameters)


@contextmanager
def _restored(trainer: Trainer, datamodule: LightningDataModule | None, attached: Any) -> Iterator[None]:
    """Context manager that restores the connection of Trainer and data module at the end."""
    before = datamodule.trainer if datamodule is not None else None
    try:
        yield
    finally:
        trainer.datamodule = attached  # type: ignore[attr-defined]
        if datamodule is not None:
            datamodule.trainer = before
