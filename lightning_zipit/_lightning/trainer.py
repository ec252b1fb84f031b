"""A Trainer that merges checkpoints, for the command line's ``merge`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import Unpack

from lightning_zipit._common.files import find_output_problem, replacing
from lightning_zipit._lightning.announce import is_talkative
from lightning_zipit._lightning.driver import ZipIt
from lightning_zipit._lightning.files.loading import load_source, load_sources
from lightning_zipit._lightning.files.names import find_class
from lightning_zipit._lightning.files.trust import Trusted
from lightning_zipit._lightning.internals import unsupported_strategy
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._merging.widths import changes_size
from lightning_zipit._sweep.plan import with_choices
from lightning_zipit._sweep.results import Mode, SweepResult
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.settings import MergeOptions, MergeSettings, with_options


class ZipItTrainer(Trainer):
    """Lightning's Trainer, with merge and sweep beside fit, validate, test and predict."""

    @with_options
    def merge(
        self,
        model: LightningModule | type[LightningModule] | None,
        datamodule: LightningDataModule | None = None,
        *,
        checkpoints: dict[str, str],
        backbone: str = "",
        output: str = "merged.ckpt",
        test: bool = False,
        base: str | None = None,
        classes: dict[str, str] | None = None,
        weights_only: bool | None = True,
        trust: list[str] | str | None = None,
        **options: Unpack[MergeOptions],
    ) -> MultiHeadModule:
        """Merge trained checkpoints of one architecture into one checkpoint with a head per task, without training.

        Args:
            model: a module of the class that was trained, or that class; its weights are not used. A module is needed
                if checkpoints hold no hyperparameters.
            datamodule: the calibration data: its ``calibration_dataloader()`` or, if it has none, its
                ``train_dataloader()`` in a fixed order. Labels are never used.
            checkpoints: task name → checkpoint file, at least two of them (--checkpoints.TASK=FILE). A merged
                checkpoint counts as all its tasks.
            backbone: dotted name of the part of the model to merge; the whole forward by default.
            output: the file to write; an existing file is replaced.
            test: test the merged module afterwards, with the data module's test loaders: one per task.
            base: the checkpoint that all sources were trained from, for ``combine``.
            classes: task name → class path, for tasks whose model is of another class (--classes.TASK=CLASS_PATH).
            weights_only: read only tensors and primitives of the checkpoints. false unpickles them, which runs code
                that they hold: for files that you trust.
            trust: modules or classes by dotted name that checkpoints may name, such as my_project. A checkpoint
                that names anything else but layers, losses, optimizers, schedulers and metrics of torch is refused.
            options: every option of :class:`~lightning_zipit.MergeSettings`, as a keyword argument.

        Returns:
            The merged module, in eval mode; it is also attached to this Trainer.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or for models that cannot
                be merged.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            TraceError: if the backbone cannot be traced, or its table of axes proves wrong.
            CalibrationError: if the calibration data cannot be used.
        """
        given = Checkpoints(checkpoints, model, base, classes or {}, weights_only is not False, trust)
        problems = given.problems(output)
        try:
            settings = MergeSettings.of(**options)
        except ConfigurationError as error:
            problems.append(str(error))
        else:
            problems = [*given.number_problems(settings), *problems, *_data_problems(datamodule, settings.statistics)]
        if test:
            problems += _test_problems(datamodule)
        if problem := unsupported_strategy(self):  # here too, as an error in a spawned process loses its class
            problems.append(problem)
        if problems:
            raise ConfigurationError.collect(problems)
        sources, start = given.load()
        merged = ZipIt(self).merge(sources, datamodule=datamodule, backbone=backbone, base=start, **options)
        if self.is_global_zero and merged.report is not None and not is_talkative(self):  # otherwise it was printed
            merged.report.show()
        self._save(output)
        if test:
            self.test(merged, datamodule=datamodule)
        return merged

    @with_choices
    def sweep(
        self,
        model: LightningModule | type[LightningModule] | None,
        datamodule: LightningDataModule | None = None,
        *,
        checkpoints: dict[str, str],
        backbone: str = "",
        metric: str | None = None,
        mode: Mode = "max",
        labels: dict[str, list[int]] | None = None,
        results: str = "sweep.csv",
        statistics: str | None = None,
        trials: int | None = None,
        share: str | None = None,
        output: str | None = None,
        plot: str | None = None,
        base: str | None = None,
        classes: dict[str, str] | None = None,
        weights_only: bool | None = True,
        trust: list[str] | str | None = None,
        **choices: Any,
    ) -> SweepResult:
        """Merge checkpoints with every combination of settings and validate each, from one calibration.

        Options take one value, or a list of values to try: --stop_at '[layer1, layer2, null]'. With trials, a study of
        Optuna chooses from them, and from ranges of numbers: --trials 30 --alpha '{low: 0, high: 1}'.

        Args:
            model: a module of the class that was trained, or that class; its weights are not used. A module is needed
                if checkpoints hold no hyperparameters.
            datamodule: the data: for calibration as in merge, for validation its ``val_dataloader()``, which returns
                one loader per task.
            checkpoints: task name → checkpoint file, at least two of them (--checkpoints.TASK=FILE).
            backbone: dotted name of the part of the model to merge; the whole forward by default.
            metric: a metric that the models' validation_step logs, such as val_acc; settings are compared by its mean
                over the tasks.
            mode: whether the metric is better high (max) or low (min).
            labels: task name → the global label of each output of its head. The joint accuracy over all tasks is
                then measured too, and decides if there is no metric.
            results: the CSV file of the rows. If the file exists, rows are added to it; it must be of these models.
            statistics: the safetensors file of the statistics; by default results with the suffix .safetensors.
            trials: the number of settings that a study chooses; by default, every combination is tried.
            share: the share of the combinations that this process does, such as 2/8. Start each process yourself; the
                last to end writes output and plot.
            output: a file for the merged module with the best metric; by default none is written.
            plot: an image file for the metric over FLOPs, which needs matplotlib.
            base: the checkpoint that all sources were trained from, for ``combine``.
            classes: task name → class path, for tasks whose model is of another class (--classes.TASK=CLASS_PATH).
            weights_only: read only tensors and primitives of the checkpoints. false unpickles them, which runs code
                that they hold: for files that you trust.
            trust: modules or classes by dotted name that checkpoints may name, such as my_project. A checkpoint
                that names anything else but layers, losses, optimizers, schedulers and metrics of torch is refused.
            choices: every option of :class:`~lightning_zipit.MergeSettings`, as a value or a list of values.

        Returns:
            The rows, the best of them and the Pareto front.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or before any data is
                read.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics are those of other models.
        """
        given = Checkpoints(checkpoints, model, base, classes or {}, weights_only is not False, trust)
        file = statistics or str(Path(results).with_suffix(".safetensors"))
        problems = [*given.problems(output), *_data_problems(datamodule, file)]
        if plot and (problem := find_output_problem(plot, "plot")):
            problems.append(problem)
        if problems:
            raise ConfigurationError.collect(problems)
        sources, start = given.load()
        choices |= {"metric": metric, "mode": mode, "classes": labels, "results": results, "statistics": file}
        choices |= {"trials": trials, "share": share}
        result = ZipIt(self).sweep(sources, datamodule=datamodule, backbone=backbone, base=start, **choices)
        if plot and not result.missing and self.is_global_zero:
            figure, _ = result.plot()
            with replacing(Path(plot)) as image:
                figure.savefig(image)
        if output and not result.missing:
            result.merge()
            self._save(output)
        return result

    def _save(self, output: str) -> None:
        with replacing(Path(output)) as file:
            # Weights only: the optimizers and callbacks of this Trainer have no part in a merge.
            self.save_checkpoint(file, weights_only=True)
        if self.is_global_zero:
            print(f"Saved the merged module to {output}")
        self.strategy.barrier("ZipItTrainer.merge")  # no process reads the file before it is complete


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a merge, and how they are read; see :meth:`ZipItTrainer.merge`."""

    files: Mapping[str, str]
    model: LightningModule | type[LightningModule] | None
    base: str | None
    classes: Mapping[str, str]
    weights_only: bool
    trust: Trusted | None

    def load(self) -> tuple[dict[str, LightningModule], LightningModule | None]:
        """Load the source modules, and the module that they were trained from."""
        sources = load_sources(self.files, self.model, self.classes, self.weights_only, self.trust)
        if self.base is None:
            return sources, None
        return sources, load_source(self.base, self.model, None, self.weights_only, "base", self.trust)

    def problems(self, output: str | None) -> list[str]:
        """Find what is wrong before any file is read.

        Args:
            output: the file to write.
        """
        problems = []
        for task, path in self.files.items():
            if not Path(path).is_file():
                problems.append(f"There is no checkpoint file {path} (task {task!r}).")
            elif output and Path(path).resolve() == Path(output).resolve():
                problems.append(f"`output` would replace the checkpoint {path} of task {task!r}: give it another name.")
        for task, name in self.classes.items():
            if task not in self.files:
                problems.append(
                    f"`classes` names task {task!r}, which has no checkpoint: the tasks are {[*self.files]}."
                )
            try:
                find_class(name)
            except ConfigurationError as error:
                problems.append(f"`classes`, task {task!r}: {error}")
        if output and (problem := find_output_problem(output)):
            problems.append(problem)
        if self.base and not Path(self.base).is_file():
            problems.append(f"There is no checkpoint file {self.base} (`base`).")
        return problems

    def number_problems(self, settings: MergeSettings) -> list[str]:
        """Find out whether there are enough checkpoints for a merge."""
        if len(self.files) > 1 or (self.files and changes_size(settings.width)):
            return []
        return [
            "A merge needs at least two checkpoints, each named for its task (or one, with a width below 1); got "
            f"{len(self.files)}."
        ]


def _data_problems(datamodule: LightningDataModule | None, statistics: str | Path | None) -> list[str]:
    problems = []
    if statistics and (problem := find_output_problem(statistics, "statistics")):
        problems.append(problem)
    if datamodule is None and not (statistics and Path(statistics).is_file()):
        problems.append("There is no calibration data: give a data module.")
    return problems


def _test_problems(datamodule: LightningDataModule | None) -> list[str]:
    if datamodule is None or type(datamodule).test_dataloader is LightningDataModule.test_dataloader:
        return [f"`test` needs test data, but {type(datamodule).__name__} has no `test_dataloader`."]
    return []
