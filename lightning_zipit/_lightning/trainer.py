"""Trainer for the subcommands ``merge`` and ``sweep`` of the command line."""

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
    """Lightning's Trainer, extended by merge and sweep."""

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
        weights_key: str | None = None,
        **options: Unpack[MergeOptions],
    ) -> MultiHeadModule:
        """Merge trained checkpoints of one architecture into one checkpoint with a head per task, without training.

        Args:
            model: a module of the class of the source models, or that class. The weights of the module are not used.
                A module is needed if checkpoints hold no hyperparameters.
            datamodule: the calibration data: its ``calibration_dataloader()`` or, if it has none, its
                ``train_dataloader()`` in a fixed order. Labels are never used.
            checkpoints: the checkpoint file of each task, at least two (--checkpoints.TASK=FILE). A merged checkpoint
                brings all its tasks.
            backbone: dotted name of the part of the model to merge. By default, the whole forward is merged.
            output: the file to write. An existing file is replaced.
            test: test the merged module after the merge. The data module returns one test loader per task.
            base: the checkpoint from which all sources were trained, for ``combine``.
            classes: the class path of each task whose model has another class than ``model``
                (--classes.TASK=CLASS_PATH).
            weights_only: read only tensors and primitives from the checkpoints. false unpickles the checkpoints, which
                runs code in them: use it only for files that you trust.
            trust: modules or classes, by dotted name, that checkpoints may refer to, such as my_project. Layers,
                losses, optimizers, schedulers and metrics of torch are always allowed. A checkpoint that refers to
                anything else is refused.
            weights_key: the entry of the checkpoints that holds the weights, or the prefix of their names, such as
                state_dict_ema. By default, it is found.
            options: every option of :class:`~lightning_zipit.MergeSettings`, as a keyword argument.

        Returns:
            The merged module, in eval mode. It is also attached to this Trainer.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded; or if the models cannot be
                merged.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            TraceError: if the backbone cannot be traced, or the proof of its table of axes fails.
            CalibrationError: if the calibration data cannot be used.
        """
        given = Checkpoints(checkpoints, model, base, classes or {}, weights_only is not False, trust, weights_key)
        problems = given.problems(output)
        try:
            settings = MergeSettings.of(**options)
        except ConfigurationError as error:
            problems.append(str(error))
        else:
            problems = [*given.number_problems(settings), *problems, *_data_problems(datamodule, settings.statistics)]
        if test:
            problems += _test_problems(datamodule)
        if problem := unsupported_strategy(self):  # early, because an error in a spawned process loses its class
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
        weights_key: str | None = None,
        **choices: Any,
    ) -> SweepResult:
        """Merge checkpoints with many combinations of options and validate each merged module, from one calibration.

        Options take one value, or a list of values to try: --stop_at '[layer1, layer2, null]'. With trials, an Optuna
        study chooses values from these lists, or from ranges of numbers: --trials 30 --alpha '{low: 0, high: 1}'.

        Args:
            model: a module of the class of the source models, or that class. The weights of the module are not used.
                A module is needed if checkpoints hold no hyperparameters.
            datamodule: the calibration data, as in merge, and the validation data: its ``val_dataloader()`` returns one
                loader per task.
            checkpoints: the checkpoint file of each task, at least two (--checkpoints.TASK=FILE).
            backbone: dotted name of the part of the model to merge. By default, the whole forward is merged.
            metric: a metric that the models' validation_step logs, such as val_acc. Its mean over the tasks ranks the
                combinations.
            mode: max if a higher metric is better, min if a lower metric is better.
            labels: the global label of each output of a task's head, by task. If given, the joint accuracy over all
                tasks is measured too. Without metric, the joint accuracy ranks the combinations.
            results: the CSV file for the results, one row per combination. If the file exists, it must belong to these
                models, and rows are added to it.
            statistics: the safetensors file for the statistics. By default, results with the suffix .safetensors.
            trials: the number of combinations that an Optuna study chooses. By default, every combination is tried.
            share: the part of the combinations that this process tries, such as 2/8 for the second of eight processes.
                You start each process. The process that finishes last writes output and plot.
            output: the file for the merged module with the best metric. By default, no module is saved.
            plot: the image file for a plot of the metric over FLOPs. It needs matplotlib.
            base: the checkpoint from which all sources were trained, for ``combine``.
            classes: the class path of each task whose model has another class than ``model``
                (--classes.TASK=CLASS_PATH).
            weights_only: read only tensors and primitives from the checkpoints. false unpickles the checkpoints, which
                runs code in them: use it only for files that you trust.
            trust: modules or classes, by dotted name, that checkpoints may refer to, such as my_project. Layers,
                losses, optimizers, schedulers and metrics of torch are always allowed. A checkpoint that refers to
                anything else is refused.
            weights_key: the entry of the checkpoints that holds the weights, or the prefix of their names, such as
                state_dict_ema. By default, it is found.
            choices: every option of :class:`~lightning_zipit.MergeSettings`, as a value or a list of values.

        Returns:
            All rows, the best row and the Pareto front.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or before any data is
                read.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics file belongs to other models.
        """
        given = Checkpoints(checkpoints, model, base, classes or {}, weights_only is not False, trust, weights_key)
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
            # The optimizers and callbacks of this Trainer are not part of the merged module.
            self.save_checkpoint(file, weights_only=True)
        if self.is_global_zero:
            print(f"Saved the merged module to {output}")
        self.strategy.barrier("ZipItTrainer.merge")  # no process may read the file before it is complete


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a merge and the arguments for reading them; see :meth:`ZipItTrainer.merge`."""

    files: Mapping[str, str]
    model: LightningModule | type[LightningModule] | None
    base: str | None
    classes: Mapping[str, str]
    weights_only: bool
    trust: Trusted | None
    weights_key: str | None = None

    def load(self) -> tuple[dict[str, LightningModule], LightningModule | None]:
        """Load the source modules and the base from which they were trained; ``None`` without a base."""
        sources = load_sources(self.files, self.model, self.classes, self.weights_only, self.trust, self.weights_key)
        if self.base is None:
            return sources, None
        start = load_source(self.base, self.model, None, self.weights_only, "base", self.trust, self.weights_key)
        return sources, start

    def problems(self, output: str | None) -> list[str]:
        """Find problems before any file is read.

        Args:
            output: the file to write.
        """
        problems = []
        for task, path in self.files.items():
            if Path(path).is_dir():
                problems.append(
                    f"The checkpoint {path} of task {task!r} is a folder, as of a sharded strategy. Convert it to one "
                    "file with `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
                )
            elif not Path(path).is_file():
                problems.append(f"The checkpoint file {path} of task {task!r} does not exist.")
            elif output and Path(path).resolve() == Path(output).resolve():
                problems.append(
                    f"`output` would replace the checkpoint {path} of task {task!r}. Give `output` another name."
                )
        for task, name in self.classes.items():
            if task not in self.files:
                problems.append(
                    f"`classes` has the task {task!r}, which has no checkpoint. The tasks are {[*self.files]}."
                )
            try:
                find_class(name)
            except ConfigurationError as error:
                problems.append(f"`classes`, task {task!r}: {error}")
        if output and (problem := find_output_problem(output)):
            problems.append(problem)
        if self.base and not Path(self.base).is_file():
            problems.append(f"The checkpoint file {self.base} of `base` does not exist.")
        return problems

    def number_problems(self, settings: MergeSettings) -> list[str]:
        """Check that a merge has enough checkpoints."""
        if len(self.files) > 1 or (self.files and changes_size(settings.width)):
            return []
        return [
            f"A merge needs at least two checkpoints, but got {len(self.files)}. Give --checkpoints.TASK=FILE for each "
            "task. A single checkpoint can only be compressed, with a `width` below 1."
        ]


def _data_problems(datamodule: LightningDataModule | None, statistics: str | Path | None) -> list[str]:
    problems = []
    if statistics and (problem := find_output_problem(statistics, "statistics")):
        problems.append(problem)
    if datamodule is None and not (statistics and Path(statistics).is_file()):
        problems.append("No calibration data was given. Give a data module.")
    return problems


def _test_problems(datamodule: LightningDataModule | None) -> list[str]:
    if datamodule is None or type(datamodule).test_dataloader is LightningDataModule.test_dataloader:
        return [
            f"`test` needs test data, but {type(datamodule).__name__} has no `test_dataloader`. Add one, or omit "
            "`test`."
        ]
    return []
