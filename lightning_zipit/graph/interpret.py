"""Abstract interpretation of a captured graph: rules run on features instead of numbers, and record ties."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_zipit.errors import TraceError, ZipItError
from lightning_zipit.graph.constants import Constants
from lightning_zipit.graph.events import Event, EventKind, Nesting, Projected
from lightning_zipit.graph.explain import counts, unexplained
from lightning_zipit.graph.naming import describe_node, symbol
from lightning_zipit.graph.order import varying
from lightning_zipit.graph.registry import Operator, Trait, operator_of, spelled, writes_in_place
from lightning_zipit.graph.table import named_tensors
from lightning_zipit.graph.ties import Ties
from lightning_zipit.graph.values import Entries, Features, Ids, Opaque, Parameter, Plain, Value, leaves, parts_of

UNSEEN = Trait.REARRANGE | Trait.IDENTITY | Trait.SHAPE
"""Traits of operators that leave every feature unchanged."""


class Context(Ties):
    """The interface for operator rules: creates features, ties them, and records the parameters that use them.

    Args:
        module: the traced backbone.
        shapes: shapes of tensors by node name.
        barriers: names of nodes that are treated as operators without a rule.
    """

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], barriers: Container[str] = ()) -> None:
        super().__init__()
        self.module = module
        self.barriers = barriers
        self.shapes = shapes
        self.projected: list[Projected] = []
        self.pinned: list[tuple[Ids, str]] = []
        self.mixed: list[Ids] = []
        self.opaque: list[Ids] = []
        self.touched: dict[bytes, Ids] = {}
        self.node: fx.Node
        self.shared = True
        self.values: Mapping[fx.Node, Any] = {}
        self._constants = Constants(module)
        self._explained: set[str] = set()
        self._varying: set[fx.Node] = set()
        self._aligned: list[tuple[fx.Node, Parameter, int, Ids]] = []
        self._canonical: dict[int, str] = {}
        self._buffers = {id(tensor) for tensor in module.buffers()}
        for name, tensor in named_tensors(module).items():
            self._canonical.setdefault(id(tensor), name)

    # Features

    def tie(self, first: Ids, second: Ids) -> None:
        """Tie feature k of both, so that they are merged alike."""
        if first.size != second.size:
            raise self.error(f"it ties {first.size} features to {second.size} features")
        super().tie(first, second)

    def pin(self, features: Features | Ids, why: str) -> None:
        """Pin the order of features, because it means the same in all models. ``why`` gives the reason."""
        self.pinned.append((features.ids.ravel() if isinstance(features, Features) else features.ravel(), why))

    def units(self, members: Ids, kind: str, units: Ids | None = None) -> Ids:
        """Group features into units, such as heads, that can be reordered only as a whole.

        Args:
            members: the features of each unit, ``(units, features)``.
            kind: plural name of the units for messages, such as ``"heads"``.
            units: existing features that represent the units; new ones by default.

        Returns:
            The features that represent the units, ``(units,)``.
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
        """Record a permutation-invariant operator: its features can be reordered, but not unmerged after it."""
        self.mixed.append(features.ids.ravel())

    @property
    def rank(self) -> int:
        """The number of axes of the current operator's output."""
        return len(self.shapes[self.node.name])

    def concrete(self, node: fx.Node, unknown: int = 0) -> Any:
        """Return the value of an argument: a number or size itself, or a tensor that does not depend on data.

        Args:
            node: an argument of the current operator.
            unknown: placeholder for each entry of a tensor that depends on data.
        """
        value = self.values[node]
        if not isinstance(value, (Features, Parameter, Plain)):
            return value
        known = self._constants[node]
        return torch.full(value.shape or (), unknown, dtype=torch.int64) if known is None else known

    def known(self, node: fx.Node) -> bool:
        """Whether a node's value is independent of data."""
        return self._constants[node] is not None

    # Parameters

    def parameter(self, name: str) -> Parameter | None:
        """Return a parameter or buffer of the current module by its name; ``None`` if the attribute is ``None``."""
        full_name = f"{self.node.target}.{name}"
        tensor = attrgetter(full_name)(self.module)
        return None if tensor is None else self._named(tensor, full_name)

    def weight(self, name: str = "weight") -> Parameter:
        """Return a required parameter of the current module.

        Raises:
            TraceError: if the attribute is ``None``.
        """
        parameter = self.parameter(name)
        if parameter is None:
            raise self.error(f"it has no `{name}`")
        return parameter

    def write(self, parameter: Parameter | None, axis: int, value: Value | Ids, groups: int = 1) -> None:
        """Record that entry k of the parameter's axis writes feature k of the value.

        With ``groups``, entry k of a row in the parameter's g-th part writes feature k of the g-th part of the
        features. If the value holds no features, the axis corresponds to its positions.
        """
        if isinstance(value, (Plain, Parameter)):
            self.positional(parameter)
        else:
            self._note(parameter, axis, value, "producer", groups)

    def align(self, parameter: Parameter, axis: int, ids: Ids) -> None:
        """Record a parameter that has the order of an axis of another, such as a vector of spectral norm.

        Its entries keep their order if no other operator gives the other axis features.
        """
        self.positional(parameter)
        self._aligned.append((self.node, parameter, axis, ids))

    def _settle(self) -> None:
        """Write parameters in the order of another axis, if that axis holds features, and drop units of one feature."""
        aligned, self._aligned = self._aligned, []
        component = self.drop_single_units()
        if not aligned:
            return
        used = [component[event.entries] for events in self.events.values() for event in events]
        held = np.unique(np.concatenate(used)) if used else np.empty(0, np.int64)
        for self.node, parameter, axis, ids in aligned:
            if np.isin(component[ids], held).any():
                self.write(parameter, axis, ids)

    def positional(self, *parameters: Any) -> None:
        """Record parameters whose entries keep their order: they correspond to input positions, or are not read."""
        for parameter in leaves(parameters):
            self._explained.update(part.name for part in parts_of(parameter))

    def read(self, parameter: Parameter, axis: int, value: Value | Ids, groups: int = 1) -> None:
        """Record that the parameter's axis is contracted with the feature axis; for ``groups`` see :meth:`write`."""
        if not isinstance(value, (Plain, Parameter)):
            self._note(parameter, axis, value, "consumer", groups)

    def observe(self, value: Features) -> None:
        """Record an operator that reads features without weights, such as the product of queries and keys."""
        if value.node is not None and self._measured(value) is not None:
            name = f"{self.node.name} {value.node.name}"
            self._record(Event(name, 0, value.ids.ravel(), "reader", value, self.node))

    def project(self, ids: Ids, value: Value, weight: Parameter, start: int = 0) -> None:
        """Record how to measure features that no node holds: as rows of a weight applied to a value."""
        if isinstance(value, Features) and value.axes == (value.rank - 1,):
            self.projected.append(Projected(ids.ravel(), value, weight.name, start, self.node))

    def error(self, reason: str, fatal: bool = False) -> TraceError:
        """Build an error that names the current operator, its location, and the remedies.

        The error makes the operator a barrier, unless it is ``fatal``.
        """
        error = TraceError(
            f"{describe_node(self.node, self.module)} cannot be merged: {reason}. Register a rule with "
            f"`lightning_zipit.graph.register_rule({symbol(self.node, self.module)}, rule)`, register a rule for a "
            "module that contains the operator, or merge less: choose another `backbone`, or a `stop_at` before it."
        )
        error.node = None if fatal else self.node.name
        return error

    def cross(self, value: Features) -> None:
        """Record a value that the heads read."""
        self._record(
            Event(f"crossing {self.node.name}", value.axes[0], value.ids.ravel(), "crossing", value, self.node)
        )

    def enter(self, value: Features) -> None:
        """Record a value that a stem passes to the trunk."""
        self._record(Event(f"entry {self.node.name}", value.axes[0], value.ids.ravel(), "entry", value, self.node))

    def forget(self) -> None:
        """Discard all records of rules. Tied features stay tied."""
        self.events, self.nestings, self.projected = {}, [], []
        self.pinned, self.mixed, self.opaque, self.touched = [], [], [], {}

    def _record(self, event: Event) -> None:
        self._explained.add(event.name)
        self.add(event)

    def _named(self, tensor: torch.Tensor, name: str) -> Parameter:
        known = self._canonical.get(id(tensor))
        if known is None and not isinstance(tensor, nn.UninitializedParameter):
            raise self.error(
                f"its `{name.rpartition('.')[2]}` is computed outside the forward, and is no parameter or buffer of "
                "the network",
                fatal=True,
            )
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise self.error(
                "its weight is not initialized yet; run a batch through the model before merging it", fatal=True
            )
        constant = id(tensor) in self._buffers
        return Parameter(known or name, tuple(tensor.shape), tuple(range(tensor.ndim)), name, counts(tensor), constant)

    def _note(
        self, parameter: Parameter | None, axis: int, value: Features | Ids, kind: EventKind, groups: int
    ) -> None:
        if parameter is None:
            return
        if not isinstance(parameter, Parameter):
            raise self.error("one of its parameters is computed from others and is not a parameter of the network")
        entries, tensor = (value.ids, self._measured(value)) if isinstance(value, Features) else (value, None)
        if entries.size != groups * parameter.shape[axis]:
            raise self.error(
                f"`{parameter.name}` has {groups * parameter.shape[axis]} entries for {entries.size} features"
            )
        shown = parameter.along(axis)
        if shown is None:
            raise self.error(f"`{parameter.name}` is reshaped in a way that hides which entry belongs to which feature")
        self._explained.update(part.name for part in parts_of(parameter))
        for part in shown.all():
            self._note_entries(part, entries.ravel(), kind, tensor, groups)

    def _note_entries(self, shown: Entries, held: Ids, kind: EventKind, value: Features | None, groups: int) -> None:
        """Record that some entries of parameters write or read features, one each."""
        for number, (source, axis, size) in enumerate(shown.of):
            chosen = np.flatnonzero(shown.which == number)
            rows = shown.rows[chosen]
            whole = len(rows) == size and (np.sort(rows) == np.arange(size)).all()
            if groups > 1 and not (whole and len(shown.of) == 1):
                raise self.error(f"it reads a part of `{source.name}` in groups")
            if groups > 1:
                features = held
            elif whole:
                features = held[chosen[np.argsort(rows)]]
            else:
                features = self.numbered(source, axis, size)
                self.tie(features[rows], held[chosen])
                if value is not None and kind == "consumer":
                    self.observe(value)
            known = value if whole else None
            path = source.path or source.name
            self._record(Event(source.name, axis, features, kind, known, self.node, groups, path))

    def _measured(self, value: Features) -> Features | None:
        """Return a value if a node holds it that depends on the input; ``None`` if it cannot be measured."""
        if value.node is None:  # an intermediate value of a fused operator, or a parameter
            return None
        if not self._varying:
            self._varying = varying(value.node.graph.nodes)
        return value if value.node in self._varying else None

    # Interpretation of nodes

    def run(self, nodes: list[fx.Node], values: dict[fx.Node, Any], tolerant: Container[fx.Node]) -> dict[fx.Node, Any]:
        """Interpret nodes in order.

        Args:
            nodes: the nodes to interpret.
            values: known values by node; they are extended.
            tolerant: nodes that become :class:`Opaque` if no rule supports them.

        Returns:
            The values of all nodes.

        Raises:
            TraceError: if no rule supports a node outside ``tolerant``.
        """
        self.values = values
        for node in nodes:
            if node in values:
                continue
            self.node, self.shared = node, node not in tolerant
            try:
                if node.name in self.barriers:
                    raise self.error("it is a barrier")
                values[node] = self._with_node(self._run_node(node, values), node)
                self._constants.take(node, values)
                if isinstance(values[node], Plain) and self.known(node):
                    values[node] = replace(values[node], alike=self._constants.alike(node))
            except TraceError:
                if node not in tolerant:
                    raise
                arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                touched = [value.ids.ravel() for value in leaves(arguments) if isinstance(value, (Features, Opaque))]
                values[node] = Opaque(np.unique(np.concatenate(touched)) if touched else np.empty(0, np.int64))
                self.opaque.append(values[node].ids)
        self._settle()
        return values

    def _with_node(self, value: Any, node: fx.Node) -> Any:
        shape = self.shapes.get(node.name)
        if isinstance(value, Features):
            held = dict(enumerate(shape or ()))
            if value.ids.shape != tuple(held.get(axis) for axis in value.axes):
                raise self.error("its rule returns features that do not match the axes of its output")
            return replace(value, shape=shape or (), node=node)
        return replace(value, shape=shape) if isinstance(value, Plain) and shape is not None else value

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
        if any(isinstance(value, Opaque) for value in inputs):
            if known is None or Trait.PRODUCER not in known.traits:
                raise self.error("an operator before it has no rule")
            args = tuple(Plain() if isinstance(value, Opaque) else value for value in args)
        if known is None and any(isinstance(value, Features) for value in inputs):
            raise self.error("no rule is registered for it")
        self._explained = set()
        value = self.constant(inputs) if known is None else self._follow(known, args, kwargs)
        missing = unexplained(self.node, self.module, self._canonical, (args, kwargs), value, self._explained)
        if missing and (self.shared or any(isinstance(value, Features) for value in inputs)):
            raise self.error(
                f"the order of entries is unknown in {', '.join(f'`{name}`' for name in missing)}; they belong neither "
                "to known features nor to positions of the input"
            )
        return value

    def _follow(self, known: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply an operator's rule. Any exception in the rule makes the operator a barrier."""
        named = spelled(known.rule, kwargs)
        if named.pop("out", None) is not None:
            raise self.error("it writes its result into another tensor (`out`)")
        try:
            value = known.rule(self, *args, **named)
        except ZipItError:
            raise
        except Exception as error:
            raise self.error(f"its rule failed with a {type(error).__name__} ({error})") from error
        if not known.traits & UNSEEN:
            given = [part.ids.ravel() for part in leaves((args, kwargs)) if isinstance(part, Features)]
            self.touched.update((ids.tobytes(), ids) for ids in given)
        if isinstance(value, Features) and writes_in_place(self.node, self.module):
            target = [*args, *kwargs.values()][self.node.op == "call_module"]
            if not isinstance(target, Features) or target.axes != value.axes or (target.ids != value.ids).any():
                raise self.error("it writes features in place into a tensor that does not hold them")
        return value

    def constant(self, inputs: list[Any]) -> Any:
        """Return the value of an operator without features: computed sizes, a plain tensor, or ``None`` if unknown."""
        self.positional([value for value in inputs if isinstance(value, Parameter) and value.constant])
        if self.node.name in self.shapes:
            return Plain(self.shapes[self.node.name])
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), self.values.__getitem__)
        given, target = list(leaves((args, kwargs))), self.node.target
        if any(isinstance(value, (Plain, Parameter, nn.Module)) for value in (*inputs, *given)):
            return Plain()
        if callable(target) and target.__module__ in ("_operator", "math", "builtins"):
            known = all(isinstance(value, (int, float, str)) for value in given)
            return target(*args, **kwargs) if known else None
        return None if self.node.op != "call_function" else Plain()
