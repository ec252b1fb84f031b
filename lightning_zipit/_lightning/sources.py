"""Source models: their names, checks, backbones and inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.unmergeable import find_unmergeable
from lightning_zipit._lightning.internals import forget_compilation, lightning_modules
from lightning_zipit.errors import CalibrationError, CheckpointError, ConfigurationError

INPUT_KEYS = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "data", "features")
"""Keys of the network's input in a batch that is a dict."""

PATH = "_zipit_path"
"""The name of the submodule that replaces the whole ``forward`` of a source that was split from a merged module."""

RESERVED = frozenset(dir(nn.ModuleDict()))


def name_tasks(models: Mapping[str, LightningModule] | Sequence[LightningModule]) -> dict[str, LightningModule]:
    """Return the models by task, without `torch.compile` and adapters. Those of a sequence become ``task_0``, …"""
    if isinstance(models, Mapping):
        return {task: without_adapters(uncompiled(model)) for task, model in models.items()}
    if not isinstance(models, Sequence):
        raise ConfigurationError(
            f"`models` must be a mapping from task to model, or a sequence of models, got {models!r}."
        )
    return {f"task_{index}": without_adapters(uncompiled(model)) for index, model in enumerate(models)}


def uncompiled(model: Any) -> Any:
    """Remove the wrappers of `torch.compile` from a model and its modules. The result shares the model's tensors."""
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


def without_adapters(model: Any) -> Any:
    """Return a copy of a model whose adapters, such as LoRA, are merged into the layers; the model if it has none.

    An adapter says how: PEFT's models have ``merge_and_unload``, and its layers ``merge`` and ``get_base_layer``.
    """
    if not isinstance(model, nn.Module) or not any(_has_adapter(each) for each in model.modules()):
        return model
    model = copy_module(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _has_adapter(child):
                setattr(module, name, _merged_into_layer(child))
    return model


def _has_adapter(module: Any) -> bool:
    return _can(module, "merge_and_unload") or (_can(module, "merge") and _can(module, "get_base_layer"))


def _can(module: Any, name: str) -> bool:
    return callable(getattr(module, name, None))


def _merged_into_layer(module: Any) -> nn.Module:
    if _can(module, "merge_and_unload"):
        return module.merge_and_unload()
    module.merge()
    return module.get_base_layer()


def _is_compiled(module: nn.Module) -> bool:
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


def find_problems(models: Mapping[str, Any], backbone: str) -> list[str]:
    """Find problems of the models that are known without tracing."""
    if not models:
        return ["No models were given. Give at least two by task, such as {'animals': a, 'vehicles': b}."]
    problems = []
    seen: dict[int, str] = {}
    for task, model in models.items():
        if not isinstance(task, str) or not task or "." in task or "/" in task or task in RESERVED:
            problems.append(f"Task name {task!r} cannot name a head. Use a plain word without '.' or '/'.")
        if not isinstance(model, lightning_modules()):
            problems.append(f"Task {task!r}: {_foreign(model)}")
            continue
        try:
            part = get_backbone(model, backbone)
        except ConfigurationError as error:
            problems.append(f"Task {task!r}: {error}")
            continue
        if id(part) in seen:
            problems.append(
                f"Tasks {seen[id(part)]!r} and {task!r} have the same model object. Give each task its own model. To "
                "merge a model with itself, give a copy from copy.deepcopy."
            )
        seen.setdefault(id(part), task)
        if not any(True for _ in part.parameters()):
            why = find_unmergeable(part) or "it has no parameters. Give the name of a part with layers."
            problems.append(f"Task {task!r}: the backbone {backbone!r} cannot be merged: {why}")
    return problems


def _foreign(model: Any) -> str:
    """Explain that an object is not a module of ``lightning.pytorch``."""
    found = f"the model must be a LightningModule of `lightning.pytorch`, got {type(model).__name__}"
    homes = [base.__module__ for base in type(model).__mro__ if base.__name__ == LightningModule.__name__]
    if not homes:
        return f"{found}."
    package = homes[0].partition(".")[0]
    return (
        f"{found}, a LightningModule of `{package}`, which has other classes of the same names. Import "
        f"`lightning.pytorch` instead of `{package}`. Each can load checkpoints of the other."
    )


def get_backbone(model: nn.Module, backbone: str) -> nn.Module:
    """Return the part of a source model that is merged.

    Raises:
        ConfigurationError: if the model has no submodule with this name.
    """
    try:
        return model.get_submodule(PATH if not backbone and PATH in model._modules else backbone)
    except AttributeError:
        children = [name for name, _ in model.named_children()]
        raise ConfigurationError(
            f"backbone={backbone!r} is not a submodule of {type(model).__name__}. Its submodules are "
            f"{', '.join(children) or 'made later, in `setup` or `configure_model`'}."
        ) from None


def find_input(batch: Any) -> Tensor:
    """Return the network's input in a batch: the batch, its first item, or the item of a usual key.

    Raises:
        CalibrationError: if no input is found.
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
        "The network's input was not found in a calibration batch. The batch is a "
        f"{type(batch).__name__}{content}. Pass `get_input`, for example get_input=lambda batch: batch['pixels']."
    )


class DelegatedTransfers(ABC):
    """Mixin that moves batches to the device with the hooks of another module, chosen by dataloader."""

    @abstractmethod
    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """Run a hook of the module that the dataloader belongs to."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_before_batch_transfer", dataloader_idx, batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._transfer("transfer_batch_to_device", dataloader_idx, batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_after_batch_transfer", dataloader_idx, batch)


class WithoutCheckpoint:
    """Mixin for modules that are created from their models only."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to load: this class has no checkpoints, and Lightning would call everything that a file names.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{cls.__name__} cannot be loaded from a checkpoint. Create it from its models.")
