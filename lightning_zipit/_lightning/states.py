"""State dicts and checkpoints of a multi-task module, with the parts of its source modules."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_zipit._lightning.delegation import DelegatedHooks
from lightning_zipit._lightning.files.checkpoint import ask_for_module
from lightning_zipit._lightning.files.weights import WEIGHTS
from lightning_zipit.errors import CheckpointError

PARTS = "lightning_zipit_sources"
"""The key of a checkpoint for what the ``on_save_checkpoint`` of each source module adds, by task."""

OWN_STATE = ("_save_to_state_dict", "_load_from_state_dict")
"""The methods by which a layer writes and reads its own tensors."""


class SourceStates(DelegatedHooks):
    """A module whose state dict and checkpoint have the parts of its source modules as these write and read them."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        own = {task: self.sources[task] for task in self.sources_with("state_dict")}
        with _without(self.sources, own), _emptied(self.sources):
            state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for task, source in own.items():
            state.update({f"{prefix}sources.{task}.{name}": value for name, value in source.state_dict().items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict.

        Args:
            state_dict: the state dict.
            strict: refuse missing and unexpected names. A source module that overrides ``state_dict``, or has
                ``strict_loading=False``, may miss some of its names.
            assign: see :meth:`torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: if names do not fit, or tensors have other shapes.
        """
        reading = self.sources_with("load_state_dict")
        loose = {task for task, source in self.sources.items() if not source.strict_loading}
        loose |= {*self.sources_with("state_dict"), *reading}
        with _without(self.sources, reading), _emptied(self.sources):
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        for task in reading:
            self.sources[task].load_state_dict(_part(state_dict, task))
        excused = tuple(f"sources.{task}." for task in loose)
        read = tuple(f"sources.{task}." for task in reading)
        missing = [name for name in result.missing_keys if not name.startswith(excused)]
        unexpected = [name for name in result.unexpected_keys if not name.startswith(read)]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"The state dict does not fit this {type(self).__name__}. Missing names: {missing or 'none'}. "
                f"Unexpected names: {unexpected or 'none'}."
            )
        return result

    def read_weights(self, weights: Mapping[str, Tensor], strict: bool, where: str) -> None:
        """Load the weights of a file, in their types.

        Args:
            weights: the state dict.
            strict: see :meth:`load_state_dict`.
            where: the file, for error messages.

        Raises:
            CheckpointError: if they do not fit.
        """
        for name, tensor in self.state_dict(keep_vars=True).items():
            if isinstance(weights.get(name), Tensor):
                tensor.data = tensor.data.to(weights[name].dtype)
        try:
            self.load_state_dict(weights, strict=strict)
        except RuntimeError as error:
            raise CheckpointError(
                f"{where} does not fit its source modules, which were made from their classes and hyperparameters. "
                f"These may have changed, or lack arguments. {ask_for_module(self.tasks[0])} {error}"
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the source modules add to the checkpoint, each in a part for its task."""
        for task in self.sources_with("on_save_checkpoint"):
            given = {**checkpoint, WEIGHTS: _part(checkpoint.get(WEIGHTS, {}), task)}
            part = {**given, WEIGHTS: dict(given[WEIGHTS])}
            self.run_source(task, "on_save_checkpoint", part)
            _replace(checkpoint.get(WEIGHTS, {}), task, part.pop(WEIGHTS, {}))
            added = {name: value for name, value in part.items() if name not in given or value is not given[name]}
            checkpoint.setdefault(PARTS, {})[task] = _readable(added, task)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the source modules read what they added to the checkpoint."""
        parts = checkpoint.get(PARTS, {})
        for task in self.sources_with("on_load_checkpoint"):
            if task not in parts and task in self.sources_with("on_save_checkpoint"):
                continue  # the file was written without this source's `on_save_checkpoint`
            part = {**checkpoint, **parts.get(task, {}), WEIGHTS: _part(checkpoint.get(WEIGHTS, {}), task)}
            self.run_source(task, "on_load_checkpoint", part)
            _replace(checkpoint.get(WEIGHTS, {}), task, part[WEIGHTS])


def _part(state: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the entries of a state dict that belong to a source module, by their names in the source module."""
    prefix = f"sources.{task}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _replace(state: dict[str, Any], task: str, part: Mapping[str, Any]) -> None:
    """Replace the entries of a state dict that belong to a source module."""
    prefix = f"sources.{task}."
    for name in [name for name in state if name.startswith(prefix)]:
        if name.removeprefix(prefix) not in part:
            del state[name]
    state.update({f"{prefix}{name}": value for name, value in part.items()})


def _readable(added: dict[str, Any], task: str) -> dict[str, Any]:
    """Select what a file can hold that is read without running code, and warn about everything else."""
    kept = {name: value for name, value in added.items() if _is_readable(value)}
    if left := [name for name in added if name not in kept]:
        rank_zero_warn(
            f"`on_save_checkpoint` of task {task!r} adds {', '.join(map(repr, left))}, which is not saved: it is not "
            "made of tensors and primitives, so that the file could not be read with weights_only=True. Add a "
            "state_dict or plain values instead."
        )
    return kept


def _is_readable(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # any code can run in pickling
        return False
    return True


@contextmanager
def _emptied(sources: nn.Module) -> Iterator[None]:
    """Context manager in which layers whose tensors were merged away have no state, whatever their own methods do."""
    own = [module for module in sources.modules() if _is_empty(module)]
    for module in own:
        vars(module).update(dict.fromkeys(OWN_STATE, _nothing))
    try:
        yield
    finally:
        for module in own:
            for name in OWN_STATE:
                del vars(module)[name]


def _is_empty(module: nn.Module) -> bool:
    """Whether a module has names of parameters, and none of the parameters."""
    return bool(module._parameters) and not any(value is not None for value in module._parameters.values())


def _nothing(*args: Any) -> None:
    """Do nothing."""


@contextmanager
def _without(modules: nn.ModuleDict, names: Any) -> Iterator[None]:
    """Context manager in which a ``ModuleDict`` has ``None`` in place of some of its modules."""
    held = {name: modules[name] for name in names}
    modules._modules.update(dict.fromkeys(held))
    try:
        yield
    finally:
        modules._modules.update(held)
