"""Errors of a capture: what stands in the way, in which module and line, and what to do."""

from __future__ import annotations

import traceback
from types import TracebackType

from torch import nn

from lightning_zipit._common.structure import UnknownContainerError
from lightning_zipit.errors import TraceError
from lightning_zipit.graph.decisions import PACKAGE, TORCH


def unknown_container(who: str, error: UnknownContainerError, does: str) -> TraceError:
    """The error for a value that is not known to hold tensors.

    Args:
        who: what to call the network.
        error: what was found.
        does: what the network does with the value: "takes" or "returns".
    """
    kind = error.kind.__name__
    way_out = (
        "If it is a cache of keys and values, switch it off (for models of Hugging Face, `model.config.use_cache = "
        "False`). Otherwise return tensors in tuples, lists, dicts or dataclasses, or register the type with "
        "`torch.utils._pytree.register_pytree_node`."
        if does == "returns"
        else "Give tensors in tuples, lists, dicts or dataclasses, or register the type with "
        "`torch.utils._pytree.register_pytree_node`."
    )
    return TraceError(f"{who} {does} a {kind} ({error.path}), which may hold tensors and does not say where. {way_out}")


def cannot_capture(network: nn.Module, who: str, error: Exception) -> TraceError:
    """The error for a network that torch.export cannot follow.

    Args:
        network: the network that was exported.
        who: what to call it.
        error: what torch.export raised.
    """
    if isinstance(error, TraceError):
        return error
    where = _where(network, error.__traceback__)
    path, line = where if where is not None else (None, "")
    inside = f" in module `{path}` ({type(network.get_submodule(path)).__name__})" if path else ""
    reason = str(error).strip().partition("\n")[0]
    others = _others(network, path)
    way_out = (
        f"Name a submodule without that line as `backbone`, such as {' or '.join(f'`{name}`' for name in others)}."
        if others
        else "Rewrite that line with operators on tensors, or name a submodule without it as `backbone`."
    )
    return TraceError(f"{who} cannot be captured{inside}{line}: {type(error).__name__}: {reason}\n{way_out}")


def _where(network: nn.Module, trace: TracebackType | None) -> tuple[str, str] | None:
    """The innermost module of the network whose forward was running, and the user's line."""
    names = {id(module): name for name, module in network.named_modules()}
    path, line = None, ""
    for frame, number in traceback.walk_tb(trace):
        name = frame.f_code.co_filename
        module = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))  # `self`, by whatever name
        if id(module) in names and frame.f_code.co_name not in ("_call_impl", "_wrapped_call_impl"):
            path = names[id(module)]
        if not name.startswith((TORCH, PACKAGE, "<")):
            line = f" at {name}:{number}, in {frame.f_code.co_name}"
    return (path, line) if path is not None else None


def _others(network: nn.Module, path: str | None) -> list[str]:
    """Submodules that the line is not in, with most parameters first."""
    if not path:
        return []
    first = path.partition(".")[0]
    sized = [
        (sum(parameter.numel() for parameter in child.parameters()), name)
        for name, child in network.named_children()
        if name != first
    ]
    return [name for count, name in sorted(sized, reverse=True)[:2] if count]
