"""Training of a multi-task module with the training steps and optimizers of its source modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_zipit._lightning.delegation import DelegatedHooks, call_as_trainer, monitor_task
from lightning_zipit._lightning.files.functions import describe_function, make_function
from lightning_zipit._lightning.files.trust import Trust
from lightning_zipit._lightning.internals import logging_batch
from lightning_zipit._lightning.optimizers import add_groups, list_optimizers, list_schedulers
from lightning_zipit.errors import ConfigurationError

Part: TypeAlias = Literal["trunk", "heads", "stems"]
"""A part of a multi-task module that can be frozen."""

EVERYTHING = "_zipit_everything"
"""The submodule of a source with which it sees the parameters of the whole module, while it makes its optimizers."""


class FineTuning(DelegatedHooks):
    """The training of a module with source modules by task.

    ``training_step`` runs the training step of every source module on the batch of its task, and sums the losses.
    """

    def __init__(self) -> None:
        super().__init__()
        self._make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
        self._make_scheduler: Callable[[Optimizer], Any] | None = None
        self._loss_weights: dict[str, float] = {}
        self._frozen: tuple[Part, ...] = ()
        self._stepped: set[tuple[str, str]] = set()

    def for_training(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        freeze: Part | Sequence[Part] = (),
    ) -> Self:
        """Set how ``trainer.fit`` trains this module.

        Args:
            optimizer: a function from parameters to an optimizer, such as ``partial(torch.optim.Adam, lr=1e-4)``. By
                default, the optimizers of the first source module train all parameters, with the schedulers of this
                source module.
            lr_scheduler: a function from the optimizer to a learning rate scheduler, for ``optimizer``.
            loss_weights: the weight of a task's loss in the sum; 1 by default.
            freeze: the parts that are not trained: ``"trunk"``, ``"heads"``, ``"stems"``. They stay in eval mode.

        Returns:
            This module.

        Raises:
            ConfigurationError: if a loss weight has no task, a part is unknown, or ``lr_scheduler`` has no
                ``optimizer``.
        """
        weights = dict(loss_weights or {})
        if unknown := set(weights) - set(self.tasks):
            raise ConfigurationError(f"`loss_weights` has the keys {sorted(unknown)}, but the tasks are {self.tasks}.")
        frozen: tuple[Any, ...] = (freeze,) if isinstance(freeze, str) else tuple(freeze)
        if wrong := [part for part in frozen if part not in get_args(Part)]:
            raise ConfigurationError(f"`freeze` must contain only {', '.join(get_args(Part))}, got {wrong[0]!r}.")
        if lr_scheduler is not None and optimizer is None:
            raise ConfigurationError("`lr_scheduler` needs an `optimizer`. Give both, or only an `optimizer`.")
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self._loss_weights, self._frozen = weights, frozen
        for name in get_args(Part):
            getattr(self, name).requires_grad_(name not in frozen)
        return self

    def describe_training(self) -> dict[str, Any] | None:
        """Describe the arguments of :meth:`for_training` for a file; ``None`` if there are none."""
        if not (self._make_optimizer or self._loss_weights or self._frozen):
            return None
        functions = {"optimizer": self._make_optimizer, "lr_scheduler": self._make_scheduler}
        return {
            "loss_weights": self._loss_weights,
            "freeze": list(self._frozen),
            **{name: describe_function(function) for name, function in functions.items() if function is not None},
        }

    def restore_training(self, description: Mapping[str, Any] | None, trust: Trust, where: str) -> None:
        """Apply the arguments of :meth:`for_training` in a file. A class that is not allowed is left out, and said so.

        Args:
            description: what :meth:`describe_training` returned.
            trust: the names that the file may refer to.
            where: the file, for the warning.
        """
        if description is None:
            return
        made = {name: make_function(description.get(name), trust) for name in ("optimizer", "lr_scheduler")}
        if lost := [name for name, function in made.items() if name in description and function is None]:
            named = [known["class_path"] for name in lost if (known := description[name]) is not None]
            how = f" or read the file with trust={named}" if named else ""
            rank_zero_warn(
                f"{where} does not give {' and '.join(f'`{name}`' for name in lost)} of `for_training`, which is no "
                f"class of torch.optim, and no functools.partial of one. Call `for_training` again before "
                f"`trainer.fit`{how}."
            )
        scheduler = made["lr_scheduler"] if made["optimizer"] else None
        self.for_training(made["optimizer"], scheduler, description["loss_weights"], description["freeze"])

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen:
            getattr(self, name).eval()
        return self

    def on_fit_start(self) -> None:
        self.train()  # a merge returns the module in eval mode
        manual = [task for task, source in self.sources.items() if not source.automatic_optimization]
        lacking = [task for task in self.tasks if task not in self.sources_with("training_step")]
        if manual or lacking:
            task = (manual or lacking)[0]
            problem = "optimizes manually" if manual else "has no training_step"
            raise ConfigurationError(
                f"trainer.fit cannot train the merged module, because the source module of task {task!r} {problem}. "
                "Train in a LightningModule of your own that calls the merged module."
            )
        self._each("on_fit_start")

    def run_step(self, task: str, name: str, batch: Any, batch_idx: int) -> Any:
        """Run a step of a source module as its Trainer does.

        Raises:
            ConfigurationError: if the step runs a copy of the backbone instead of the merged network.
        """
        stand_in = self.stand_in_of(task)
        stand_in.entered = False
        with self._speaking(task) as source:
            result = call_as_trainer(getattr(source, name), batch, batch_idx)
            if not stand_in.entered and batch is not None and (task, name) not in self._stepped:
                if twin := stand_in.find_twin(source):
                    raise ConfigurationError(
                        f"The {name} of task {task!r} did not run the merged network. The source module has a copy of "
                        f"its backbone, `{twin}`, which is not merged. Let the step run the backbone, or merge with "
                        f"backbone={twin!r}."
                    )
                rank_zero_warn(
                    f"The {name} of task {task!r} did not run the merged network. What it returns and logs says "
                    "nothing about the merge."
                )
        self._stepped.add((task, name))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the training step of every source module on the batch of its task.

        The loss of a task is logged as ``{task}/loss``, and the weighted sum as ``loss``, unless the source logs it.

        Args:
            batch: the batches by task, or in the order of the tasks. A task without a batch is skipped.
            batch_idx: the index of the batch.

        Returns:
            The weighted sum of the losses; ``None`` if no task has a loss.
        """
        self._outputs, self._logged = {}, set()
        losses = {}
        for task, own in self.by_task(batch).items():
            with logging_batch(self._trainer, own):
                output = self.run_step(task, "training_step", own, batch_idx)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                continue
            others = output if isinstance(output, Mapping) else {}
            self._outputs[task] = {**others, "loss": loss.detach()}
            losses[task] = loss * self._loss_weights.get(task, 1.0)
            if f"{task}/loss" not in self._logged:
                self.log(f"{task}/loss", loss.detach(), batch_size=1)
        if not losses:
            return None
        total: Tensor = torch.stack(list(losses.values())).sum()
        self.log("loss", total.detach(), batch_size=1)
        return total

    def configure_optimizers(self) -> Any:
        """Make the optimizer of :meth:`for_training`, or the optimizers and schedulers of the first source module.

        The optimizers of the first source module also train the other tasks' parameters. Parameters that it selects by
        part, such as the parameters of its head, are joined by those that the other source modules select.

        Raises:
            ConfigurationError: if neither exists.
        """
        if self._make_optimizer is not None:
            optimizer = self._make_optimizer([each for each in self.parameters() if each.requires_grad])
            if self._make_scheduler is None:
                return optimizer
            scheduler: dict[str, Any] = {"scheduler": self._make_scheduler(optimizer)}
            monitor = getattr(self._make_scheduler, "monitor", None) or getattr(scheduler["scheduler"], "monitor", None)
            return {"optimizer": optimizer, "lr_scheduler": scheduler | ({"monitor": monitor} if monitor else {})}
        tasks = self.sources_with("configure_optimizers")
        if not tasks:
            raise ConfigurationError(
                "trainer.fit needs an optimizer, but no source module has `configure_optimizers`. Call "
                "`merged.for_training(optimizer=partial(torch.optim.Adam, lr=1e-4))`, or give --optimizer on the "
                "command line."
            )
        first, *others = tasks
        with self._seeing_everything(first):
            made = self.run_source(first, "configure_optimizers")
        for task in others:
            added = self.run_source(task, "configure_optimizers")
            add_groups(list_optimizers(made), list_optimizers(added), list_schedulers(made))
        for config in list_schedulers(made, configs=True):
            monitor_task(config, first)
        return made

    @contextmanager
    def _seeing_everything(self, task: str) -> Iterator[None]:
        """Context manager in which ``parameters()`` of a source module are those of the whole module."""
        source = self.sources[task]
        others = [other for other in self.sources.values() if other is not source]
        source._modules[EVERYTHING] = nn.ModuleList([*(getattr(self, name) for name in get_args(Part)), *others])
        try:
            yield
        finally:
            del source._modules[EVERYTHING]
