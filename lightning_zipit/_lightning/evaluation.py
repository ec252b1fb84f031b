"""Evaluation of a merged module: metrics of its tasks, and the joint accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_zipit._common.collectives import exchange
from lightning_zipit._lightning.entering import StepInputs
from lightning_zipit._lightning.multitask import MultiTaskModule
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.metrics import JointAccuracy, check_labels

TARGET_KEYS = ("label", "labels", "target", "targets", "y")


def find_target(batch: Any) -> Tensor:
    """Return the labels in a batch: its second item, or the item of a usual key, such as ``"label"``.

    Raises:
        ConfigurationError: if the batch has no such item.
    """
    found = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            "`classes` needs labels, but no labels were found in a validation batch. Return them as the second item of "
            f"the batch, or with one of the keys {', '.join(TARGET_KEYS)}."
        )
    return found


class JointEvaluation(Callback):
    """Measures the :class:`~lightning_zipit.JointAccuracy` of a merged module during ``trainer.validate``.

    Args:
        classes: the global label of each output of a task's head, by task. Batches hold the labels of their own task.
        get_input: a function from a batch to the backbone's input; by default, the sources' own steps run.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]], get_input: Callable[[Any], Any]) -> None:
        self.metric = JointAccuracy(classes)
        self.get_input = get_input
        self.inputs_of: StepInputs | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MultiTaskModule)
        self.inputs_of = pl_module.step_inputs(self.get_input)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inputs_of = None

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
        try:
            check_labels(target)
        except ValueError as error:
            raise ConfigurationError(f"Task {task!r}, in a validation batch: {error}") from error
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < len(own):
            raise ConfigurationError(
                f"`classes` gives task {task!r} {len(own)} classes, but its validation data has labels from "
                f"{int(target.min())} to {int(target.max())}. A label must be the index of an output of the task's "
                "head, from 0."
            )
        assert self.inputs_of is not None
        inputs = self.inputs_of(batch, batch_idx, trainer)
        if len(inputs) > 1:
            raise ConfigurationError(
                f"`classes` needs one output per sample, but the step of task {task!r} calls its backbone "
                f"{len(inputs)} times for a batch. Pass `get_input`, a function from a batch to the backbone's input."
            )
        self.metric.to(target.device).update(pl_module(inputs[0]), own[target])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.metric.compute(), sync_dist=True)


def mean_by_name(logged: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each metric over the ranks that logged it. With ``rank_zero_only=True``, only rank 0 logs a metric.

    Args:
        logged: the metrics of each rank.

    Example:
        >>> mean_by_name([{"acc": 0.5, "loss": 2.0}, {"acc": 1.0}])
        {'acc': 0.75, 'loss': 2.0}
    """
    names = dict.fromkeys(name for own in logged for name in own)
    values = {name: [own[name] for own in logged if name in own] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


@dataclass(frozen=True)
class Evaluation:
    """Runs ``trainer.validate`` and collects the metrics.

    Args:
        trainer: the Trainer.
        tasks: the tasks.
        dataloaders: the validation loaders, one per task; ``None`` for the loaders of the data module.
        datamodule: the validation data, instead of ``dataloaders``.
        metric: the name of a metric that every task's ``validation_step`` logs.
        classes: the global labels of each task, for the joint accuracy.
        get_input: a function from a batch to the backbone's input.
    """

    trainer: Trainer
    tasks: tuple[str, ...]
    dataloaders: Any
    datamodule: LightningDataModule | None
    metric: str | None
    classes: Mapping[str, Sequence[int]] | None
    get_input: Callable[[Any], Any]

    @property
    def decides(self) -> str:
        """The name of the metric that ranks the settings."""
        return self.metric or "joint"

    @property
    def names(self) -> list[str]:
        """The names of all metrics."""
        if self.metric is None:
            return ["joint", "mean", *self.tasks]
        return [self.metric, *(f"{task}/{self.metric}" for task in self.tasks), *["joint"] * bool(self.classes)]

    def problems(self) -> list[str]:
        """Find problems before any data is read."""
        found = []
        if self.metric is None and self.classes is None:
            found.append(
                "A sweep needs a metric to compare settings. Give `metric`, a name that your validation_step logs, or "
                "`classes`, the global labels of each task."
            )
        if self.classes is not None and set(self.classes) != set(self.tasks):
            found.append(f"`classes` has the keys {list(self.classes)}, but the tasks are {list(self.tasks)}.")
        elif self.classes is not None:
            try:
                JointAccuracy(self.classes)
            except ValueError as error:
                found.append(str(error))
        own = self.datamodule is not None and (
            type(self.datamodule).val_dataloader is not LightningDataModule.val_dataloader
        )
        if self.dataloaders is None and not own:
            found.append(
                "No validation data was given. Pass `val_dataloaders`, one per task, or a `datamodule` whose "
                "`val_dataloader` returns one loader per task."
            )
        return found

    def __call__(self, module: MultiTaskModule) -> dict[str, float]:
        """Compute the metrics of a module.

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
            self.trainer.datamodule = None  # type: ignore[attr-defined]  # otherwise its hooks run in the next merge
        # A metric that is logged without sync_dist differs between ranks.
        everyone = exchange(lambda: {name: float(value) for name, value in self.trainer.callback_metrics.items()})
        logged = mean_by_name(everyone)
        if self.metric:
            missing = [task for task in self.tasks if f"{task}/{self.metric}" not in logged]
            if missing:
                raise ConfigurationError(
                    f"The validation_step of {', '.join(map(repr, missing))} does not log the metric {self.metric!r}. "
                    f"Log it, or choose another `metric` from what is logged: {', '.join(logged) or 'nothing'}."
                )
            logged[self.metric] = sum(logged[f"{task}/{self.metric}"] for task in self.tasks) / len(self.tasks)
        return {name: logged[name] for name in self.names}
