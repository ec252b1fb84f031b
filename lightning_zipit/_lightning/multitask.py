"""Modules with one output per task, which run each source module's own steps."""

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
    find_input,
    find_inputs,
    find_problems,
    get_backbone,
    make_shell,
    name_tasks,
)
from lightning_zipit.errors import CalibrationError, CheckpointError, ConfigurationError
from lightning_zipit.functional import fit_temperatures
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.paths import run_all, run_one
from lightning_zipit.refine.task_norms import has_task_norms


class MergedPath(nn.Module):
    """The stem of a task if it has one, the trunk and its head in a row, in place of a source module's backbone.

    They are looked up in the module around when they are run, so that one that is replaced there is replaced here. That
    module is held in a tuple: it is no submodule of this one, and a copy of it has paths of its own.

    Args:
        owner: the module that has them.
        task: the task.
    """

    def __init__(self, owner: MultiTaskModule, task: str) -> None:
        super().__init__()
        self._owner = (owner,)
        self.task = task

    def forward(self, x: Tensor) -> Any:
        return self._owner[0].run_task(x, self.task)


class PassOn(nn.Module):
    """A trunk that shares nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class MultiTaskModule(DelegatedTransfers, LightningModule):
    """One trunk, a head per task, and each task's own steps around them.

    ``validation_step``, ``test_step`` and ``predict_step`` run the source module's own step for the task that the
    dataloader belongs to: the i-th of a sequence of loaders belongs to the i-th task, one of a dict to the task of its
    key. What a step logs is logged as ``{task}/{name}``.

    Args:
        trunk: from an input to a tuple of what the heads take; one with a batch norm per task also takes its name.
        heads: per task, the rest of its network.
        models: the source modules by task; they are copied without their backbones.
        backbone: the part of them that stem, trunk and head stand for.
        used: for the backbone ``""``, what a source's ``forward`` uses, by task.
        stems: per task, from its input to a tuple of what the trunk takes; none where that takes the input.
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

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """There is no such file, and Lightning would make whatever one that says so names.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{cls.__name__} is not read from a checkpoint: make it from its models.")

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of their heads."""
        return list(self.heads)

    def task_of(self, dataloader_idx: int) -> str:
        """The task that a dataloader belongs to, while a Trainer runs over it."""
        return self._loader_tasks[dataloader_idx]

    @property
    def norms_per_task(self) -> bool:
        """Whether the trunk has a batch norm for each task."""
        return has_task_norms(self.trunk)

    def forward(self, x: Inputs, task: str | None = None) -> Any:
        """All outputs, with one pass of the trunk, or one per task where stems or norms are its own; or one task's.

        Args:
            x: an input of the backbone; or a dict from task to input, for the outputs of those tasks.
            task: the one task to run.

        Returns:
            A dict from task to output, or one task's output.

        Raises:
            ConfigurationError: if there is an input for a task that does not exist.
        """
        if task is not None:
            return self.run_task(view_of(x, task), task)
        return run_all(self.stems, self.trunk, self.heads, x, self.norms_per_task)

    def run_task(self, x: Tensor, task: str) -> Any:
        """The output of one task, from its own input."""
        stem = self.stems[task] if len(self.stems) else None
        return run_one(stem, self.trunk, self.heads[task], x, task if self.norms_per_task else None)

    @torch.no_grad()
    def fit_temperatures(self, dataloaders: Any, get_input: Callable[[Any], Inputs] = find_input) -> dict[str, float]:
        """Temperatures for :class:`~lightning_zipit.JointAccuracy`, with which no head is surer than the others.

        No labels are used; see :func:`~lightning_zipit.functional.fit_temperatures`.

        Args:
            dataloaders: such as those of the calibration: one per task in a sequence or dict, which count the same, or
                a single loader with about equally many samples of each task.
            get_input: from a batch to the backbone's input, or to one for each task by name; by default the batch, its
                first item, or a well-known key, or those of a batch with the tasks as keys.

        Returns:
            A temperature by task.

        Raises:
            ConfigurationError: if heads do not give finite logits ``(samples, classes)``.
            CalibrationError: if there are no samples.
        """
        loaders = list(dataloaders.values()) if isinstance(dataloaders, Mapping) else dataloaders
        with evaluating(self):
            seen = [
                [self(like(find_inputs(batch, self.tasks, get_input), self)) for batch in loader]
                for loader in (loaders if isinstance(loaders, (list, tuple)) else [loaders])
            ]
        outputs = list(itertools.chain(*seen))
        if not outputs:
            raise CalibrationError("There are no samples to fit temperatures on: the dataloaders are empty.")
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
        """Inside, a source module has this module's trainer, and logs through it under its task's name."""
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
        """Runs that of every source module; a mesh of devices (FSDP2) then shards stems, trunk and heads one by one."""
        self._each_unlogged("configure_model")
        if self.device_mesh is not None and self.device_mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import FSDPModule, fully_shard  # not in every build of torch

            for part in (*self.stems.values(), self.trunk, *self.heads.values()):
                if not isinstance(part, FSDPModule) and any(True for _ in part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def _each_unlogged(self, hook: str, *args: Any) -> None:
        """Run a hook that may rebuild the source's network, and put the merged one back."""
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
                    f"trainer.{verb} got loaders for {', '.join(map(repr, unknown))}, but the tasks are {self.tasks}."
                )
            self._loader_tasks = list(loaders)
            return
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if count != len(self.tasks):
            raise ConfigurationError(
                f"trainer.{verb} got {count} dataloader{'s' * (count != 1)} for {len(self.tasks)} tasks: give "
                f"one per task in "
                f"the order {self.tasks}, or a dict from task to loader."
            )
        self._loader_tasks = self.tasks

    # Moving a batch is the business of the source that the loader belongs to

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        with self._speaking(self.task_of(dataloader_idx)) as source:
            return getattr(source, hook)(*args, 0)


def _delegated(hook: str) -> Callable[..., None]:
    def run(self: MultiTaskModule) -> None:
        self._each(hook)

    run.__name__ = run.__qualname__ = hook
    run.__doc__ = f"Runs ``{hook}`` of every source module."
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
    """The source networks side by side, unmerged, behind the interface of the merged module.

    Args:
        models: the source modules by task, or a sequence of them; they are copied.
        backbone: the part of them that is run.

    Raises:
        ConfigurationError: if there are no models, or they have no such backbone.
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
