"""Operators that compute something else in training mode, such as ``F.dropout(x, p, self.training)``."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.structure import Structure
from lightning_zipit.graph.decisions import TORCH, user_line
from lightning_zipit.graph.naming import modules_around
from lightning_zipit.graph.observe import observing
from lightning_zipit.graph.recurrent import WHOLE
from lightning_zipit.graph.replay import working_copy

IN_TRAINING = "in_training"
"""Key of the arguments of a node that have other values in training mode: their names, and these values."""
CALL = "call_in_a_mode"
"""Key of the call of :class:`NoteModes` that made a node."""

FLAGS = frozenset({"train", "training", "use_input_stats"})
RATES = frozenset({"p", "dropout_p"})
NAMES = {F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")}
"""Arguments of functions without a signature."""

Given: TypeAlias = "dict[str, Any]"
"""The numbers and flags that a call is given, by the name of the argument."""
Calls: TypeAlias = "dict[tuple[str, str], list[Given]]"
"""Calls in order, by line and function."""


def _noted() -> Iterator[Callable[..., Any]]:
    yield from (*NAMES, *WHOLE, torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.batch_norm)
    for function in vars(F).values():
        if inspect.isfunction(function) and (FLAGS | {"dropout_p"}) & inspect.signature(function).parameters.keys():
            yield function


NOTED = frozenset(_noted())
"""The functions of torch that depend on the mode."""


class NoteModes(TorchFunctionMode):
    """Notes the calls of functions that depend on the mode.

    Attributes:
        calls: what they were given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = defaultdict(list)

    def start(self) -> None:
        """Start over, as torch.export may run a forward several times."""
        self.calls.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in NOTED:
            return func(*args, **kwargs)
        mode = get_proxy_mode()
        before = next(iter(reversed(mode.tracer.graph.nodes)), None) if mode is not None else None
        made = func(*args, **kwargs)
        call = user_line(), func.__name__
        while before is not None and (before := before.next).op != "root":
            before.meta[CALL] = call, len(self.calls[call])
        self.calls[call].append(_given(func, args, kwargs))
        return made


def _given(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    if inspect.isfunction(func):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        named = bound.arguments
    else:
        names = NAMES.get(func, tuple(map(str, range(len(args)))))
        named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in named.items() if isinstance(value, (bool, int, float))}


def note_training(
    graph: fx.Graph, calls: Calls, network: nn.Module, inputs: Structure, tensors: Sequence[Tensor]
) -> tuple[str, ...]:
    """Note the arguments of a graph that have other values in training mode, by a run of the network in that mode.

    Args:
        graph: a captured graph; ``meta`` of its nodes is changed.
        calls: what the capture noted.
        network: the network; it is not changed.
        inputs: the structure of its arguments.
        tensors: the tensors of an input.

    Returns:
        Line and function of each call that does something in training mode alone, and that the graph does not have.
    """
    nodes = [node for node in graph.nodes if CALL in node.meta]
    if not nodes and not any(map(_reads_mode, network.modules())):
        return ()
    training = _calls_in_training(network, inputs, tensors)
    followed = set()
    for node in nodes:
        call, number = node.meta[CALL]
        if len(calls[call]) == len(training.get(call, ())):
            changed = _changed(node, calls[call][number], training[call][number])
            if changed:
                node.meta[IN_TRAINING] = changed
                followed.add(call)
    return tuple(
        f"`{function}` in {line}"
        for (line, function), given in training.items()
        if (line, function) not in followed
        and any(_matters(now, before) for now, before in zip(given, _padded(calls[line, function], given), strict=True))
    )


def _reads_mode(module: nn.Module) -> bool:
    """Whether the forward of a class that is not torch's own reads ``self.training``."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names and not code.co_filename.startswith(TORCH)


def _calls_in_training(network: nn.Module, inputs: Structure, tensors: Sequence[Tensor]) -> Calls:
    working = copy_module(working_copy(network))  # in training mode, a forward may write into its parameters
    for module in working.modules():
        module.training = not isinstance(module, nn.SyncBatchNorm)  # which waits for other processes
    args, kwargs = inputs.unflatten([each.clone() for each in tensors])
    try:
        with observing(), NoteModes() as noting:
            working(*args, **kwargs)
    except Exception:  # whatever a forward raises in training mode
        return {}
    return noting.calls


def _padded(calls: list[Given], given: list[Given]) -> list[Given | None]:
    return calls if len(calls) == len(given) else [None] * len(given)  # type: ignore[return-value]


def _matters(now: Given, before: Given | None) -> bool:
    """Whether a call in training mode does something that the call in eval mode did not."""
    return now != before and all(now[name] for name in (FLAGS | RATES) & now.keys())


def _changed(node: fx.Node, before: Given, now: Given) -> Given:
    """The arguments of a node that have another value in training mode."""
    if before == now or not isinstance(node.target, OpOverload):
        return {}
    switched_on = any(before.get(name) is False and value is True for name, value in now.items())
    found: Given = {}
    for name, value in _arguments(node).items():
        if name in FLAGS and switched_on and value is False:
            found[name] = True
        elif name in RATES and now.get(name, value) != value:
            found[name] = now[name]
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, with defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**defaults, **dict(zip((each.name for each in arguments), node.args, strict=False)), **node.kwargs}


def choose(training: bool, first: Any, second: Any) -> Any:
    """Return the first value in training mode, the second in eval mode."""
    return first if training else second


def switching(graph: fx.Graph, part: nn.Module) -> fx.Graph:
    """Return a graph in which the noted arguments follow the mode of the modules around them.

    Args:
        graph: the graph; it is not changed.
        part: the module that computes it.
    """
    if not any(IN_TRAINING in node.meta for node in graph.nodes):
        return graph
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        for name, value in node.meta.get(IN_TRAINING, {}).items():
            with graph.inserting_before(node):
                now: Any = graph.get_attr(f"{_module_around(node, part)}.training".removeprefix("."))
                before = _arguments(node)[name]
                if value is not True or before is not False:
                    now = graph.call_function(choose, (now, value, before))
            _set_argument(node, name, now)
    return graph


def _module_around(node: fx.Node, part: nn.Module) -> str:
    """The innermost module around a node that a part has."""
    names = dict(part.named_modules(remove_duplicate=False))
    return next((name for name in reversed(modules_around(node)) if name in names), "")


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    number = [each.name for each in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if number < len(node.args):
        node.update_arg(number, value)
    else:
        node.update_kwarg(name, value)
