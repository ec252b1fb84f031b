"""The user's models: what they are called, whether they can be merged, and how another process can make them again."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from lightning_zipit._lightning import forget_compilation
from lightning_zipit.errors import CalibrationError, CheckpointError, ConfigurationError
from lightning_zipit.views import Inputs

INPUT_KEYS = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "data", "features")
"""Where a batch that is a dict is looked into for the network's input."""

INSTANTIATOR = "_instantiator"
"""The hyperparameter by which Lightning marks those that its command line parsed."""

PATH = "_zipit_path"
"""The module that a source's whole ``forward`` is, where it is one path of a module that was merged before."""

DESCRIPTION = "_zipit_description"
"""What :func:`describe_source` once said about a source of a module that was merged before."""

RESERVED = frozenset(dir(nn.ModuleDict()))


def name_tasks(models: Mapping[str, LightningModule] | Sequence[LightningModule]) -> dict[str, LightningModule]:
    """The models by task, without `torch.compile`; those of a sequence become ``task_0``, ``task_1``, …"""
    if isinstance(models, Mapping):
        return {task: uncompiled(model) for task, model in models.items()}
    if not isinstance(models, Sequence):
        raise ConfigurationError(
            f"`models` must be a mapping from task to model, or a sequence of models, got {models!r}."
        )
    return {f"task_{index}": uncompiled(model) for index, model in enumerate(models)}


def uncompiled(model: Any) -> Any:
    """A model without what `torch.compile` has put around it and its modules; it shares the model's tensors."""
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, nn.Module) or not any(map(_is_compiled, model.modules())):
        return model
    tensors = (*model.parameters(), *model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    forget_compilation(model)
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in module.named_children():
            if isinstance(child, OptimizedModule):
                setattr(module, name, child._orig_mod)
    return model


def _is_compiled(module: nn.Module) -> bool:
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


def find_problems(models: Mapping[str, Any], backbone: str) -> list[str]:
    """Everything about the models that stands in the way of a merge and is known without tracing them."""
    if not models:
        return ["No models were given: name at least two, as in {'animals': a, 'vehicles': b}."]
    problems = []
    seen: dict[int, str] = {}
    for task, model in models.items():
        if not isinstance(task, str) or not task or "." in task or "/" in task or task in RESERVED:
            problems.append(f"Task name {task!r} cannot name a head: use a plain word without '.' or '/'.")
        if not isinstance(model, LightningModule):
            problems.append(f"Task {task!r}: a LightningModule is needed, got {type(model).__name__}.")
            continue
        try:
            part = get_backbone(model, backbone)
        except ConfigurationError as error:
            problems.append(f"Task {task!r}: {error}")
            continue
        if id(part) in seen:
            problems.append(
                f"Tasks {seen[id(part)]!r} and {task!r} are one and the same model: give a model per task (a copy from "
                "copy.deepcopy, to merge a model with itself)."
            )
        seen.setdefault(id(part), task)
        if not any(True for _ in part.parameters()):
            problems.append(f"Task {task!r}: backbone {backbone!r} has no parameters.")
    return problems


def get_backbone(model: nn.Module, backbone: str) -> nn.Module:
    """The part of a source model that is merged.

    Raises:
        ConfigurationError: if the model has no module of that name.
    """
    try:
        return model.get_submodule(PATH if not backbone and PATH in model._modules else backbone)
    except AttributeError:
        children = [name for name, _ in model.named_children()]
        raise ConfigurationError(
            f"backbone={backbone!r} is no module of {type(model).__name__}; its modules are {', '.join(children)}."
        ) from None


def find_input(batch: Any) -> Tensor:
    """The network's input in a batch: the batch itself, its first item, or a well-known key.

    Raises:
        CalibrationError: if there is none; it says how to name it.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    if isinstance(batch, Mapping):
        for key in INPUT_KEYS:
            if isinstance(batch.get(key), Tensor):
                return batch[key]
    content = f" with keys {list(batch)}" if isinstance(batch, Mapping) else ""
    raise CalibrationError(
        f"Cannot tell which part of a calibration batch is the network's input: it is a "
        f"{type(batch).__name__}{content}. Say it "
        "with `get_input`, for example get_input=lambda batch: batch['pixels']."
    )


def find_inputs(batch: Any, tasks: Collection[str], get_input: Callable[[Any], Inputs] = find_input) -> Inputs:
    """The inputs of all models in a batch: what ``get_input`` finds, or by default those of a batch by task.

    Raises:
        CalibrationError: if there is none; it says how to name it.
    """
    if get_input is find_input and isinstance(batch, Mapping) and all(task in batch for task in tasks):
        return {task: find_input(batch[task]) for task in tasks}
    return get_input(batch)


def describe_source(model: LightningModule) -> dict[str, Any]:
    """How to make a module of this class again, in strings and primitives.

    Returns:
        ``class_path`` (``None`` where the class cannot be imported), ``hyperparameters``, ``hparams_name``, and whether
        the hyperparameters are those of a command line (``parsed``), which names objects by class path and arguments.
    """
    if DESCRIPTION in model.__dict__:
        return dict(model.__dict__[DESCRIPTION])
    hyperparameters = {key: value for key, value in dict(model.hparams).items() if not key.startswith("_")}
    safe = {key: value for key, value in hyperparameters.items() if _is_primitive(value)}
    return {
        "class_path": _import_path(type(model)),
        "hyperparameters": safe,
        "hparams_name": getattr(model, "_hparams_name", None),
        "parsed": INSTANTIATOR in model.hparams,
    }


def make_source(task: str, description: Mapping[str, Any]) -> LightningModule:
    """An untrained module of the class and hyperparameters that :func:`describe_source` wrote down.

    Raises:
        CheckpointError: if that cannot be done; it says to pass ``models=``.
    """
    way_out = f"Pass models={{{task!r}: <a module of that class>, …}} to `MultiHeadModule.load_from_checkpoint`."
    path = description.get("class_path")
    if not path:
        raise CheckpointError(f"The class of task {task!r} was not defined in a module that can be imported. {way_out}")
    try:
        found = find_class(path)
    except ConfigurationError as error:
        raise CheckpointError(f"Task {task!r}: {error} {way_out}") from error
    arguments = _arguments(found, description["hyperparameters"], description.get("hparams_name"))
    try:
        return instantiate_module(found, arguments) if description.get("parsed") else found(**arguments)
    except Exception as error:
        raise CheckpointError(
            f"{path!r} of task {task!r} cannot be made from its saved hyperparameters "
            f"{dict(description['hyperparameters'])}: {error}. Call `self.save_hyperparameters()` in its "
            f"__init__ before "
            f"training. {way_out}"
        ) from error


def find_class(path: str) -> type[LightningModule]:
    """Import a LightningModule class; see :func:`find_object`.

    Raises:
        ConfigurationError: if it cannot be imported, or is something else.
    """
    found = find_object(path)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigurationError(f"{path!r} is not a LightningModule class.")
    return found


def find_object(path: str) -> Any:
    """Import a class or function.

    Args:
        path: ``module.Class``, or ``module:Outer.Inner``.

    Raises:
        ConfigurationError: if it cannot be imported.
    """
    module_name, _, qualname = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        # A second copy of the running script would have classes of its own, and might run it again.
        found: Any = sys.modules["__main__"] if module_name == _main_name() else importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{path!r} cannot be imported ({error}).") from error
    return found


def _arguments(cls: type, hyperparameters: Mapping[str, Any], hparams_name: str | None) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(hyperparameters)
    own = {key: value for key, value in hyperparameters.items() if key in parameters}
    if hparams_name is not None and hparams_name in parameters and hparams_name not in own:
        own[hparams_name] = dict(hyperparameters)
    return own


def _import_path(cls: type) -> str | None:
    """``module:Class``; for a class of the script that was run, the name by which another process can import it."""
    spawned = "__mp_main__"  # what multiprocessing calls the script in the processes that it spawns
    module = _main_name() if cls.__module__ in ("__main__", spawned) else cls.__module__
    return None if module is None or "<locals>" in cls.__qualname__ else f"{module}:{cls.__qualname__}"


def _main_name() -> str | None:
    """The name by which another process can import the script that was run; ``None`` for a notebook or a shell."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return None if spec.name == "__main__" else spec.name
    return None if file is None or "." in Path(file).stem else Path(file).stem


def _is_primitive(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_primitive, value))
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, str) and _is_primitive(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def make_shell(model: LightningModule, backbone: str, path: nn.Module, used: Sequence[str]) -> LightningModule:
    """A copy of a source model whose backbone is another network: its steps, metrics and losses are its own.

    Args:
        model: the source model.
        backbone: its merged part.
        path: the network to run in its place.
        used: for a backbone that is the whole ``forward``, the names of the modules and parameters that it uses.
    """
    if backbone:
        return copy.deepcopy(model, {id(get_backbone(model, backbone)): path})
    whole = model.__dict__.get("forward")  # of a source that was merged before
    shell = copy.deepcopy(model, {id(whole): path} if whole is not None else {})
    shell._modules.pop(PATH, None)
    for name in used:
        owner_name, _, leaf = name.rpartition(".")
        owner = shell.get_submodule(owner_name)
        for registry in (owner._modules, owner._parameters, owner._buffers):
            registry.pop(leaf, None)
    shell.__dict__["forward"] = path
    return shell


class DelegatedTransfers(ABC):
    """Moves batches to the device as the module does that a dataloader belongs to."""

    @abstractmethod
    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """Run a hook of that module."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_before_batch_transfer", dataloader_idx, batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._transfer("transfer_batch_to_device", dataloader_idx, batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_after_batch_transfer", dataloader_idx, batch)
