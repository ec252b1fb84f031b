"""Multi-task modules that run the steps of each source module."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.views import Inputs, like, view_of
from lightning_zipit._lightning.sources import (
    DelegatedTransfers,
    WithoutCheckpoint,
    find_input,
    find_inputs,
    find_problems,
    get_backbone,
    name_tasks,
)
from lightning_zipit._lightning.standin import MergedPath, make_shell
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.functional import fit_temperatures
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.paths import run_all, run_one
from lightning_zipit.refine.task_norms import has_task_norms


class PassOn(nn.Module):
    """A trunk without layers, which returns its input."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class MultiTaskModule(DelegatedTransfers, WithoutCheckpoint, LightningModule):
    """A trunk with a head per task, and the steps of each source module.

    ``validation_step``, ``test_step`` and ``predict_step`` run the step of one source module: the module of the task
    that the dataloader belongs to. In a sequence, the i-th loader belongs to the i-th task. In a dict, a loader belongs
    to the task of its key. A step's metric ``{name}`` is logged as ``{task}/{name}``.

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
    sources: nn.ModuleDict

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
            {task: make_shell(model, backbone, MergedPath(self, task), used[task]) for task, model in models.items()}
        )
        self._loader_tasks: list[str] = list(models)
        self.eval()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of their heads."""
        return list(self.heads)

    def task_of(self, dataloader_idx: int) -> str:
        """Return the task of a dataloader during a run of the Trainer."""
        return self._loader_tasks[dataloader_idx]

    @property
    def norms_per_task(self) -> bool:
        """Whether the trunk has a batch norm for each task."""
        return has_task_norms(self.trunk)

    def forward(self, x: Inputs, task: str | None = None) -> Any:
        """Compute the outputs of all tasks, or the output of one task.

        The trunk runs once for all tasks. If tasks have stems or a batch norm of their own, it runs once per task.

        Args:
            x: an input of the backbone; or a dict of inputs by task, for the outputs of those tasks.
            task: the only task to run; ``None`` for all tasks.

        Returns:
            A dict of outputs by task; or the output of ``task``.

        Raises:
            ConfigurationError: if an input belongs to an unknown task.
        """
        if task is not None:
            return self.run_task(view_of(x, task), task)
        return run_all(self.stems, self.trunk, self.heads, x, self.norms_per_task)

    def path_of(self, task: str) -> MergedPath:
        """Return the stand-in for the backbone of a task's source module."""
        source = self.sources[task]
        path = get_backbone(source, self.backbone) if self.backbone else source.__dict__["forward"]
        assert isinstance(path, MergedPath)
        return path

    def parts_of(self, task: str) -> list[nn.Module]:
        """Return the parts of a task's network: its head, the trunk, and its stem, if it has one."""
        return [self.heads[task], self.trunk, *([self.stems[task]] if len(self.stems) else [])]

    def find_difference(self, task: str) -> str | None:
        """Explain why layers of the parts do not compute what they compute in the source; ``None`` if they do."""
        return None

    reorders = True
    """Whether inner features may be in another order than in the sources."""

    def run_task(self, x: Tensor, task: str) -> Any:
        """Compute the output of one task from its input."""
        stem = self.stems[task] if len(self.stems) else None
        return run_one(stem, self.trunk, self.heads[task], x, task if self.norms_per_task else None)

    @torch.no_grad()
    def fit_temperatures(self, dataloaders: Any, get_input: Callable[[Any], Inputs] = find_input) -> dict[str, float]:
        """Fit temperatures for :class:`~lightning_zipit.JointAccuracy` that make all heads equally confident.

        Labels are not used; see :func:`~lightning_zipit.functional.fit_temperatures`.

        Args:
            dataloaders: for example the calibration data: one loader per task in a sequence or dict, with equal weight
                for each loader; or a single loader with about equally many samples of each task.
            get_input: a function from a batch to the backbone's input, or to a dict of inputs by task. By default, the
                input is the batch, its first item, the item of a usual key, such as ``"image"``, or a batch with the
                tasks as keys.

        Returns:
            The temperature of each task.

        Raises:
            ConfigurationError: if the outputs of a head are not finite logits ``(samples, classes)``.
            CalibrationError: if the dataloaders are empty.
        """
        loaders = list(dataloaders.values()) if isinstance(dataloaders, Mapping) else dataloaders
        with evaluating(self):
            seen = [
                [self(like(find_inputs(batch, self.tasks, get_input), self)) for batch in loader]
                for loader in (loaders if isinstance(loaders, (list, tuple)) else [loaders])
            ]
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

    # The sources' own steps

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("validation_step", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("test_step", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("predict_step", batch, batch_idx, dataloader_idx)

    def _step(self, name: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with self._speaking(self.task_of(dataloader_idx)) as source:
            step = getattr(source, name)
            takes_loader = "dataloader_idx" in inspect.signature(step).parameters
            return step(batch, batch_idx, **({"dataloader_idx": 0} if takes_loader else {}))

    @contextmanager
    def _speaking(self, task: str) -> Iterator[LightningModule]:
        """Context manager in which a source module uses this module's Trainer, and logs with its task as prefix."""
        source = self.sources[task]
        assert isinstance(source, LightningModule)

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            kwargs["add_dataloader_idx"] = False
            self.log(f"{task}/{name}", value, *args, **kwargs)

        source.trainer = self._trainer
        source.__dict__["log"] = log
        try:
            with self.path_of(task).lent():
                yield source
        finally:
            del source.__dict__["log"]
            source.trainer = None

    def _each(self, hook: str, *args: Any) -> None:
        for task in self._loader_tasks:
            with self._speaking(task) as source:
                getattr(source, hook)(*args)

    def setup(self, stage: str) -> None:
        self._each_unlogged("setup", stage)

    def teardown(self, stage: str) -> None:
        self._each_unlogged("teardown", stage)
        self._loader_tasks = self.tasks

    def configure_model(self) -> None:
        """Run ``configure_model`` of every source module. With a device mesh (FSDP2), shard stems, trunk and heads."""
        self._each_unlogged("configure_model")
        if self.device_mesh is not None and self.device_mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import FSDPModule, fully_shard  # not in every build of torch

            for part in (*self.stems.values(), self.trunk, *self.heads.values()):
                if not isinstance(part, FSDPModule) and any(True for _ in part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def _each_unlogged(self, hook: str, *args: Any) -> None:
        """Run a hook of every source module. If it rebuilds the source's network, restore the merged path."""
        for task in self.tasks:
            with self._speaking(task) as source:
                path, before = self.path_of(task), dict(source._modules)
                getattr(source, hook)(*args)
                _set_path(source, self.backbone, path, before)

    def on_validation_start(self) -> None:
        self._assign_loaders("validate", self.trainer.val_dataloaders)
        self._each("on_validation_start")

    def on_test_start(self) -> None:
        self._assign_loaders("test", self.trainer.test_dataloaders)
        self._each("on_test_start")

    def on_predict_start(self) -> None:
        self._assign_loaders("predict", self.trainer.predict_dataloaders)
        self._each("on_predict_start")

    def _assign_loaders(self, verb: str, loaders: Any) -> None:
        if isinstance(loaders, Mapping):
            unknown = [task for task in loaders if task not in self.heads]
            if unknown:
                raise ConfigurationError(
                    f"trainer.{verb} got dataloaders for {', '.join(map(repr, unknown))}, but the tasks are "
                    f"{self.tasks}. Use the tasks as keys."
                )
            self._loader_tasks = list(loaders)
            return
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if count != len(self.tasks):
            raise ConfigurationError(
                f"trainer.{verb} got {count} dataloader{'s' * (count != 1)} for {len(self.tasks)} tasks. Give one "
                f"loader per task in the order {self.tasks}, or a dict from task to loader."
            )
        self._loader_tasks = self.tasks

    # The source module of a loader moves its batches to the device

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        with self._speaking(self.task_of(dataloader_idx)) as source:
            return getattr(source, hook)(*args, 0)


def _delegated(hook: str) -> Callable[..., None]:
    def run(self: MultiTaskModule) -> None:
        self._each(hook)

    run.__name__ = run.__qualname__ = hook
    run.__doc__ = f"Run ``{hook}`` of every source module."
    return run


for _stage in ("validation", "test", "predict"):
    for _moment in ("epoch_start", "epoch_end", "end"):
        _hook = f"on_{_stage}_{_moment}"
        setattr(MultiTaskModule, _hook, _delegated(_hook))


def _set_path(source: LightningModule, backbone: str, path: nn.Module, before: Mapping[str, Any]) -> None:
    """Restore the merged path of a source.

    Args:
        source: the source.
        backbone: dotted name of the merged part.
        path: the merged path.
        before: the submodules of the source when it had the path.
    """
    if not backbone:
        source.__dict__["forward"] = path
        source._modules.update(before)
        return
    owner, _, name = backbone.rpartition(".")
    setattr(source.get_submodule(owner), name, path)


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


def _layers_of(network: nn.Module) -> list[str]:
    """Return the names of all modules without submodules, and of the tensors of all other modules."""
    parents = [(name, module) for name, module in network.named_modules() if module._modules]
    leaves = [name for name, module in network.named_modules() if not module._modules]
    tensors = [
        f"{name}.{key}".removeprefix(".") for name, module in parents for key in (*module._parameters, *module._buffers)
    ]
    return [*filter(None, leaves), *tensors]
