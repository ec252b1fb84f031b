"""Merging in one call, in the manner of Lightning's ``Tuner(trainer)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import Unpack

from lightning_zipit._common.ending import ending_together
from lightning_zipit._common.views import Inputs
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
        trainer: the Trainer; its callbacks are as before after a merge.
    """

    def __init__(self, trainer: Trainer) -> None:
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
        get_input: Callable[[Any], Inputs] = find_input,
        **options: Unpack[MergeOptions],
    ) -> MultiHeadModule:
        """Merge N trained modules into one with a head per task, without training.

        The report is printed, unless the Trainer shows neither a progress bar nor a model summary, and given to its
        loggers.

        Args:
            models: the source modules by task, or a sequence of them (tasks are then ``task_0``, ``task_1``, …). The
                modules and the random state stay exactly as they were. A merged module counts as all its tasks.
            dataloaders: calibration data: one loader per task in a sequence or dict, or a single loader for all tasks.
                A few hundred samples are enough; labels are never used.
            datamodule: the calibration data in place of ``dataloaders``: its ``calibration_dataloader()`` or, if it has
                none, its ``train_dataloader()`` in a fixed order.
            backbone: dotted name of the part to merge, the same in each module; ``""`` for the whole ``forward``.
            base: the module that all sources were trained from, for ``combine``.
            get_input: from a batch to the backbone's input; by default the batch, its first item, or a well-known key.
                If models take different inputs: from a batch to a dict of views of the same samples, one per task, such
                as RGB and grayscale images; by default a batch with the tasks as keys is such a dict.
            options: every option of :class:`~lightning_zipit.MergeSettings`, as a keyword argument.

        Returns:
            The merged module, in eval mode; it is also attached to the Trainer, so that ``trainer.save_checkpoint``
            saves it.

        Raises:
            ConfigurationError: with every problem that is known before any data is read.
            TraceError: if the backbone cannot be traced, or its table of axes proves wrong.
            CalibrationError: if the calibration data cannot be used.
        """
        callback = ZipItCallback(**options)
        if problem := unsupported_strategy(self.trainer):  # before processes are spawned that could not bring it back
            raise ConfigurationError(problem)
        module = ZipItModule(models, backbone, dataloaders, datamodule, get_input, base)
        statistics = callback.settings.statistics
        if dataloaders is None and datamodule is None and not (statistics and Path(statistics).is_file()):
            raise ConfigurationError("There is no calibration data: pass `dataloaders` or `datamodule`.")
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
        get_input: Callable[[Any], Inputs] = find_input,
        **choices: Any,
    ) -> SweepResult:
        """Merge with many settings and validate each merged module, from one calibration.

        Options of :meth:`merge` take a list of values to try, or one value. Every combination is tried; with
        ``trials``, an Optuna study chooses, also from a ``Range`` of numbers. The statistics are gathered once for all
        settings, and the data is read again for each refinement. Every finished setting is a row of ``results``. A
        sweep that was interrupted, or has more settings than before, does only the settings that are missing or have
        failed.

        Args:
            models: the source modules by task, or a sequence of them; they stay exactly as they were.
            dataloaders: calibration data; see :meth:`merge`.
            datamodule: the calibration data in place of ``dataloaders``, and the validation data unless
                ``val_dataloaders`` are given.
            val_dataloaders: validation data, one loader per task in a sequence or dict.
            backbone: dotted name of the part to merge.
            metric: a metric that the sources' ``validation_step`` logs, such as ``"val_acc"``; settings are compared by
                its mean over the tasks.
            mode: whether the metric is better high (``"max"``) or low (``"min"``).
            classes: per task, the global label of each output of its head. The :class:`~lightning_zipit.JointAccuracy`
                is then measured too, and decides if there is no ``metric``.
            results: the CSV file of the rows. If the file exists, rows are added to it; it must be of these models.
            statistics: the safetensors file of the statistics; by default ``results`` with the suffix ``.safetensors``.
                If it lacks statistics of new settings, these are gathered into another file beside it.
            trials: the number of settings that a study chooses, including those that it has chosen before.
            study: an Optuna study of the metric and FLOPs (or of the metric only), with a sampler and a storage of
                your own; by default a study that resumes from ``results``.
            share: ``"2/8"`` does the second of eight shares of the settings: for eight processes without a process
                group, with ``results`` and ``statistics`` on a file system that they share.
            base: the module that all sources were trained from, for ``combine``.
            get_input: from a batch to the backbone's input, or to one for each task.
            choices: every option of :class:`~lightning_zipit.MergeSettings`, as a value or a list of values.

        Returns:
            The rows, the best of them, the Pareto front, and how to merge as in one of them.

        Raises:
            ConfigurationError: with every problem that is known before any data is read; or with the error of the first
                setting, if all settings fail. Otherwise the error of a setting is in its row.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics are those of other models.
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
