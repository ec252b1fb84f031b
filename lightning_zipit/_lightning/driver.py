"""Merging in one call, in the manner of Lightning's ``Tuner(trainer)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_zipit._common.ending import ending_together
from lightning_zipit._common.views import Inputs
from lightning_zipit._lightning.callback import ZipItCallback
from lightning_zipit._lightning.evaluation import Evaluation
from lightning_zipit._lightning.internals import attach, unsupported_strategy
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.sources import find_input
from lightning_zipit._lightning.sweep import Sweep
from lightning_zipit._merging.widths import Width
from lightning_zipit._sweep.plan import Range, make_plan
from lightning_zipit._sweep.results import Mode, SweepResult
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Matcher, SimilarityKind
from lightning_zipit.settings import MergeSettings, ModelWeights, Refine
from lightning_zipit.task_vectors import Combination

if TYPE_CHECKING:
    from optuna import Study


class ZipIt:
    """Merges trained modules with the devices, precision and loggers of a Trainer.

    Args:
        trainer: the Trainer; its callbacks are as before after a merge.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def merge(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        backbone: str = "",
        stop_at: str | None = None,
        matcher: Matcher | None = None,
        refine: Refine | None = "least_squares",
        merge_heads: bool = False,
        verify: bool = True,
        statistics_memory: float = 8.0,
        statistics: str | Path | None = None,
        similarity: SimilarityKind = "correlation",
        width: Width = 1.0,
        flops: float | None = None,
        base: LightningModule | None = None,
        combine: Combination | None = None,
        positions: int | None = None,
        weights: ModelWeights | None = None,
        get_input: Callable[[Any], Inputs] = find_input,
        start_at: str | None = None,
    ) -> MultiHeadModule:
        """Merge N trained modules into one with a head per task, without training.

        The report is printed, unless the Trainer shows neither a progress bar nor a model summary, and given to its
        loggers.

        Args:
            models: the source modules by task, or a sequence of them (tasks are then ``task_0``, ``task_1``, …). They
                and the random state are left exactly as they were. A merged module stands for all its tasks.
            dataloaders: calibration data: one loader per task in a sequence or dict, or a single loader for all tasks.
                A few hundred samples are enough; labels are never used.
            datamodule: where the loaders come from instead: its ``calibration_dataloader()``, else its
                ``train_dataloader()`` in a fixed order.
            backbone: dotted name of the part to merge, the same in each module; ``""`` for the whole ``forward``.
            stop_at: dotted name inside the backbone of the trunk's last module; ``None`` zips everything down to the
                last layer, which stays a head per task. ``"auto"`` with ``width="auto"`` chooses it within ``flops``.
            matcher: similarity → labels; ``GreedyZip()`` by default, ``Average()`` with ``combine``.
            refine: what follows merging; see :class:`~lightning_zipit.MergeSettings`.
            merge_heads: merge the last layer too, for models that share one output space.
            verify: prove the table of axes on the first calibration batch.
            statistics_memory: GiB that the statistics may take; where they need more, the calibration data is gone
                through several times.
            statistics: a safetensors file for the statistics. One that is there stands for the calibration; else it is
                written, and an interrupted calibration goes on from what it had gathered.
            similarity: how alike features are; see :class:`~lightning_zipit.MergeSettings`.
            width: how many features the merged network has, as a ratio to one source's: above 1 it is more accurate and
                costs more, below 1 the opposite; for all spaces, or by the name of the space. ``"auto"`` chooses them
                within ``flops``. A single model can be folded with a width below 1.
            flops: for ``width="auto"``, what the merged network may cost, as a ratio to one source's FLOPs.
            base: the module that all were trained from, for ``combine``.
            combine: how changes to ``base`` are combined, instead of averaging weights: ``TaskArithmetic()``,
                ``Ties()`` or ``Dare()``. Features are then matched by number.
            positions: how many positions of each image or sequence the statistics are taken from, at random; ``None``
                for all.
            weights: how much each model counts where features become one, such as ``{"animals": 2, "vehicles": 1}``, or
                in the order of the models; all the same by default.
            get_input: from a batch to the backbone's input; by default the batch, its first item, or a well-known key.
                Where models take different inputs, from a batch to a dict of views of the same samples, one for each
                task, such as RGB and grayscale images; by default a batch with the tasks as keys is one.
            start_at: dotted name inside the backbone of the trunk's first module: all that does not depend on it stays
                a stem per task. Inputs and first layers may then differ from model to model. ``None`` zips from the
                input on.

        Returns:
            The merged module, in eval mode; it is also attached to the Trainer, so that ``trainer.save_checkpoint``
            saves it.

        Raises:
            ConfigurationError: with every problem that is known before any data is touched.
            TraceError: if the backbone cannot be traced, or its table of axes proves wrong.
            CalibrationError: if the calibration data cannot be used.
        """
        if problem := unsupported_strategy(self.trainer):  # before processes are spawned that could not bring it back
            raise ConfigurationError(problem)
        module = ZipItModule(models, backbone, dataloaders, datamodule, get_input, base)
        if dataloaders is None and datamodule is None and not (statistics and Path(statistics).is_file()):
            raise ConfigurationError("There is no calibration data: pass `dataloaders` or `datamodule`.")
        callback = ZipItCallback(
            stop_at,
            matcher,
            refine,
            merge_heads,
            verify,
            statistics_memory,
            statistics,
            similarity,
            width,
            flops,
            combine,
            positions,
            weights,
            start_at,
        )
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
        trials: int | None = None,
        study: Study | None = None,
        share: str | None = None,
        stop_at: str | Sequence[str | None] | None = None,
        matcher: Matcher | Sequence[Matcher] | None = None,
        alpha: float | Sequence[float] | Range | None = None,
        beta: float | Sequence[float] | Range | None = None,
        refine: Refine | Sequence[Refine | None] | None = "least_squares",
        similarity: SimilarityKind | Sequence[SimilarityKind] = "correlation",
        width: Width | Sequence[Width] | Range = 1.0,
        flops: float | Sequence[float] | Range | None = None,
        base: LightningModule | None = None,
        combine: Combination | Sequence[Combination] | None = None,
        positions: int | None = None,
        weights: ModelWeights | None = None,
        merge_heads: bool = False,
        verify: bool = True,
        statistics_memory: float = 8.0,
        statistics: str | Path | None = None,
        get_input: Callable[[Any], Inputs] = find_input,
        start_at: str | Sequence[str | None] | None = None,
    ) -> SweepResult:
        """Merge with many settings and validate each merged module, from one calibration.

        Arguments of :meth:`merge` take a list of values to try, or one value. Every combination is tried; with
        ``trials``, an Optuna study chooses, also from a ``Range`` of numbers. The statistics are gathered once for all
        settings, and the data is gone through again for what ``refine`` does. Every finished setting is a row of
        ``results``: a sweep that was interrupted, or has more settings now, does only what is missing or has failed.

        Args:
            models: the source modules by task, or a sequence of them; they are left exactly as they were.
            dataloaders: calibration data; see :meth:`merge`.
            datamodule: where the calibration data comes from instead, and the validation data unless
                ``val_dataloaders`` are given.
            val_dataloaders: validation data, one loader per task in a sequence or dict.
            backbone: dotted name of the part to merge.
            metric: what the sources' ``validation_step`` logs, such as ``"val_acc"``; settings are compared by its mean
                over the tasks.
            mode: whether the metric is better high (``"max"``) or low (``"min"``).
            classes: per task, the global label of each output of its head: the
                :class:`~lightning_zipit.JointAccuracy` is measured too, and decides where there is no ``metric``.
            results: the CSV file of the rows. One that is there is added to, if it is of these models.
            trials: how many settings a study chooses, with those that it has chosen before.
            study: an Optuna study of the metric and FLOPs (or of the metric alone), with a sampler and a storage of
                your own; by default one that goes on from ``results``.
            share: ``"2/8"`` does the second of eight shares of the settings: for eight processes that know nothing of
                each other, and have ``results`` and ``statistics`` on a file system that they share.
            stop_at: the trunk's last module, or ``"auto"``.
            matcher: similarity → labels.
            alpha: of ``GreedyZip``, instead of ``matcher``.
            beta: of ``GreedyZip``, instead of ``matcher``.
            refine: what follows merging.
            similarity: how alike features are.
            width: how many features the merged network has.
            flops: the budget of ``width="auto"``.
            base: the module that all were trained from, for ``combine``.
            combine: how changes to ``base`` are combined.
            positions: how many positions of each image or sequence the statistics are taken from.
            weights: how much each model counts where features become one.
            merge_heads: merge the last layer too.
            verify: prove the tables of axes on the first calibration batch.
            statistics_memory: GiB that the statistics for all settings may take together.
            statistics: the safetensors file of the statistics; by default that of ``results`` with the suffix
                ``.safetensors``.
            get_input: from a batch to the backbone's input, or to one for each task.
            start_at: the trunk's first module; the data is gone through for the statistics of each.

        Returns:
            The rows, the best of them, the Pareto front, and how to merge as in one of them.

        Raises:
            ConfigurationError: with every problem that is known before any data is touched; or with the error of the
                first setting, where all of them fail. The error of a setting is else its row's.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics are those of other models or settings.
        """
        choices = {
            "start_at": start_at,
            "stop_at": stop_at,
            "combine": combine,
            "matcher": matcher,
            "alpha": alpha,
            "beta": beta,
            "similarity": similarity,
            "width": width,
            "flops": flops,
            "refine": refine,
        }
        fixed = {
            "merge_heads": merge_heads,
            "verify": verify,
            "statistics_memory": statistics_memory,
            "positions": positions,
            "weights": weights,
        }

        def make_module() -> ZipItModule:
            return ZipItModule(models, backbone, dataloaders, datamodule, get_input, base)

        def merge(module: ZipItModule, chosen: MergeSettings) -> MultiHeadModule:
            callback = ZipItCallback()
            callback.settings, callback.announces = chosen, False
            return self._run(module, callback)

        tasks = tuple(make_module().models)
        evaluation = Evaluation(self.trainer, tasks, val_dataloaders, datamodule, metric, classes, get_input)
        file = Path(statistics) if statistics else Path(results).with_suffix(".safetensors")
        plan = make_plan(choices, fixed, trials, study, evaluation.decides, mode, share)
        with ending_together():
            result = Sweep(self.trainer, make_module, merge, plan, evaluation, file, mode).run(results)
        if self.trainer.is_global_zero:
            print(result)
        return result
