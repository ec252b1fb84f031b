"""Layers that no merge can read: without weights, quantised, or compiled by `torch.jit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def find_unmergeable(network: nn.Module) -> str | None:
    """Explain why layers of a network cannot be merged, and what to do; ``None`` if nothing is known.

    Args:
        network: the network.
    """
    named = dict(network.named_modules())
    if lazy := [name for name, module in named.items() if any(map(is_lazy, _own_tensors(module)))]:
        return (
            f"its layer {_quoted(lazy)} is lazy, and has no weights yet. Run the network on a batch before the merge, "
            "and load its trained weights."
        )
    if scripted := [name for name, module in named.items() if isinstance(module, torch.jit.ScriptModule)]:
        return (
            f"its layer {_quoted(scripted)} is a module of torch.jit, whose computation cannot be traced. Make the "
            "module from its Python class, and load the weights: module.load_state_dict(scripted.state_dict())."
        )
    if quantised := [name for name, module in named.items() if any(map(_is_quantised, _state_of(module)))]:
        return (
            f"its layer {_quoted(quantised)} has quantised weights, which cannot be averaged. Merge the networks "
            "before they are quantised, and quantise the merged module."
        )
    return None


def _quoted(names: list[str]) -> str:
    return f"`{names[0]}`" if names[0] else "(the whole network)"


def _own_tensors(module: nn.Module) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _state_of(module: nn.Module) -> Iterator[Any]:
    """List what a module itself holds: its tensors, and the packed weights in its state."""
    yield from _own_tensors(module)
    if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
        state: dict[str, Any] = {}
        module._save_to_state_dict(state, "", True)
        yield from state.values()


def _is_quantised(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_quantized or (is_traceable_wrapper_subclass(value) and not hasattr(value, "device_mesh"))
    if isinstance(value, Mapping):
        return any(map(_is_quantised, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_is_quantised, value))
