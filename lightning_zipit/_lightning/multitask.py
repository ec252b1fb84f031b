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

from lightning_zipit._common.calls import Call
from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.structure import Structure
from lightning_zipit._common.views import as_inputs, like, view_of
from lightning_zipit._lightning.sources import (
    DelegatedTransfers,
    WithoutCheckpoint,
    find_input,
    find_inputs,
    find_problems,
    get_backbone,
    make_shell,
    name_tasks,
)
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.functional import fit_temperatures
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.paths import given, run_all, run_one
from lightning_zipit.refine.task_norms import has_task_norms


class MergedPath(nn.Module):
    """Stem, trunk and head of one task as a single module, which replaces the backbone of a source module.

    The parts are looked up in their owner at each call, so that a part that is replaced in the owner is replaced here.
    The owner is stored in a tuple, so that it is not a submodule. A copy of the owner has its own paths.

    Args:
        owner: the module that has stems, trunk and heads.
        task: the task.
    """

    def __init__(self, owner: MultiTaskModule, task: str) -> None:
        super().__init__()
        self._owner = (owner,)
        self.task = task

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner[0].run_task(Call.of_arguments(args, kwargs), self.task)


class PassOn(nn.Module):
    """A trunk without layers, which returns its input."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs


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
        self.takes: Structure | None = None
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
        x = given(args, kwargs, self.tasks, self.takes)
        if task is not None:
            return self.run_task(view_of(x, task), task)
        return run_all(self.stems, self.trunk, self.heads, x, self.norms_per_task)

    def run_task(self, x: Call, task: str) -> Any:
        """Compute the output of one task from its input."""
        stem = self.stems[task] if len(self.stems) else None
        return run_one(stem, self.trunk, self.heads[task], x, task if self.norms_per_task else None)

    @torch.no_grad()
    def fit_temperatures(self, dataloaders: Any, get_input: Callable[[Any], Any] = find_input) -> dict[str, float]:
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
                [self(like(as_inputs(find_inputs(batch, self.tasks, get_input), self.tasks), self)) for batch in loader]
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
                path = _path_of(source, self.backbone)
                getattr(source, hook)(*args)
                _set_path(source, self.backbone, path)

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


def _path_of(source: LightningModule, backbone: str) -> nn.Module:
    return get_backbone(source, backbone) if backbone else source.__dict__["forward"]


def _set_path(source: LightningModule, backbone: str, path: nn.Module) -> None:
    if not backbone:
        source.__dict__["forward"] = path
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

    def __init__(self, models: Mapping[str, LightningModule] | Sequence[LightningModule], backbone: str = "") -> None:
        models = name_tasks(models)
        problems = find_problems(models, backbone)
        if problems:
            raise ConfigurationError.collect(problems)
        heads = {task: copy_module(get_backbone(model, backbone)) for task, model in models.items()}
        everything = [name for model in models.values() for name, _ in model.named_parameters()]
        used = dict.fromkeys(models, [] if backbone else everything)
        super().__init__(PassOn(), heads, models, backbone, used)
