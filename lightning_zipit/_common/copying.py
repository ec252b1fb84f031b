"""Deep copies of modules that hold tensors with gradient history."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Copied = TypeVar("Copied", bound=nn.Module)


def copy_module(module: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """Copy a module deeply, including tensors with gradient history.

    A forward can store tensors with gradient history in a module, such as a weight computed by weight norm, or features
    kept by a hook. ``copy.deepcopy`` fails for these tensors. Here, the copy holds them detached.

    A hook can be a function that closes over the module or a list of it. ``copy.deepcopy`` returns the same function.
    Here, the hook of the copy closes over the copy.

    Args:
        module: the module. It is not changed.
        memo: replacements for objects that are not to be copied, by the ``id`` of the object.
    """
    memo = {} if memo is None else memo
    for empty in _empty_registries(module):  # most of the objects of a network; deepcopy would spend half its time here
        memo.setdefault(id(empty), type(empty)())
    for scripted in _scripted(module):
        memo.setdefault(id(scripted), _copy_scripted(scripted))
    for tensor in _tensors_with_history(module):
        memo.setdefault(id(tensor), tensor.detach().clone())
    copied = copy.deepcopy(module, memo)
    for each in copied.modules() if isinstance(copied, nn.Module) else ():
        close_over_copies(vars(each), memo)
    return copied


def _scripted(module: nn.Module) -> Iterator[torch.jit.ScriptModule]:
    """Find the modules of torch.jit that are not inside another one."""
    for child in module.children():
        if isinstance(child, torch.jit.ScriptModule):
            yield child
        else:
            yield from _scripted(child)


def _copy_scripted(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Copy a module of torch.jit. Outside ``no_grad``, its parameters would have a gradient history."""
    with torch.no_grad():
        copied = copy.deepcopy(module)
    for new, old in zip(copied.parameters(), module.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return copied


def close_over_copies(values: dict[Any, Any], memo: dict[int, Any]) -> None:
    """Replace functions in a dict, and in dicts in it, by functions that close over copies; see :func:`copy_module`.

    Args:
        values: the attributes or hooks of a copied module. The dict is changed.
        memo: the copies by the ``id`` of the original.
    """
    for name, value in values.items():
        if isinstance(value, FunctionType):
            values[name] = _closed_over_copies(value, memo)
        elif isinstance(value, dict) and any(isinstance(each, FunctionType) for each in value.values()):
            close_over_copies(value, memo)


def _closed_over_copies(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function  # it may close over itself
    cells = function.__closure__ or ()
    copies = tuple(_copied(cell, memo) for cell in cells)
    if any(new is not cell for new, cell in zip(copies, cells, strict=True)):
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, copies)
        made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        memo[id(function)] = made
    return memo[id(function)]


def _copied(cell: CellType, memo: dict[int, Any]) -> CellType:
    """Copy a cell of a closure if it holds a module, a container, or a function that closes over one."""
    try:
        content = cell.cell_contents
    except ValueError:  # the name has no value yet
        return cell
    if isinstance(content, FunctionType):
        new: Any = _closed_over_copies(content, memo)
    elif isinstance(content, (nn.Module, dict, list, set)) and not any(content is copied for copied in memo.values()):
        new = copy.deepcopy(content, memo)  # a metric closes over itself already when it is copied
    else:
        return cell
    return cell if new is content else CellType(new)


def _empty_registries(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Find the registries of hooks, parameters, buffers and submodules that are empty."""
    for each in module.modules():
        for value in vars(each).values():
            if type(value) in (dict, OrderedDict) and not value:
                yield value


def _tensors_with_history(module: nn.Module) -> Iterator[Tensor]:
    """Find tensors with gradient history in attributes, in containers, and in modules that hooks refer to."""
    waiting: list[Any] = [module]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, nn.Module):
            waiting += [each for name, each in vars(value).items() if name != "_trainer"]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
