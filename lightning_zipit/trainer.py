"""A Trainer that merges checkpoints: what the command line's ``merge`` runs."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_zipit._lightning import unsupported_strategy
from lightning_zipit.driver import ZipIt
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.matchers import Matcher
from lightning_zipit.multihead import MultiHeadModule, read_checkpoint
from lightning_zipit.session import Refine


class ZipItTrainer(Trainer):
    """Lightning's Trainer, with :meth:`merge` beside ``fit``, ``validate``, ``test`` and ``predict``."""

    def merge(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        checkpoints: dict[str, str],
        backbone: str = "",
        stop_at: str | None = None,
        matcher: Matcher | None = None,
        refine: Refine | None = "batch_norm",
        merge_heads: bool = False,
        output: str = "merged.ckpt",
    ) -> MultiHeadModule:
        """Merge trained checkpoints of one architecture into one checkpoint with a head per task, without training.

        Args:
            model: a module of the class that was trained; its weights are not used.
            datamodule: where the calibration data comes from: its ``calibration_dataloader()``, else its
                ``train_dataloader()`` in a fixed order. Labels are never used.
            checkpoints: task name → checkpoint file, at least two of them.
            backbone: dotted name of the part of the model to merge; the whole ``forward`` by default.
            stop_at: dotted name inside the backbone of the last module that the tasks share. By default everything down
                to the last layer, which stays a head per task.
            matcher: how features of the models are matched; ``GreedyZip`` by default.
            refine: ``batch_norm`` re-estimates running statistics in a second pass over the data; ``null`` does
                nothing.
            merge_heads: merge the last layer too, for models that share one output space.
            output: the file to write; one that is there is replaced.

        Returns:
            The merged module, in eval mode; it is also attached to this Trainer.

        Raises:
            ConfigurationError: with every problem that is known before any model is loaded, or for models that cannot
                be merged.
            CheckpointError: if a checkpoint cannot be read, or does not fit the model.
            TraceError: if the backbone cannot be traced, or its table of axes proves wrong.
            CalibrationError: if the calibration data cannot be used.
        """
        problems = _find_problems(checkpoints, output, datamodule)
        if problem := unsupported_strategy(self):  # here too, as an error in a spawned process loses its class
            problems.append(problem)
        if problems:
            raise ConfigurationError.collect(problems)
        merged = ZipIt(self).merge(
            {task: _load_source(model, task, path) for task, path in checkpoints.items()},
            datamodule=datamodule,
            backbone=backbone,
            stop_at=stop_at,
            matcher=matcher,
            refine=refine,
            merge_heads=merge_heads,
        )
        if self.is_global_zero:
            print(merged.report)
        self._save_whole(Path(output))
        return merged

    def _save_whole(self, output: Path) -> None:
        """Save the attached module under its name only once the file is complete, so that a failure leaves nothing."""
        temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            # Weights only: the optimizers and callbacks of this Trainer have no part in a merge.
            self.save_checkpoint(temporary, weights_only=True)
            if self.is_global_zero:
                os.replace(temporary, output)
                print(f"Saved the merged module to {output}")
        finally:
            temporary.unlink(missing_ok=True)
        self.strategy.barrier("ZipItTrainer.merge")  # no process returns before the file is there to be read


def _find_problems(checkpoints: dict[str, str], output: str, datamodule: LightningDataModule | None) -> list[str]:
    """Everything that can be wrong with the arguments of a merge and is known before any file is read."""
    problems = []
    if len(checkpoints) < 2:
        problems.append(f"A merge needs at least two checkpoints, each named for its task; got {len(checkpoints)}.")
    for task, path in checkpoints.items():
        if not Path(path).is_file():
            problems.append(f"There is no checkpoint file {path} (task {task!r}).")
        elif Path(path).resolve() == Path(output).resolve():
            problems.append(f"`output` would replace the checkpoint {path} of task {task!r}: give it another name.")
    if Path(output).is_dir():
        problems.append(f"`output` is a folder: {output}. Give the name of a file, such as merged.ckpt.")
    elif not Path(output).parent.is_dir():
        problems.append(f"The folder {Path(output).parent} of `output` does not exist.")
    if datamodule is None:
        problems.append("There is no calibration data: give a data module.")
    return problems


def _load_source(template: LightningModule, task: str, path: str) -> LightningModule:
    """A trained module: of its own hyperparameters where the checkpoint has them, else of the template's.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or does not fit the template's class.
    """
    model_class = type(template)
    checkpoint = read_checkpoint(path, map_location="cpu")
    try:
        if checkpoint.get(model_class.CHECKPOINT_HYPER_PARAMS_KEY):
            return model_class.load_from_checkpoint(path, weights_only=True, map_location="cpu")
        source = copy.deepcopy(template)
        source.configure_model()
        source.on_load_checkpoint(checkpoint)
        source.load_state_dict(checkpoint["state_dict"], strict=source.strict_loading)
    except Exception as error:  # the class is the user's: its constructor and hooks may raise anything
        raise CheckpointError(
            f"Task {task!r}: {path} cannot be loaded into {model_class.__name__}: {type(error).__name__}: {error}"
        ) from error
    return source
