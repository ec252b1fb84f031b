"""Hooks of a multi-task module: they run the hooks of its source modules, as the Trainer of a source does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from torch import nn

from lightning_zipit._lightning.internals import overrides, tell_device
from lightning_zipit._lightning.sources import DelegatedTransfers, get_backbone
from lightning_zipit._lightning.standin import STAND_IN, MergedPath, StandIn
from lightning_zipit.errors import ConfigurationError

OF_THE_OPTIMIZER = (
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
)
"""Methods with which a LightningModule changes the steps of its optimizer. The first source that has its own runs."""


class SourceHook:
    """A hook of a LightningModule that runs this hook of the source modules.

    If no source has its own, the attribute is Lightning's default, so that the Trainer sees that it was not overridden.

    Args:
        default: Lightning's default.
        run: a function of the module, the name of the hook and the arguments of the Trainer.
    """

    def __init__(self, default: Callable[..., Any], run: Callable[..., Any]) -> None:
        self.default = default
        name = default.__name__

        def hook(module: DelegatedHooks, *args: Any, **named: Any) -> Any:
            return run(module, name, *args, **named)

        hook.__name__, hook.__doc__ = name, f"Run ``{name}`` of the source modules."
        self.hook = hook

    def __get__(self, module: Any, owner: Any = None) -> Any:
        own = module is not None and module.sources_with(self.default.__name__)
        return MethodType(self.hook, module) if own else self.default.__get__(module, owner)


def call_as_trainer(function: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """Call a step or hook as the Trainer of a source with a single dataloader does.

    Args:
        function: the bound step or hook.
        batch: the batch.
        batch_idx: the index of the batch, for functions that take it.
    """
    parameters = inspect.signature(function).parameters
    if "dataloader_iter" in parameters:
        return function(iter([(batch, batch_idx, 0)]))
    named = {"dataloader_idx": 0} if "dataloader_idx" in parameters else {}
    positional = [
        each for each in parameters.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    takes_index = takes_any or len([each for each in positional if each.name not in named]) > 1
    return function(batch, *([batch_idx] if takes_index else []), **named)


class DelegatedHooks(DelegatedTransfers, LightningModule):
    """A LightningModule with source modules by task, which runs their hooks.

    A hook of a batch runs in the source of the batch's task. Any other hook runs in every source.
    """

    backbone: str
    sources: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self._loader_tasks: dict[str | None, list[str]] = {}
        self._outputs: dict[str, Any] = {}
        self._logged: set[str] = set()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of their sources."""
        return list(self.sources)

    def path_of(self, task: str) -> MergedPath:
        """Return the stand-in for the backbone of a task's source module."""
        source = self.sources[task]
        path = get_backbone(source, self.backbone) if self.backbone else source.__dict__["forward"]
        assert isinstance(path, MergedPath)
        return path

    def stand_in_of(self, task: str) -> StandIn:
        """Return what the merged path of a task stands on."""
        stand_in: StandIn = self.path_of(task).__dict__[STAND_IN]
        return stand_in

    def sources_with(self, name: str) -> list[str]:
        """Return the tasks whose source modules override a method of LightningModule."""
        sources = self._modules.get("sources") or nn.ModuleDict()
        return [task for task, source in sources._modules.items() if overrides(name, source)]

    # Loaders and tasks

    def task_of(self, dataloader_idx: int) -> str:
        """Return the task of a dataloader during a run of the Trainer."""
        return self._active_tasks()[dataloader_idx]

    def _active_tasks(self) -> list[str]:
        """Return the tasks that have dataloaders in the current stage of the Trainer, in the order of the loaders."""
        return self._loader_tasks.get(self._stage(), self.tasks)

    def _stage(self) -> str | None:
        stage = self._trainer.state.stage if self._trainer is not None else None
        return None if stage is None else stage.dataloader_prefix

    def _assign_loaders(self, verb: str, loaders: Any) -> None:
        """Assign the dataloaders of the current stage to tasks.

        Raises:
            ConfigurationError: unless there is one loader for each task, or a dict from task to loader.
        """
        if isinstance(loaders, Mapping):
            unknown = [task for task in loaders if task not in self.sources]
            if unknown:
                raise ConfigurationError(
                    f"trainer.{verb} got dataloaders for {', '.join(map(repr, unknown))}, but the tasks are "
                    f"{self.tasks}. Use the tasks as keys."
                )
            if several := [task for task, own in loaders.items() if isinstance(own, (list, tuple, Mapping))]:
                raise ConfigurationError(
                    f"trainer.{verb} got several dataloaders for task {several[0]!r}. Give one loader per task."
                )
            self._loader_tasks[self._stage()] = list(loaders)
            return
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if count != len(self.tasks):
            raise ConfigurationError(
                f"trainer.{verb} got {count} dataloader{'s' * (count != 1)} for {len(self.tasks)} tasks. Give one "
                f"loader per task in the order {self.tasks}, or a dict from task to loader."
            )
        self._loader_tasks[self._stage()] = self.tasks

    def by_task(self, batch: Any) -> dict[str, Any]:
        """Split a training batch into the batches of the tasks. A task whose loader has ended has no batch.

        Raises:
            ConfigurationError: unless the batch is a dict or sequence with an entry for each task.
        """
        tasks = self._active_tasks()
        if isinstance(batch, Mapping) and set(batch) <= set(tasks):
            found = dict(batch)
        elif isinstance(batch, (list, tuple)) and len(batch) == len(tasks):
            found = dict(zip(tasks, batch, strict=True))
        else:
            raise ConfigurationError(
                f"trainer.fit got a training batch of type {type(batch).__name__}, but a merged module trains on a "
                f"batch of each task. Give a dict from task to training loader; the tasks are {tasks}."
            )
        return {task: own for task, own in found.items() if own is not None}

    # Hooks of the sources

    @contextmanager
    def _speaking(self, task: str) -> Iterator[LightningModule]:
        """Context manager in which a source module uses this module's Trainer, and logs with its task as prefix."""
        source: Any = self.sources[task]
        tell_device(source, self)
        trainer, own_log = source._trainer, source.__dict__.get("log")

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            kwargs["add_dataloader_idx"] = False
            self._logged.add(f"{task}/{name}")
            self.log(f"{task}/{name}", value, *args, **kwargs)

        source.trainer = self._trainer
        source.__dict__["log"] = log
        try:
            with self.stand_in_of(task).lent():
                yield source
        finally:
            source.trainer = trainer
            del source.__dict__["log"]
            if own_log is not None:  # this source called the Trainer, which called it again
                source.__dict__["log"] = own_log

    def run_source(self, task: str, name: str, *args: Any) -> Any:
        """Run a method of a source module."""
        with self._speaking(task) as source:
            return getattr(source, name)(*args)

    def _each(self, name: str, *args: Any) -> None:
        for task in self._active_tasks():
            self.run_source(task, name, *args)

    def _each_rebuilding(self, name: str, *args: Any) -> None:
        """Run a hook of every source module. If it rebuilds the source's network, restore the merged path."""
        for task in self.tasks:
            with self._speaking(task) as source:
                path, before = self.path_of(task), dict(source._modules)
                getattr(source, name)(*args)
                _set_path(source, self.backbone, path, before)

    def setup(self, stage: str) -> None:
        self._each_rebuilding("setup", stage)

    def teardown(self, stage: str) -> None:
        self._each_rebuilding("teardown", stage)
        self._loader_tasks, self._outputs = {}, {}

    def on_train_start(self) -> None:
        self._assign_loaders("fit", self.trainer.train_dataloader)
        self._each("on_train_start")

    def on_validation_start(self) -> None:
        self._assign_loaders("validate", self.trainer.val_dataloaders)
        self._each("on_validation_start")

    def on_test_start(self) -> None:
        self._assign_loaders("test", self.trainer.test_dataloaders)
        self._each("on_test_start")

    def on_predict_start(self) -> None:
        self._assign_loaders("predict", self.trainer.predict_dataloaders)
        self._each("on_predict_start")

    def configure_callbacks(self) -> list[Any]:
        """Collect the callbacks of the source modules. They monitor the metrics of their tasks.

        Of several callbacks with one ``state_key``, the first is used.
        """
        found: dict[str, Any] = {}
        for task in self.sources_with("configure_callbacks"):
            callbacks = self.run_source(task, "configure_callbacks")
            for callback in callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]:
                monitor_task(callback, task)
                found.setdefault(callback.state_key, callback)
        return list(found.values())

    # The source module of a loader moves its batches to the device

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        batch, *others = args
        if self._stage() == "train":
            return {task: self.run_source(task, hook, own, *others, 0) for task, own in self.by_task(batch).items()}
        return self.run_source(self.task_of(dataloader_idx), hook, batch, *others, 0)


def monitor_task(owner: Any, task: str) -> None:
    """Let a callback, or the configuration of a scheduler, monitor the metric of a task."""
    attributes = owner if isinstance(owner, dict) else vars(owner)
    if isinstance(attributes.get("monitor"), str):
        attributes["monitor"] = f"{task}/{attributes['monitor']}"


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


# What the Trainer calls a hook with says which sources it is for


def _run_of_loader(module: DelegatedHooks, name: str, *args: Any) -> Any:
    """Run a hook of an evaluation batch: ``(outputs,) batch, batch_idx, dataloader_idx``."""
    parameters = list(inspect.signature(getattr(LightningModule, name)).parameters)[1:]
    place = parameters.index("dataloader_idx")
    task = module.task_of(args[place] if len(args) > place else 0)
    with module._speaking(task) as source:
        hook = getattr(source, name)
        return call_as_trainer(partial(hook, *args[: place - 2]), *args[place - 2 : place])


def _run_of_training_batch(module: DelegatedHooks, name: str, *args: Any) -> Any:
    """Run a hook of a training batch: ``(outputs,) batch, batch_idx``."""
    *outputs, batch, batch_idx = args
    results = []
    for task, own in module.by_task(batch).items():
        given = [module._outputs.get(task)] * len(outputs)
        results.append(module.run_source(task, name, *given, own, batch_idx))
    return -1 if results and all(result == -1 for result in results) else None


def _run_each(module: DelegatedHooks, name: str, *args: Any) -> None:
    module._each(name, *args)


def _run_first(module: DelegatedHooks, name: str, *args: Any, **named: Any) -> Any:
    with module._speaking(module.sources_with(name)[0]) as source:
        return getattr(source, name)(*args, **named)


def _run_for_loaders(module: DelegatedHooks, name: str) -> dict[str, Any]:
    return {task: module.run_source(task, name) for task in module.sources_with(name)}


def _delegate(default: Any) -> SourceHook:
    parameters = inspect.signature(default).parameters
    if "dataloader_idx" in parameters:
        return SourceHook(default, _run_of_loader)
    return SourceHook(default, _run_of_training_batch if "batch" in parameters else _run_each)


for _default in vars(ModelHooks).values():
    _name = getattr(_default, "__name__", "")
    if inspect.isfunction(_default) and _name.startswith("on_") and _name not in vars(DelegatedHooks):
        setattr(DelegatedHooks, _name, _delegate(_default))
for _default in (getattr(LightningModule, _name) for _name in OF_THE_OPTIMIZER):
    setattr(DelegatedHooks, _default.__name__, SourceHook(_default, _run_first))
for _default in (each for each in vars(DataHooks).values() if inspect.isfunction(each)):
    if _default.__name__.endswith("_dataloader"):
        setattr(DelegatedHooks, _default.__name__, SourceHook(_default, _run_for_loaders))
DelegatedHooks.prepare_data = SourceHook(DataHooks.prepare_data, _run_each)  # type: ignore[method-assign, assignment]
