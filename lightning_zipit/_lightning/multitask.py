"""Multi-task modules that run the steps of each source module."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.structure import Structure
from lightning_zipit._common.views import all_views, like, view_of
from lightning_zipit._lightning.entering import Entering, StepInputs
from lightning_zipit._lightning.finetuning import FineTuning
from lightning_zipit._lightning.shells import make_shell
from lightning_zipit._lightning.sources import (
    WithoutCheckpoint,
    find_input,
    find_problems,
    get_backbone,
    name_tasks,
)
from lightning_zipit._lightning.standin import StandIn
from lightning_zipit._lightning.states import SourceStates
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.functional import fit_temperatures
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.paths import each_task, given, run_all, run_one
from lightning_zipit.refine.task_norms import has_task_norms


class PassOn(nn.Module):
    """A trunk without layers, which returns its input."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs


class MultiTaskModule(WithoutCheckpoint, SourceStates, FineTuning):
    """A trunk with a head per task, and the steps of each source module.

    ``validation_step``, ``test_step`` and ``predict_step`` run the step of one source module: the module of the task
    that the dataloader belongs to. ``training_step`` runs the steps of all source modules. In a sequence, the i-th
    loader belongs to the i-th task. In a dict, a loader belongs to the task of its key. A step's metric ``{name}`` is
    logged as ``{task}/{name}``.

    Args:
        trunk: the shared part, from an input to a tuple of the heads' inputs. A trunk with a batch norm per task also
            takes the name of the task.
        heads: the last part of each task's network, by task.
        models: the source modules by task. They are copied without their backbones.
        backbone: dotted name of the part of the source modules that stem, trunk and head replace.
        used: the modules and parameters that a source's ``forward`` uses, by task. Only for the backbone ``""``.
        stems: the first part of each task's network, by task, from an input to a tuple of the trunk's inputs. Without
            stems, the trunk takes the input.
    """

    trunk: nn.Module
    heads: nn.ModuleDict
    stems: nn.ModuleDict

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        models: Mapping[str, LightningModule],
        backbone: str,
        used: Mapping[str, Sequence[str]],
        stems: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self.stems = nn.ModuleDict(stems)
        self.sources = nn.ModuleDict(
            {task: make_shell(model, backbone, StandIn(self, task), used[task]) for task, model in models.items()}
        )
        self.takes: Structure | None = None
        self.arguments = Arguments()
        self.eval()

    @property
    def norms_per_task(self) -> bool:
        """Whether the trunk has a batch norm for each task."""
        return has_task_norms(self.trunk)

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Compute the outputs of all tasks, or the output of one task.

        The trunk runs once for all tasks. If tasks have stems or a batch norm of their own, it runs once per task.

        Args:
            args: the arguments of the backbone; or a dict of inputs by task, for the outputs of those tasks.
            kwargs: keyword arguments of the backbone.
            task: the only task to run; ``None`` for all tasks.

        Returns:
            A dict of outputs by task; or the output of ``task``.

        Raises:
            ConfigurationError: if an input belongs to an unknown task.
        """
        x = given(args, kwargs, self.tasks, self.takes, self.arguments)
        if task is not None:
            return self.run_task(view_of(x, task), task)
        for view in all_views(x):
            self._check_arguments(view)
        return run_all(self.stems, self.trunk, self.heads, x, self.norms_per_task)

    def _check_arguments(self, x: Call) -> None:
        if self.takes is not None and not x.fits(self.takes):
            raise ConfigurationError(
                f"The backbone was captured for other arguments than it is called with. Captured: {self.takes}. "
                f"Given: {x.structure}. Give the same positional and keyword arguments as in calibration, with the "
                "same values other than tensors."
            )

    def parts_of(self, task: str) -> list[nn.Module]:
        """Return the parts of a task's network: its head, the trunk, and its stem, if it has one."""
        return [self.heads[task], self.trunk, *([self.stems[task]] if len(self.stems) else [])]

    def find_difference(self, task: str) -> str | None:
        """Explain why layers of the parts do not compute what they compute in the source; ``None`` if they do."""
        return None

    reorders = True
    """Whether inner features may be in another order than in the sources."""

    def run_task(self, x: Call, task: str) -> Any:
        """Compute the output of one task from its input."""
        x = self.arguments.bind(x)
        self._check_arguments(x)
        stem = self.stems[task] if len(self.stems) else None
        return run_one(stem, self.trunk, self.heads[task], x, task if self.norms_per_task else None)

    @torch.no_grad()
    def fit_temperatures(self, dataloaders: Any, get_input: Callable[[Any], Any] = find_input) -> dict[str, float]:
        """Fit temperatures for :class:`~lightning_zipit.JointAccuracy` that make all heads equally confident.

        Labels are not used; see :func:`~lightning_zipit.functional.fit_temperatures`.

        Args:
            dataloaders: for example the calibration data: one loader per task in a sequence or dict, with equal weight
                for each loader; or a single loader with about equally many samples of each task.
            get_input: a function from a batch to the backbone's input, or to a dict of inputs by task. By default, each
                source's own step runs on the batch, up to its backbone.

        Returns:
            The temperature of each task.

        Raises:
            ConfigurationError: if the outputs of a head are not finite logits ``(samples, classes)``.
            CalibrationError: if the dataloaders are empty.
        """
        by_task = dataloaders if isinstance(dataloaders, Mapping) else {}
        loaders = list(dataloaders.values()) if by_task else dataloaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        owners = [task for task, _ in zip(by_task or self.tasks, loaders, strict=False)]
        with evaluating(self):
            inputs_of = self.step_inputs(get_input)
            seen = []
            for owner, loader in zip(owners, loaders, strict=True):
                source = inputs_of.entering[owner].source
                batches = (_moved(batch, source, self.device) for batch in loader)
                seen.append([self(like(x, self)) for batch in batches for x in inputs_of(batch, 0)])
        outputs = list(itertools.chain(*seen))
        if not outputs:
            raise CalibrationError(
                "Temperatures need samples, but the dataloaders are empty. Give a few hundred samples."
            )
        sizes = [sum(len(each[self.tasks[0]]) for each in of_loader) for of_loader in seen]
        weights = torch.cat([torch.full((size,), 1 / max(size, 1)) for size in sizes])
        try:
            return fit_temperatures(
                {task: torch.cat([each[task].cpu() for each in outputs]) for task in self.tasks}, weights
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def step_inputs(self, get_input: Callable[[Any], Any] = find_input) -> StepInputs:
        """Return what finds the inputs of the networks in a batch. It runs the steps of copies of the sources.

        Args:
            get_input: a function from a batch to the backbone's input; by default, the steps of the sources are used.
        """
        twin = copy.deepcopy(self).eval()
        entering = {
            task: Entering(source, self.backbone, task, twin.stand_in_of(task).lent)
            for task, source in twin.sources.items()
        }
        return StepInputs(entering, get_input)

    # The sources' own steps

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("validation_step", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("test_step", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("predict_step", batch, batch_idx, dataloader_idx)

    def _step(self, name: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.run_step(self.task_of(dataloader_idx), name, batch, batch_idx)

    def configure_model(self) -> None:
        """Run ``configure_model`` of every source module. With a device mesh (FSDP2), shard stems, trunk and heads."""
        self._each_rebuilding("configure_model")
        if self.device_mesh is not None and self.device_mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import FSDPModule, fully_shard  # not in every build of torch

            for part in (*self.stems.values(), self.trunk, *self.heads.values()):
                if not isinstance(part, FSDPModule) and any(True for _ in part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _moved(batch: Any, source: LightningModule, device: torch.device) -> Any:
    """Move a batch to a device with the hooks of its source module, as the source's Trainer does."""
    batch = source.transfer_batch_to_device(source.on_before_batch_transfer(batch, 0), device, 0)
    return source.on_after_batch_transfer(batch, 0)


class Ensemble(MultiTaskModule):
    """The unmerged source networks with the interface of the merged module, as a baseline.

    Args:
        models: the source modules by task, or a sequence of modules. They are copied.
        backbone: dotted name of the part of the modules to run.

    Raises:
        ConfigurationError: if no models are given, or a model has no such backbone.
    """

    reorders = False

    def __init__(self, models: Mapping[str, LightningModule] | Sequence[LightningModule], backbone: str = "") -> None:
        models = name_tasks(models)
        problems = find_problems(models, backbone)
        if problems:
            raise ConfigurationError.collect(problems)
        heads = {task: copy_module(get_backbone(model, backbone)) for task, model in models.items()}
        used = {task: _layers_of(get_backbone(model, backbone)) for task, model in models.items()}
        super().__init__(PassOn(), heads, models, backbone, used)

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        x = given(args, kwargs, self.tasks)
        if task is not None:
            return self.run_task(view_of(x, task), task)
        return {each: self.run_task(view, each) for each, view in each_task(x, self.tasks).items()}

    def run_task(self, x: Call, task: str) -> Any:
        args, kwargs = x.arguments
        return self.heads[task](*args, **kwargs)


def _layers_of(network: nn.Module) -> list[str]:
    """Return the names of all modules without submodules, and of the tensors of all other modules."""
    parents = [(name, module) for name, module in network.named_modules() if module._modules]
    leaves = [name for name, module in network.named_modules() if not module._modules]
    tensors = [
        f"{name}.{key}".removeprefix(".") for name, module in parents for key in (*module._parameters, *module._buffers)
    ]
    return [*filter(None, leaves), *tensors]
