"""A Trainer that merges checkpoints: what the command line's ``merge`` and ``sweep`` run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_zipit._common.files import find_output_problem, replacing
from lightning_zipit._lightning.announce import is_talkative
from lightning_zipit._lightning.driver import ZipIt
from lightning_zipit._lightning.files.loading import load_source, load_sources
from lightning_zipit._lightning.files.names import find_class
from lightning_zipit._lightning.internals import unsupported_strategy
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._merging.widths import Width, changes_size
from lightning_zipit._sweep.plan import Range
from lightning_zipit._sweep.results import Mode, SweepResult
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Matcher, SimilarityKind
from lightning_zipit.settings import ModelWeights, Refine
from lightning_zipit.task_vectors import Combination


class ZipItTrainer(Trainer):
    """Lightning's Trainer, with merge and sweep beside fit, validate, test and predict."""

    def merge(
        self,
        model: LightningModule | type[LightningModule] | None,
        datamodule: LightningDataModule | None = None,
        *,
        checkpoints: dict[str, str],
        backbone: str = "",
        stop_at: str | None = None,
        matcher: Matcher | None = None,
        refine: Refine | None = "least_squares",
        merge_heads: bool = False,
        statistics_memory: float = 8.0,
        statistics: str | None = None,
        similarity: SimilarityKind = "correlation",
        width: Width = 1.0,
        flops: float | None = None,
        base: str | None = None,
        combine: Combination | None = None,
        positions: int | None = None,
        weights: ModelWeights | None = None,
        output: str = "merged.ckpt",
        test: bool = False,
        classes: dict[str, str] | None = None,
        weights_only: bool | None = True,
        start_at: str | None = None,
        trust: list[str] | str | None = None,
    ) -> MultiHeadModule:
        """Merge trained checkpoints of one architecture into one checkpoint with a head per task, without training.

        Args:
            model: a module of the class that was trained, or that class; weights are not used. A module is needed
                where checkpoints hold no hyperparameters.
            datamodule: where the calibration data comes from: its ``calibration_dataloader()``, else its
                ``train_dataloader()`` in a fixed order. Labels are never used.
            checkpoints: task name → checkpoint file, at least two of them (--checkpoints.TASK=FILE). A merged one
                stands for all its tasks.
            backbone: dotted name of the part of the model to merge; the whole forward by default.
            stop_at: dotted name inside the backbone of the last module that the tasks share. By default everything down
                to the last layer, which stays a head per task. "auto" chooses it, with width "auto".
            matcher: how features of the models are matched; GreedyZip by default.
            refine: what follows merging, in a second pass over the data: least_squares fits every layer to the
                sources, batch_norm re-estimates running statistics, repair gives layers the sources' means and
                deviations, null does nothing. Settings: --refine LeastSquares --refine.positions 256.
            merge_heads: merge the last layer too, for models that share one output space.
            statistics_memory: GiB that the statistics may take; where they need more, the calibration data is gone
                through several times.
            statistics: a safetensors file for the statistics. One that is there stands for the calibration; else it is
                written, and an interrupted calibration goes on from what it had gathered.
            similarity: how alike two features are, by their activations: correlation, absolute (its absolute value),
                cosine, or covariance.
            width: how many features the merged network has, as a ratio to one source's: above 1 it is more accurate and
                costs more, below 1 the opposite; for all spaces, or by the name of the space. auto chooses them within
                flops. A single checkpoint can be folded with a width below 1.
            flops: for width auto, what the merged network may cost, as a ratio to one source's FLOPs.
            base: the checkpoint that all were trained from, for combine.
            combine: how changes to base are combined, instead of averaging weights: TaskArithmetic, Ties or Dare.
                Features are then matched by number (--matcher Average).
            positions: how many positions of each image or sequence the statistics are taken from, at random; all by
                default.
            weights: how much each model counts where features become one (--weights.TASK=NUMBER); all the same by
                default.
            output: the file to write; one that is there is replaced.
            test: test the merged module afterwards, with the data module's test loaders: one per task.
            classes: task name → class path, for tasks whose model is of another class (--classes.TASK=CLASS_PATH).
            weights_only: read tensors and primitives of the checkpoints only. false unpickles them, which runs code
                that they hold: for files that you trust.
            start_at: dotted name inside the backbone of the first module that the tasks share; all that does not depend
                on it stays a stem per task. Where models take different inputs, a batch is a dict of them by task. By
                default everything from the input on is shared.
            trust: modules or classes by dotted name that checkpoints may name, such as my_project. A checkpoint
                that names anything else but layers, losses, optimizers, schedulers and metrics of torch is refused.

        Returns:
            The merged module, in eval mode; it is also attached to this Trainer.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or for models that cannot
                be merged.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            TraceError: if the backbone cannot be traced, or its table of axes proves wrong.
            CalibrationError: if the calibration data cannot be used.
        """
        problems = _find_problems(checkpoints, output, datamodule, test, classes or {}, statistics)
        if base and not Path(base).is_file():
            problems.append(f"There is no checkpoint file {base} (`base`).")
        if not checkpoints or (len(checkpoints) == 1 and not changes_size(width)):
            problems.insert(
                0,
                "A merge needs at least two checkpoints, each named for its task (or one, with a width below 1); got "
                f"{len(checkpoints)}.",
            )
        if problem := unsupported_strategy(self):  # here too, as an error in a spawned process loses its class
            problems.append(problem)
        if problems:
            raise ConfigurationError.collect(problems)
        merged = ZipIt(self).merge(
            load_sources(checkpoints, model, classes or {}, weights_only is not False, trust),
            datamodule=datamodule,
            backbone=backbone,
            stop_at=stop_at,
            matcher=matcher,
            refine=refine,
            merge_heads=merge_heads,
            statistics_memory=statistics_memory,
            statistics=statistics,
            similarity=similarity,
            width=width,
            flops=flops,
            base=load_source(base, model, None, weights_only is not False, "base", trust) if base else None,
            combine=combine,
            positions=positions,
            weights=weights,
            start_at=start_at,
        )
        if self.is_global_zero and merged.report is not None and not is_talkative(self):  # else it was printed
            merged.report.show()
        self._save(output)
        if test:
            self.test(merged, datamodule=datamodule)
        return merged

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
        trials: int | None = None,
        share: str | None = None,
        stop_at: list[str | None] | str | None = None,
        matcher: list[Matcher] | Matcher | None = None,
        alpha: Range | list[float] | float | None = None,
        beta: Range | list[float] | float | None = None,
        refine: list[Refine | None] | Refine | None = "least_squares",
        similarity: list[SimilarityKind] | SimilarityKind = "correlation",
        width: Range | list[Width] | Width = 1.0,
        flops: Range | list[float] | float | None = None,
        base: str | None = None,
        combine: list[Combination] | Combination | None = None,
        positions: int | None = None,
        weights: ModelWeights | None = None,
        merge_heads: bool = False,
        statistics_memory: float = 8.0,
        statistics: str | None = None,
        output: str | None = None,
        plot: str | None = None,
        classes: dict[str, str] | None = None,
        weights_only: bool | None = True,
        start_at: list[str | None] | str | None = None,
        trust: list[str] | str | None = None,
    ) -> SweepResult:
        """Merge checkpoints with every combination of settings and validate each, from one calibration.

        Settings take one value, or a list of those to try: --stop_at '[layer1, layer2, null]'. With trials, a study of
        Optuna chooses from them, and from ranges of numbers: --trials 30 --alpha '{low: 0, high: 1}'.

        Args:
            model: a module of the class that was trained, or that class; weights are not used. A module is needed
                where checkpoints hold no hyperparameters.
            datamodule: where the data comes from: for calibration as in merge, for validation its
                ``val_dataloader()``, which returns one loader per task.
            checkpoints: task name → checkpoint file, at least two of them (--checkpoints.TASK=FILE).
            backbone: dotted name of the part of the model to merge; the whole forward by default.
            metric: what the models' validation_step logs, such as val_acc; settings are compared by its mean over the
                tasks.
            mode: whether the metric is better high (max) or low (min).
            labels: task name → the global label of each output of its head: the joint accuracy over all tasks is
                measured too, and decides where there is no metric.
            results: the CSV file of the rows. One that is there is added to, if it is of these models.
            trials: how many settings a study chooses; without it, every combination is tried.
            share: which of how many processes this is that share the combinations, such as 2/8; each is started by
                itself, and the last to end writes output and plot.
            stop_at: dotted name inside the backbone of the last module that the tasks share; null for everything down
                to the last layer. "auto" chooses it, with width "auto".
            matcher: how features of the models are matched; GreedyZip by default.
            alpha: of GreedyZip, instead of matcher.
            beta: of GreedyZip, instead of matcher.
            refine: what follows merging; see merge.
            similarity: how alike two features are; see merge.
            width: how many features the merged network has; see merge.
            flops: the budget of width auto.
            base: the checkpoint that all were trained from, for combine.
            combine: how changes to base are combined; see merge.
            positions: how many positions of each image or sequence the statistics are taken from; see merge.
            weights: how much each model counts; see merge.
            merge_heads: merge the last layer too, for models that share one output space.
            statistics_memory: GiB that the statistics for all settings may take together.
            statistics: the safetensors file of the statistics; by default that of results with the suffix .safetensors.
            output: a file for the merged module with the best metric; by default none is written.
            plot: an image file for the metric over FLOPs, which needs matplotlib.
            classes: task name → class path, for tasks whose model is of another class (--classes.TASK=CLASS_PATH).
            weights_only: read tensors and primitives of the checkpoints only. false unpickles them, which runs code
                that they hold: for files that you trust.
            start_at: dotted name inside the backbone of the first module that the tasks share; null for everything from
                the input on.
            trust: modules or classes by dotted name that checkpoints may name, such as my_project. A checkpoint
                that names anything else but layers, losses, optimizers, schedulers and metrics of torch is refused.

        Returns:
            The rows, the best of them and the Pareto front.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or before any data is
                touched.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            CalibrationError: if the calibration data cannot be used.
            StatisticsError: if the statistics are those of other models or settings.
        """
        file = statistics or str(Path(results).with_suffix(".safetensors"))
        problems = _find_problems(checkpoints, output, datamodule, False, classes or {}, file)
        if base and not Path(base).is_file():
            problems.append(f"There is no checkpoint file {base} (`base`).")
        if plot and (problem := find_output_problem(plot, "plot")):
            problems.append(problem)
        if problems:
            raise ConfigurationError.collect(problems)
        result = ZipIt(self).sweep(
            load_sources(checkpoints, model, classes or {}, weights_only is not False, trust),
            datamodule=datamodule,
            backbone=backbone,
            metric=metric,
            mode=mode,
            classes=labels,
            results=results,
            trials=trials,
            share=share,
            stop_at=stop_at,
            matcher=matcher,
            alpha=alpha,
            beta=beta,
            refine=refine,
            similarity=similarity,
            width=width,
            flops=flops,
            base=load_source(base, model, None, weights_only is not False, "base", trust) if base else None,
            combine=combine,
            positions=positions,
            weights=weights,
            merge_heads=merge_heads,
            statistics_memory=statistics_memory,
            statistics=file,
            start_at=start_at,
        )
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
        self.strategy.barrier("ZipItTrainer.merge")  # no process goes on before the file is there to be read


def _find_problems(
    checkpoints: Mapping[str, str],
    output: str | None,
    datamodule: LightningDataModule | None,
    test: bool,
    classes: Mapping[str, str],
    statistics: str | None,
) -> list[str]:
    """Everything that can be wrong with the arguments of a merge and is known before any file is read."""
    problems = []
    for task, path in checkpoints.items():
        if not Path(path).is_file():
            problems.append(f"There is no checkpoint file {path} (task {task!r}).")
        elif output and Path(path).resolve() == Path(output).resolve():
            problems.append(f"`output` would replace the checkpoint {path} of task {task!r}: give it another name.")
    for task, name in classes.items():
        if task not in checkpoints:
            problems.append(f"`classes` names task {task!r}, which has no checkpoint: the tasks are {[*checkpoints]}.")
        try:
            find_class(name)
        except ConfigurationError as error:
            problems.append(f"`classes`, task {task!r}: {error}")
    if output and (problem := find_output_problem(output)):
        problems.append(problem)
    if statistics and (problem := find_output_problem(statistics, "statistics")):
        problems.append(problem)
    if datamodule is None and not (statistics and Path(statistics).is_file()):
        problems.append("There is no calibration data: give a data module.")
    if test and (datamodule is None or type(datamodule).test_dataloader is LightningDataModule.test_dataloader):
        problems.append(f"`test` needs test data, but {type(datamodule).__name__} has no `test_dataloader`.")
    return problems
