"""Training of a merged module towards the outputs of its source modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.views import Inputs, view_of
from lightning_zipit._lightning.entering import Entering, StepInputs
from lightning_zipit._lightning.files.weights import WEIGHTS
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.sources import (
    DelegatedTransfers,
    WithoutCheckpoint,
    find_input,
    get_backbone,
    name_tasks,
)
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.replay import tensors_in

PREFIX = "merged."
"""The prefix of the merged module in the state dict of its distillation."""


def relative_error(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of outputs, divided by the variance of the targets.

    Args:
        found: outputs of the merged network, ``(samples, …)``.
        target: outputs of the source network, of the same shape.

    Example:
        >>> relative_error(torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.0]]))
        tensor(1.)
    """
    spread = (target - target.mean(0)).square().mean()
    return (found - target).square().mean() / spread.clamp(min=torch.finfo(target.dtype).tiny)


class Distillation(DelegatedTransfers, WithoutCheckpoint, LightningModule):
    """Trains a merged module towards the outputs of its source modules, on data without labels.

    This is training, and no part of a merge. Each batch is input of all tasks. Give ``trainer.fit`` a loader for all
    tasks, or one loader per task in a list or dict. A checkpoint of this training is one of the merged module.

    Args:
        merged: the merged module. It is trained in place.
        models: its source modules by task, or a sequence. They are copied, and not changed.
        optimizer: a function from parameters to an optimizer; by default AdamW with a learning rate of 1e-4.
        lr_scheduler: a function from the optimizer to a learning rate scheduler.
        loss: a function of an output of the merged network and of its source network; by default
            ``relative_error``: the squared error, divided by the variance of the source's output.
        get_input: a function from a batch to the backbone's input. By default, each source's own step runs on the
            batch, up to its backbone.

    Raises:
        ConfigurationError: if the tasks of the models are not those of the merged module.

    Attributes:
        merged: the merged module.
    """

    def __init__(
        self,
        merged: MultiHeadModule,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = relative_error,
        get_input: Callable[[Any], Any] = find_input,
    ) -> None:
        super().__init__()
        models = name_tasks(models)
        if list(models) != merged.tasks:
            raise ConfigurationError(
                f"`models` has the tasks {list(models)}, but the merged module has {merged.tasks}."
            )
        self.merged = merged
        self.loss = loss
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        # Outside the submodules, so that they are neither trained nor saved.
        self._teachers = [nn.ModuleDict({task: copy_module(model) for task, model in models.items()})]
        self._teachers[0].eval().requires_grad_(False)
        entering = {task: Entering(self._teachers[0][task], merged.backbone, task) for task in models}
        self._inputs_of = StepInputs(entering, get_input)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.merged(*inputs, **named)

    def on_fit_start(self) -> None:
        for teacher in self._teachers[0].values():
            teacher.to(self.device)
        self.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the sum of the tasks' losses, and log ``{task}/distance`` and ``distance``."""
        inputs = [x for part in self._parts(batch) for x in self._inputs_of(part, batch_idx, self._trainer)]
        losses = torch.stack([self._distances(x) for x in inputs]).mean(0)
        for task, loss in zip(self.merged.tasks, losses, strict=True):
            self.log(f"{task}/distance", loss.detach(), batch_size=1)
        self.log("distance", losses.sum().detach(), batch_size=1)
        return losses.sum()

    def _parts(self, batch: Any) -> list[Any]:
        """Split a batch of several loaders into the batches of the loaders."""
        if not isinstance(self.trainer.train_dataloader, (list, tuple, Mapping)):
            return [batch]
        parts = batch.values() if isinstance(batch, Mapping) else batch
        return [part for part in parts if part is not None]  # a loader may have ended

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """Run a transfer hook of the source module that a loader belongs to, and of the first for a single loader."""
        batch, *others = args
        tasks = self.merged.tasks

        def run(task: str, part: Any) -> Any:
            return None if part is None else getattr(self._teachers[0][task], hook)(part, *others, 0)

        loaders = self.trainer.train_dataloader
        if isinstance(loaders, Mapping):
            return {key: run(key if key in tasks else tasks[0], part) for key, part in batch.items()}
        if isinstance(loaders, (list, tuple)):
            return [run(tasks[min(place, len(tasks) - 1)], part) for place, part in enumerate(batch)]
        return run(tasks[0], batch)

    def _distances(self, inputs: Inputs) -> Tensor:
        found = self.merged(inputs)
        distances = []
        for task in self.merged.tasks:
            teacher = self._teachers[0][task]
            with torch.no_grad():
                targets = tensors_in(view_of(inputs, task).run(get_backbone(teacher, self.merged.backbone)))
            pairs = zip(tensors_in(found[task]), targets, strict=True)
            distances.append(sum(self.loss(one, target) for one, target in pairs if target.is_floating_point()))
        return torch.stack([torch.as_tensor(each) for each in distances])

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.merged.parameters() if parameter.requires_grad]
        optimizer = self._make_optimizer(parameters) if self._make_optimizer else torch.optim.AdamW(parameters, 1e-4)
        return [optimizer], ([] if self._make_scheduler is None else [self._make_scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[WEIGHTS] = {name.removeprefix(PREFIX): value for name, value in checkpoint[WEIGHTS].items()}
        self.merged.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.merged.on_load_checkpoint(checkpoint)
        checkpoint[WEIGHTS] = {f"{PREFIX}{name}": value for name, value in checkpoint[WEIGHTS].items()}
