"""Merging in one call, with an interface like Lightning's ``Tuner(trainer)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import Unpack

from lightning_zipit._common.ending import ending_together
from lightning_zipit._lightning.callback import ZipItCallback
from lightning_zipit._lightning.evaluation import Evaluation
from lightning_zipit._lightning.internals import attach, unsupported_strategy
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.sources import find_input
from lightning_zipit._lightning.sweep import Sweep
from lightning_zipit._sweep.plan import make_plan, split_choices, with_choices
from lightning_zipit._sweep.results import Mode, SweepResult
from lightning_zipit._sweep.statistics import StatisticsFiles
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.settings import MergeOptions, MergeSettings, with_options

if TYPE_CHECKING:
    from optuna import Study


class ZipIt:
    """Merges trained modules with the devices, precision and loggers of a Trainer.

    Args:
        trainer: the Trainer. Its callbacks are the same before and after a merge.

    Raises:
        ConfigurationError: if ``trainer`` is no Trainer of ``lightning.pytorch``.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise ConfigurationError(
                f"`trainer` must be a Trainer of `lightning.pytorch`, got a {type(trainer).__name__} of "
                f"`{type(trainer).__module__.partition('.')[0]}`. Import Trainer from `lightning.pytorch`. The models "
                "may be modules of `pytorch_lightning`."
            )
        self.trainer = trainer

    @with_options
    def merge(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        backbone: str = "",
        *,
        base: LightningModule | None = None,
        get_input: Callable[[Any], Any] = find_input,
        **options: Unpack[MergeOptions],
    ) -> MultiHeadModule:
        """Merge N trained modules into one module with a head per task, without training.

        The report is printed if the Trainer has a progress bar or a model summary. It is also passed to the Trainer's
        loggers.

        Args:
            models: the source modules by task, or a sequence of modules, whose tasks are ``task_0``, ``task_1``, …
                The modules and the random state are not changed. A merged module brings all its tasks.
            dataloaders: the calibration data: one loader per task in a sequence or dict, or a single loader for all
                tasks. A few hundred samples are enough. Labels are never used.
            datamodule: the calibration data, instead of ``dataloaders``: its ``calibration_dataloader()`` or, if it has
                none, its ``train_dataloader()`` in a fixed order.
            backbone: dotted name of the part to merge, the same in each module; ``""`` for the whole ``forward``.
            base: the module from which all sources were trained, for ``combine``.
            get_input: a function from a batch to the backbone's input: a tensor, a tuple of positional arguments or a
                dict of keyword arguments. By default, each source's own step runs on the batch, and its backbone's
                input is what the step calls the backbone with. If the models take different inputs, the function
                returns a dict with one view of the same samples per task, such as RGB and grayscale images. By default,
                a batch with the tasks as keys is such a dict.
            options: every option of :class:`~lightning_zipit.MergeSettings`, as a keyword argument.

        Returns:
            The merged module, in eval mode. It is also attached to the Trainer, so that ``trainer.save_checkpoint``
            saves it.

        Raises:
            ConfigurationError: with every problem that is known before any data is read.
            TraceError: if the backbone cannot be traced, or the proof of its table of axes fails.
            CalibrationError: if the calibration data cannot be used.
        """
        callback = ZipItCallback(**options)
        if problem := unsupported_strategy(self.trainer):  # checked early, because spawned processes lose error classes
            raise ConfigurationError(problem)
        module = ZipItModule(models, backbone, dataloaders, datamodule, get_input, base)
        statistics = callback.settings.statistics
        given = dataloaders is not None or datamodule is not None or (statistics and Path(statistics).is_file())
        if not given and module.needs_data(callback.settings):
            raise ConfigurationError("No calibration data was given. Pass `dataloaders` or `datamodule`.")
        with ending_together():
            return self._run(module, callback)

    def _run(self, module: ZipItModule, callback: ZipItCallback) -> MultiHeadModule:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(callback)
        try:
            self.trainer.predict(module, return_predictions=False)
        finally:
            callbacks.remove(callback)
        attach(self.trainer, module.merged)
        return module.merged

    @with_choices
    def sweep(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        val_dataloaders: Any = None,
        backbone: str = "",
        *,
        metric: str | None = None,
        mode: Mode = "max",
        classes: Mapping[str, Sequence[int]] | None = None,
        results: str | Path = "sweep.csv",
        statistics: str | Path | None = None,
        trials: int | None = None,
        study: Study | None = None,
        share: str | None = None,
        base: LightningModule | None = None,
        get_input: Callable[[Any], Any] = find_input,
        **choices: Any,
    ) -> SweepResult:
        """Merge with many settings and validate each merged module, from one calibration.

        Options of :meth:`merge` take one value, or a list of values to try. By default, every combination is tried.
        With ``trials``, an Optuna study chooses values from the lists, or from a ``Range`` of numbers. The statistics
        are gathered once for all settings. Each refinement reads the data again. Every finished setting becomes a row
        of ``results``. If a sweep is repeated or gets more settings, it tries only settings that have no row or whose
        row is an error.

        Args:
            models: the source modules by task, or a sequence of modules. They are not changed.
            dataloaders: the calibration data; see :meth:`merge`.
            datamodule: the calibration data, instead of ``dataloaders``, and the validation data unless
                ``val_dataloaders`` are given.
            val_dataloaders: the validation data: one loader per task in a sequence or dict.
            backbone: dotted name of the part to merge.
            metric: a metric that the sources' ``validation_step`` logs, such as ``"val_acc"``. Its mean over the tasks
                ranks the settings.
            mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower metric is better.
            classes: the global label of each output of a task's head, by task. If given, the
                :class:`~lightning_zipit.JointAccuracy` is measured too. Without ``metric``, it ranks the settings.
            results: the CSV file for the rows. If the file exists, it must belong to these models, and rows are added
                to it.
            statistics: the safetensors file for the statistics; by default ``results`` with the suffix
                ``.safetensors``. Statistics that an existing file lacks are gathered into another file in its folder.
            trials: the number of settings that a study chooses, including its earlier trials.
            study: an Optuna study of the metric and FLOPs, or of the metric only, with your own sampler and storage. By
                default, a new study that resumes from ``results``.
            share: the part of the settings that this process tries: ``"2/8"`` for the second of eight processes. The
                processes have no process group, and share a file system with ``results`` and ``statistics``.
            base: the module from which all sources were trained, for ``combine``.
            get_input: a function from a batch to the backbone's input, or to a dict of inputs by task.
            choices: every option of :class:`~lightning_zipit.MergeSettings`, as a value or a list of values.

        Returns:
            All rows, the best row, the Pareto front, and a method that repeats the merge of a row.

        Raises:
            ConfigurationError: with every problem that is known before any data is read; or with the error of the first
                setting, if all settings fail. Otherwise the error of a setting is in its row.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics file belongs to other models.
        """
        several, fixed = split_choices(choices)

        def make_module() -> ZipItModule:
            return ZipItModule(models, backbone, dataloaders, datamodule, get_input, base)

        def merge(module: ZipItModule, chosen: MergeSettings) -> MultiHeadModule:
            return self._run(module, ZipItCallback.silent(chosen))

        tasks = tuple(make_module().models)
        evaluation = Evaluation(self.trainer, tasks, val_dataloaders, datamodule, metric, classes, get_input)
        files = StatisticsFiles(Path(statistics or Path(results).with_suffix(".safetensors")))
        plan = make_plan(several, fixed, trials, study, evaluation.decides, mode, share)
        with ending_together():
            result = Sweep(self.trainer, make_module, merge, plan, evaluation, files, mode).run(results)
        if self.trainer.is_global_zero:
            print(result)
        return result
