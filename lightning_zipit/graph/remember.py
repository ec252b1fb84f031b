"""Captures of this process, so that networks of one architecture are captured once."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit.graph.capture import Captured, at_other_sizes, capture, holds_for
from lightning_zipit.graph.joined import Joined, capture_joined
from lightning_zipit.graph.registry import operator_of_module
from lightning_zipit.graph.whole_modules import fold

KEPT = 64
"""Number of captures that are kept."""
DEPTH = 4
"""Levels of nested attributes that are compared."""
OF_EVERY_MODULE = frozenset({*vars(nn.Module()), "__orig_class__"}) - {"_forward_hooks", "_forward_pre_hooks"}
"""Attributes that do not tell what a forward computes, or are compared by the table of tensors."""


@dataclass
class _Known:
    """A capture, the kind of its input and network whatever their sizes, and the networks for which it holds."""

    captured: Captured
    kind: Any
    networks: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)


_known: OrderedDict[Any, _Known] = OrderedDict()


def capture_once(network: nn.Module, example: Any) -> Captured:
    """Capture a network, or return a capture of a network of the same architecture.

    A capture of another network is used only if its graph computes what this network computes. Modules with a record
    are whole in the graph.

    Args:
        network: the network; it is not changed.
        example: an input; see :func:`~lightning_zipit.graph.capture.capture`.

    Returns:
        A capture whose graph callers may change.

    Raises:
        CalibrationError: if the network cannot take the input.
        TraceError: if the network cannot be captured.
    """
    if isinstance(network, Joined):
        return capture_joined(network, example)
    example = Arguments.of(network).bind(Call.of(example))
    kind, _ = key = signature(network, example)
    known = _known.get(key)
    if known is None or not (network in known.networks or holds_for(known.captured, network, example)):
        known = _known[key] = _Known(_of_other_sizes(kind, network, example) or capture(network, example), kind)
    known.networks.add(network)
    _known.move_to_end(key)
    while len(_known) > KEPT:
        _known.popitem(last=False)
    captured = replace(known.captured, graph=copy.deepcopy(known.captured.graph))
    fold(captured.graph, network, _is_whole, captured.calls)
    return captured


def signature(network: nn.Module, call: Call) -> tuple[Any, Any]:
    """Return what is equal for networks of one architecture, and what for inputs of equal sizes, as far as can be told.

    Args:
        network: the network.
        call: an input.
    """
    return (_kind_of_input(call), tuple(_of_network(network))), _sizes_of_input(call)


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is one operator, with a record, of its own parameters."""
    computes = bool(module._forward_pre_hooks) or is_parametrized(module)  # such as weight norm
    return not computes and operator_of_module(module) is not None


def _of_other_sizes(kind: Any, network: nn.Module, example: Call) -> Captured | None:
    """A capture for other sizes of the input that holds for these; ``None`` if there is none."""
    found = (at_other_sizes(each.captured, network, example) for each in _known.values() if each.kind == kind)
    return next((captured for captured in found if captured is not None), None)


def _kind_of_input(call: Call) -> Any:
    kinds = tuple((tensor.dtype, tensor.device, tensor.ndim) for tensor in call.tensors)
    return str(call.structure), call.batched, kinds


def _sizes_of_input(call: Call) -> Any:
    return tuple(tuple(tensor.shape)[chosen:] for tensor, chosen in zip(call.tensors, call.batched, strict=True))


def _of_network(network: nn.Module) -> Iterator[Any]:
    """What tells networks apart: classes and attributes of modules, and shapes, types and ties of tensors."""
    first: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        yield name, type(module), getattr(type(module).forward, "__code__", None)
        yield from ((key, _of(value, DEPTH)) for key, value in vars(module).items() if key not in OF_EVERY_MODULE)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield key, _of(tensor, 1), tensor.device, first.setdefault(id(tensor), f"{name}.{key}")


def _of(value: Any, depth: int) -> Any:
    """What tells an attribute from others, as far as it can be told."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, FunctionType):
        return value.__code__, _of(value.__defaults__, depth - 1), _of_cells(value, depth - 1)
    if depth == 0 or isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, Mapping):
        return type(value), tuple((str(key), _of(part, depth - 1)) for key, part in value.items())
    if isinstance(value, (list, tuple, set)):
        return type(value), tuple(_of(part, depth - 1) for part in value)
    own = getattr(value, "__dict__", None)
    return (type(value), _of(own, depth - 1)) if isinstance(own, dict) else (type(value), repr(value))


def _of_cells(function: FunctionType, depth: int) -> Any:
    return tuple(_of(cell.cell_contents, depth) for cell in function.__closure__ or () if depth > 0)
