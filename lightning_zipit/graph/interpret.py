"""Runs a traced graph on :mod:`~lightning_zipit.graph.values` instead of tensors, and records what ties features."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from lightning_zipit.errors import TraceError
from lightning_zipit.graph.naming import describe, symbol
from lightning_zipit.graph.registry import OPERATORS, Operator, Trait, operator_of
from lightning_zipit.graph.table import named_tensors
from lightning_zipit.graph.values import Features, Ids, Joined, Opaque, Parameter, Plain, Value, leaves

BASIC = ("weight", "bias")
"""Parameters that a rule may leave alone: they are positional where no features lie along them."""

EventKind: TypeAlias = Literal["producer", "consumer", "reader", "crossing", "entry"]


@dataclass(frozen=True)
class Event:
    """Something that holds features in an order: an axis of a parameter, or a value that is read where it is.

    Attributes:
        name: the parameter, or the node that reads.
        axis: the axis of the parameter.
        entries: the feature of every entry.
        kind: what it does with them; a reader has no weights, a crossing passes into the heads, and an entry
            comes from a stem.
        value: the tensor that is read.
        node: the node that reads or writes.
        groups: see :attr:`AxisRef.groups`.
        path: the name by which the node reads the parameter.
    """

    name: str
    axis: int
    entries: Ids
    kind: EventKind
    value: Features | None
    node: fx.Node
    groups: int = 1
    path: str = ""


@dataclass(frozen=True)
class Nesting:
    """Features that can be reordered within their unit, and across units only as far as whole units are.

    Attributes:
        members: the features of each unit, ``(units, features)``.
        units: the features that stand for the units, ``(units,)``.
        kind: for people: ``"groups"`` or ``"heads"``.
        node: the operator that nests them.
    """

    members: Ids
    units: Ids
    kind: str
    node: fx.Node


@dataclass(frozen=True)
class Projected:
    """Features that no node of the graph holds, as a linear function of a value.

    Attributes:
        ids: the features, one for each row of the weight.
        value: what the weight is applied to.
        weight: the parameter, ``(features, inputs)``.
        start: the row of the first of ``ids``.
        node: the operator that hides them.
    """

    ids: Ids
    value: Features
    weight: str
    start: int
    node: fx.Node


class Context:
    """What rules talk to: makes features, ties them, and takes note of parameters that write or read them.

    Args:
        module: the traced backbone.
        shapes: sizes of tensors by node name.
        barriers: names of nodes that are taken for operators without a rule.
    """

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], barriers: Container[str] = ()) -> None:
        self.module = module
        self.barriers = barriers
        self.shapes = shapes
        self.events: dict[tuple[str, int], list[Event]] = {}
        self.nestings: list[Nesting] = []
        self.projected: list[Projected] = []
        self.pinned: list[tuple[Ids, str]] = []
        self.mixed: list[Ids] = []
        self.opaque: list[Ids] = []
        self.node: fx.Node
        self.values: Mapping[fx.Node, Any] = {}
        self._edges: list[tuple[Ids, Ids]] = []
        self._count = 0
        self._canonical: dict[int, str] = {}
        for name, tensor in named_tensors(module).items():
            self._canonical.setdefault(id(tensor), name)

    # What rules say of features

    def fresh(self, *sizes: int) -> Ids:
        """New features, tied to nothing yet."""
        first = self._count
        self._count += int(np.prod(sizes))
        return np.arange(first, self._count).reshape(sizes)

    def tie(self, first: Ids, second: Ids) -> None:
        """Feature k of both must be merged alike."""
        if first.size != second.size:
            raise self.error(f"it ties {first.size} features to {second.size}")
        if first is not second:
            self._edges.append((first.ravel(), second.ravel()))

    def pin(self, features: Features | Ids, why: str) -> None:
        """The features keep the order that they have: it means the same in all models."""
        self.pinned.append((features.ids.ravel() if isinstance(features, Features) else features.ravel(), why))

    def units(self, members: Ids, kind: str, units: Ids | None = None) -> Ids:
        """Features that stand for the rows of ``members``, which can be reordered only as wholes.

        Args:
            members: the features of each unit, ``(units, features)``.
            kind: for people: what a unit is.
            units: the features that stand for them, where there are some already.

        Returns:
            ``(units,)``.
        """
        if members.shape[1] == 1:
            if units is not None:
                self.tie(units, members[:, 0])
            return members[:, 0]
        units = self.fresh(len(members)) if units is None else units
        if len(members) > 1:
            self.nestings.append(Nesting(members, units, kind, self.node))
        return units

    def mix(self, features: Features) -> None:
        """The operator mixes the features symmetrically: they can be reordered, but not unmerged behind it."""
        self.mixed.append(features.ids.ravel())

    @property
    def rank(self) -> int:
        """The number of axes of the tensor that the operator at hand returns."""
        return len(self.shapes[self.node.name])

    def concrete(self, node: fx.Node) -> Any:
        """A number or size as it is; an index tensor that comes from buffers alone, and zeros for any other tensor."""
        value = self.values[node]
        if not isinstance(value, (Features, Parameter, Plain)):
            return value
        index = self._from_buffers(node)
        return torch.zeros(value.shape or (), dtype=torch.int64) if index is None else index

    def _from_buffers(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            tensor = attrgetter(str(node.target))(self.module)
            return None if tensor.is_floating_point() or tensor.is_meta else tensor.detach().cpu()
        inputs = {source: self._from_buffers(source) for source in node.all_input_nodes}
        if node.op not in ("call_function", "call_method") or not inputs or any(x is None for x in inputs.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
        run = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        return run(*args, **kwargs)

    # What rules say of parameters

    def parameter(self, name: str) -> Parameter | None:
        """A parameter or buffer of the module at hand, by its name there; ``None`` where it has none."""
        full_name = f"{self.node.target}.{name}"
        tensor = attrgetter(full_name)(self.module)
        return None if tensor is None else self._named(tensor, full_name)

    def weight(self, name: str = "weight") -> Parameter:
        """A parameter that the module at hand must have."""
        parameter = self.parameter(name)
        if parameter is None:
            raise self.error(f"it has no `{name}`")
        return parameter

    def write(self, parameter: Parameter | None, axis: int, value: Features | Ids, groups: int = 1) -> None:
        """Entry k of the parameter's axis belongs to entry k of the feature axis, and makes it.

        With ``groups``, entry k of a row in the parameter's g-th part belongs to entry k of the g-th part of the
        features.
        """
        self._note(parameter, axis, value, "producer", groups)

    def read(self, parameter: Parameter, axis: int, value: Value | Ids, groups: int = 1) -> None:
        """The parameter's axis is contracted with the feature axis; for ``groups`` see :meth:`write`."""
        if not isinstance(value, (Plain, Parameter)):
            self._note(parameter, axis, value, "consumer", groups)

    def observe(self, value: Features) -> None:
        """The features are read here by an operator without weights, such as the product of queries and keys."""
        if value.node is not None:  # else it is an intermediate of a fused operator
            name = f"{self.node.name} {value.node.name}"
            self._add(Event(name, 0, value.ids.ravel(), "reader", value, self.node))

    def project(self, ids: Ids, value: Value, weight: Parameter, start: int = 0) -> None:
        """The features are rows of a weight applied to a value, and no node holds them: how to measure them."""
        if isinstance(value, Features) and value.axes == (value.rank - 1,):
            self.projected.append(Projected(ids.ravel(), value, weight.name, start, self.node))

    def error(self, reason: str, fatal: bool = False) -> TraceError:
        """An error that names the operator at hand, where it stands, and the ways out.

        It makes the operator a barrier, unless it is ``fatal``.
        """
        error = TraceError(
            f"{describe(self.node, self.module)} cannot be merged: {reason}. Teach it with "
            f"`lightning_zipit.graph.register_rule({symbol(self.node, self.module)}, rule)`, hide the block behind a "
            "leaf module with a rule of its own, or merge less: another `backbone`, or a `stop_at` before it."
        )
        error.node = None if fatal else self.node.name
        return error

    def cross(self, value: Features) -> None:
        """Take note of a value that the heads read."""
        self._add(Event(f"crossing {self.node.name}", value.axes[0], value.ids.ravel(), "crossing", value, self.node))

    def enter(self, value: Features) -> None:
        """Take note of a value that a stem hands over."""
        self._add(Event(f"entry {self.node.name}", value.axes[0], value.ids.ravel(), "entry", value, self.node))

    def forget(self) -> None:
        """Forget what rules said so far; features that were tied stay tied."""
        self.events, self.nestings, self.projected = {}, [], []
        self.pinned, self.mixed, self.opaque = [], [], []

    def _named(self, tensor: torch.Tensor, name: str) -> Parameter:
        known = self._canonical.get(id(tensor))
        if known is None and not isinstance(tensor, nn.UninitializedParameter):
            raise self.error(
                f"its `{name.rpartition('.')[2]}` is computed from other parameters; take weight norm and the like off "
                "first, with `torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')` or "
                "`torch.nn.utils.remove_weight_norm(module)`, on a copy of the trained model",
                fatal=True,
            )
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise self.error("it has no weight yet: run a batch through the model before merging it", fatal=True)
        return Parameter(known or name, tuple(tensor.shape), tuple(range(tensor.ndim)), name)

    def _note(
        self, parameter: Parameter | None, axis: int, value: Features | Ids, kind: EventKind, groups: int
    ) -> None:
        if parameter is None:
            return
        if isinstance(parameter, Joined):
            ids = (value.ids if isinstance(value, Features) else value).ravel()
            bounds = np.cumsum([part.shape[0] for part in parameter.parts])
            for part, held in zip(parameter.parts, np.split(ids, bounds[:-1]), strict=True):
                self._note(part, axis, held, kind, groups)
            return
        if not isinstance(parameter, Parameter):
            raise self.error("one of its parameters is not a parameter of the network, but computed from others")
        entries, tensor = (value.ids, value) if isinstance(value, Features) else (value, None)
        if entries.size != groups * parameter.shape[axis]:
            raise self.error(
                f"`{parameter.name}` has {groups * parameter.shape[axis]} entries for {entries.size} features"
            )
        origin = parameter.axes[axis]
        if origin is None:
            raise self.error(
                f"`{parameter.name}` is reshaped in a way that hides which of its entries is which feature"
            )
        path = parameter.path or parameter.name
        self._add(Event(parameter.name, origin, entries.ravel(), kind, tensor, self.node, groups, path))

    def _add(self, event: Event) -> None:
        known = self.events.setdefault((event.name, event.axis), [])
        if known:  # a parameter in two places
            self.tie(known[0].entries, event.entries)
        known.append(event)

    # What is tied in the end

    def components(self) -> Ids:
        """Per feature, the number of the set of features that it is tied to; units of one feature are tied too."""
        while True:
            component = self._connected()
            pairs = [
                (component[nesting.members].ravel(), np.repeat(component[nesting.units], nesting.members.shape[1]))
                for nesting in self.nestings
            ]
            if not pairs:
                return component
            members, units = (np.concatenate(side) for side in zip(*pairs, strict=True))
            order = np.lexsort((units, members))
            members, units = members[order], units[order]
            several = (members[1:] == members[:-1]) & (units[1:] != units[:-1])
            if not several.any():
                return component
            first = np.zeros(self._count, np.int64)
            first[component] = np.arange(self._count)  # a feature of each component
            self._edges.append((first[units[1:][several]], first[units[:-1][several]]))

    def _connected(self) -> Ids:
        if not self._edges:
            return np.arange(self._count)
        first, second = (np.concatenate(side) for side in zip(*self._edges, strict=True))
        ties = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(self._count, self._count))
        return connected_components(ties, directed=False)[1].astype(np.int64)

    # Interpreting nodes

    def run(self, nodes: list[fx.Node], values: dict[fx.Node, Any], tolerant: Container[fx.Node]) -> dict[fx.Node, Any]:
        """Values of all nodes; those of ``tolerant`` that no rule understands become :class:`Opaque`."""
        self.values = values
        for node in nodes:
            if node in values:
                continue
            self.node = node
            try:
                if node.name in self.barriers:
                    raise self.error("it is a barrier")
                values[node] = self._with_node(self._run_node(node, values), node)
            except TraceError:
                if node not in tolerant:
                    raise
                arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                touched = [value.ids.ravel() for value in leaves(arguments) if isinstance(value, (Features, Opaque))]
                values[node] = Opaque(np.unique(np.concatenate(touched)) if touched else np.empty(0, np.int64))
                self.opaque.append(values[node].ids)
        return values

    def _with_node(self, value: Any, node: fx.Node) -> Any:
        shape = self.shapes.get(node.name)
        if isinstance(value, Features):
            return replace(value, shape=shape or value.shape, node=node)
        return Plain(shape) if isinstance(value, Plain) and shape is not None else value

    def _run_node(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return Plain()
        if node.op == "get_attr":
            tensor = attrgetter(str(node.target))(self.module)
            if not isinstance(tensor, torch.Tensor):
                return tensor
            known = id(tensor) in self._canonical
            return self._named(tensor, str(node.target)) if known else Plain(tuple(tensor.shape))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            args = (self.module.get_submodule(str(node.target)), *args)  # type: ignore[arg-type]
        return self._apply(operator_of(node, self.module), args, kwargs)

    def _apply(self, known: Operator | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = list(leaves((args, kwargs)))
        opaque = [value.ids for value in inputs if isinstance(value, Opaque)]
        if opaque and not (known is not None and Trait.PRODUCER in known.traits):
            raise self.error("an operator before it has no rule")
        if opaque:
            args = tuple(Plain() if isinstance(value, Opaque) else value for value in args)
        if known is None and any(isinstance(value, Features) for value in inputs):
            raise self.error("no rule knows what it does to features")
        if known is None:
            return self.constant(inputs)
        value = known.rule(self, *args, **kwargs)
        if self.node.op == "call_module":
            self._check_parameters(args[0])
        return value

    def _check_parameters(self, module: nn.Module) -> None:
        """A subclass that inherits a rule must not have parameters that the rule knows nothing of."""
        for name, parameter in module.named_parameters():
            full = self._canonical.get(id(parameter))
            known = any((full, axis) in self.events for axis in range(parameter.ndim))
            if parameter.numel() > 1 and not known and name not in BASIC and type(module) not in OPERATORS:
                raise self.error(
                    f"the rule that it inherits does not know its parameter `{name}`, which would not be merged"
                )

    def constant(self, inputs: list[Any]) -> Any:
        """Arithmetic on sizes is done; whatever else touches no features is a plain tensor or an unknown number."""
        target = self.node.target
        if self.node.name in self.shapes:
            return Plain(self.shapes[self.node.name])
        if any(isinstance(value, (Plain, Parameter, nn.Module)) for value in inputs):
            return Plain()
        if callable(target) and target.__module__ in ("_operator", "math", "builtins"):
            known = all(isinstance(value, (int, float, str)) for value in inputs)
            return target(*inputs) if known else None
        return None if self.node.op != "call_function" else Plain()
