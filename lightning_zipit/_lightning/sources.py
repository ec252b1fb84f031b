"""The user's models: what they are called, and whether they can be merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.views import Inputs
from lightning_zipit._lightning.internals import forget_compilation
from lightning_zipit.errors import CalibrationError, ConfigurationError

INPUT_KEYS = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "data", "features")
"""Where a batch that is a dict is looked into for the network's input."""

PATH = "_zipit_path"
"""The module that a source's whole ``forward`` is, where it is one path of a module that was merged before."""

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
    model = copy_module(model, {id(tensor): tensor for tensor in tensors})
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


def make_shell(model: LightningModule, backbone: str, path: nn.Module, used: Sequence[str]) -> LightningModule:
    """A copy of a source model whose backbone is another network: its steps, metrics and losses are its own.

    Args:
        model: the source model.
        backbone: its merged part.
        path: the network to run in its place.
        used: for a backbone that is the whole ``forward``, the names of the modules and parameters that it uses.
    """
    if backbone:
        return copy_module(model, {id(get_backbone(model, backbone)): path})
    whole = model.__dict__.get("forward")  # of a source that was merged before
    shell = copy_module(model, {id(whole): path} if whole is not None else {})
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
