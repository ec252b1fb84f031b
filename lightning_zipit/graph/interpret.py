"""Runs a traced graph on :mod:`~lightning_zipit.graph.values` instead of tensors, and records what ties features."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from lightning_zipit.errors import TraceError
from lightning_zipit.graph.spaces import Role
from lightning_zipit.graph.values import BATCH, Features, Ids, Opaque, Parameter, Plain, leaves

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""Operator (a module class, a function, or the name of a tensor method) → what it does to features."""
PRODUCERS: set[Rule] = set()
"""Rules whose output features are new whatever comes in."""


def register_rule(op_or_module: Any, rule: Rule) -> None:
    """Teach tracing an operator.

    Args:
        op_or_module: a module class, a function, or the name of a tensor method. A module class with a rule is not
            traced into.
        rule: ``rule(ctx, *args, **kwargs)`` for functions and methods, ``rule(ctx, module, *args, **kwargs)`` for
            modules. Tensors arrive as :class:`Features` (or :class:`Plain` where they hold none), parameters that a
            function is given as :class:`Parameter`, all else as it is. It returns the value of the output, and says
            with ``ctx.tie``, ``ctx.write`` and ``ctx.read`` what belongs together.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(channels))
        ...     def forward(self, x):
        ...         return torch.einsum("bchw,c->bchw", x, self.factor)
        >>> def scale(ctx, module, x):
        ...     ctx.write(ctx.parameter("factor"), 0, x)  # one factor per feature: same order as the features
        ...     return x
        >>> register_rule(Scale, scale)
    """
    RULES[op_or_module] = rule


@dataclass(frozen=True)
class Event:
    """An axis that holds features: of a parameter, or of a value that crosses into the heads (role ``None``)."""

    name: str
    axis: int
    entries: Ids
    role: Role | None
    value: Features
    node: fx.Node


class Context:
    """What rules talk to: makes features, ties them, and takes note of parameters that write or read them.

    Args:
        module: the traced backbone.
        shapes: sizes of tensors by node name, where an example input was given.
    """

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.module = module
        self.shapes = shapes
        self.events: dict[tuple[str, int], list[Event]] = {}
        self.pinned: list[Ids] = []
        self.opaque: list[Ids] = []
        self.node: fx.Node
        self._edges: list[tuple[Ids, Ids]] = []
        self._count = 0
        self._canonical: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._canonical.setdefault(id(tensor), name)

    def fresh(self, count: int) -> Ids:
        """New features, tied to nothing yet."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def tie(self, first: Ids, second: Ids) -> None:
        """Feature k of both must be merged alike."""
        if len(first) != len(second):
            raise self.error(f"it ties {len(first)} features to {len(second)}")
        if first is not second:
            self._edges.append((first, second))

    def pin(self, features: Features) -> None:
        """The features keep the order that they have: it means the same in all models."""
        self.pinned.append(features.ids)

    def parameter(self, name: str) -> Parameter | None:
        """A parameter or buffer of the module at hand, by its name there; ``None`` where it has none."""
        owner = self.module.get_submodule(str(self.node.target))
        tensor = getattr(owner, name)
        return None if tensor is None else self._named(tensor, f"{self.node.target}.{name}")

    def write(self, parameter: Parameter | None, axis: int, value: Features) -> None:
        """Entry k of the parameter's axis belongs to entry k of the feature axis, and makes it."""
        self._note(parameter, axis, value, value.entries(), "producer")

    def read(self, parameter: Parameter, axis: int, value: Features | Plain) -> None:
        """The parameter's axis is contracted with the feature axis."""
        if not isinstance(value, Features):
            return
        size = parameter.shape[axis]
        repeat = value.repeat if value.repeat is not None else size // len(value.ids)
        if len(value.ids) * repeat != size:
            raise self.error(
                f"`{parameter.name}` reads {size} entries, but it is given {len(value.ids)} features with "
                f"{value.repeat or 'an equal number of'} entries each"
            )
        self._note(parameter, axis, value, value.entries(repeat), "consumer")

    def error(self, reason: str, kind: type[TraceError] = TraceError) -> TraceError:
        """An error that names the operator at hand, where it stands, and the ways out."""
        return kind(
            f"{describe(self.node, self.module)} cannot be merged: {reason}. Teach it with "
            f"`lightning_zipit.graph.register_rule({_symbol(self.node, self.module)}, rule)`, hide the block behind a "
            "leaf module with a rule of its own, or merge less: another `backbone`, or a `stop_at` before it."
        )

    def components(self) -> Ids:
        """Per feature, the number of the set of features that it is tied to."""
        pairs = [np.concatenate(side) if side else np.empty(0, np.int64) for side in (*zip(*self._edges, strict=True),)]
        first, second = pairs or (np.empty(0, np.int64),) * 2
        ties = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(self._count, self._count))
        return connected_components(ties, directed=False)[1].astype(np.int64)

    def _named(self, tensor: torch.Tensor, name: str) -> Parameter:
        return Parameter(self._canonical.get(id(tensor), name), tuple(tensor.shape))

    def _note(self, parameter: Parameter | None, axis: int, value: Features, entries: Ids, role: Role | None) -> None:
        if parameter is None:
            return
        if role == "producer" and len(entries) != parameter.shape[axis]:
            raise self.error(f"`{parameter.name}` has {parameter.shape[axis]} entries for {len(entries)} features")
        known = self.events.setdefault((parameter.name, axis), [])
        if known:  # a parameter in two places
            self.tie(known[0].entries, entries)
        known.append(Event(parameter.name, axis, entries, role, value, self.node))

    def cross(self, value: Features) -> None:
        """Take note of a value that the heads read."""
        extent = Parameter(f"crossing {self.node.name}", ())
        self._note(extent, value.axis, value, value.entries(), None)

    # Interpreting nodes

    def run(self, nodes: list[fx.Node], values: dict[fx.Node, Any], tolerant: Container[fx.Node]) -> dict[fx.Node, Any]:
        """Values of all nodes; those of ``tolerant`` that no rule understands become :class:`Opaque`."""
        for node in nodes:
            if node in values:
                continue
            self.node = node
            try:
                values[node] = self._with_node(self._run_node(node, values), node)
            except TraceError:
                if node not in tolerant:
                    raise
                arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                touched = [value.ids for value in leaves(arguments) if isinstance(value, (Features, Opaque))]
                values[node] = Opaque(np.unique(np.concatenate(touched)) if touched else np.empty(0, np.int64))
                self.opaque.append(values[node].ids)
        return values

    def _with_node(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, Features):
            shape = self.shapes.get(node.name)
            if shape is not None and len(shape) == value.rank:
                value = value.with_shape(
                    *(BATCH if known is BATCH else size for size, known in zip(shape, value.shape, strict=True))
                )
            return replace(value, node=node)
        if isinstance(value, Plain) and value.shape is None and node.name in self.shapes:
            return Plain((BATCH, *self.shapes[node.name][1:]))
        return value

    def _run_node(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return Plain()
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return self._named(getattr(self.module.get_submodule(owner), name), str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            args = (self.module.get_submodule(str(node.target)), *args)  # type: ignore[arg-type]
        return self._apply(find_rule(node, self.module), args, kwargs)

    def _apply(self, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = list(leaves((args, kwargs)))
        opaque = [value.ids for value in inputs if isinstance(value, Opaque)]
        if opaque and rule not in PRODUCERS:
            raise self.error("an operator before it has no rule")
        if opaque:
            args = tuple(Plain() if isinstance(value, Opaque) else value for value in args)
        if rule is None and any(isinstance(value, Features) for value in inputs):
            raise self.error("no rule knows what it does to features")
        if rule is None:
            return self._constant(inputs)
        return rule(self, *args, **kwargs)

    def _constant(self, inputs: list[Any]) -> Any:
        """Arithmetic on sizes is done; whatever else touches no features is a plain tensor or an unknown number."""
        target = self.node.target
        if any(isinstance(value, (Plain, Parameter, nn.Module)) for value in inputs):
            return Plain()
        if callable(target) and target.__module__ in ("_operator", "math", "builtins"):
            known = all(isinstance(value, (int, float, str)) for value in inputs)
            return target(*inputs) if known else None
        return None


def find_rule(node: fx.Node, module: nn.Module) -> Rule | None:
    """The rule for a node's operator; a module class inherits that of its bases."""
    if node.op != "call_module":
        return RULES.get(node.target)
    classes = type(module.get_submodule(str(node.target))).__mro__
    return next((RULES[cls] for cls in classes if cls in RULES), None)


def _symbol(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op == "call_method":
        return repr(node.target)
    return getattr(node.target, "__name__", str(node.target))


def location(node: fx.Node) -> str:
    """The full name of the module whose forward calls the node."""
    stack = list(node.meta.get("nn_module_stack") or ())
    return stack[-1] if stack and stack[-1] else "the backbone's own forward"


def describe(node: fx.Node, module: nn.Module) -> str:
    """A node for people: its operator and the module that it is or stands in."""
    symbol = _symbol(node, module)
    if node.op == "call_module":
        return f"Module `{node.target}` ({symbol})"
    kind = {"call_method": "Tensor method", "call_function": "Function"}.get(node.op, "Node")
    return f"{kind} `{symbol.strip(chr(39))}` in `{location(node)}` (node `{node.name}`)"


__all__ = ["PRODUCERS", "RULES", "Context", "Event", "describe", "find_rule", "register_rule"]
