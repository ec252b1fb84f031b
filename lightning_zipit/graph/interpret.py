"""Runs a traced graph on :mod:`~lightning_zipit.graph.values` instead of tensors, and records what ties features."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from lightning_zipit.errors import TraceError, ZipItError
from lightning_zipit.graph.constants import Constants
from lightning_zipit.graph.events import Event, EventKind, Nesting, Projected
from lightning_zipit.graph.explain import counts, unexplained
from lightning_zipit.graph.naming import describe, symbol
from lightning_zipit.graph.registry import Operator, Trait, operator_of, spelled, writes_in_place
from lightning_zipit.graph.table import named_tensors
from lightning_zipit.graph.values import Features, Ids, Joined, Opaque, Parameter, Plain, Value, leaves, parts_of

UNSEEN = Trait.REARRANGE | Trait.IDENTITY | Trait.SHAPE
"""What an operator is that does nothing to the features that it is given."""


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
        self.touched: dict[bytes, Ids] = {}
        self.node: fx.Node
        self.shared = True
        self.values: Mapping[fx.Node, Any] = {}
        self._constants = Constants(module)
        self._said: set[str] = set()
        self._edges: list[tuple[Ids, Ids]] = []
        self._count = 0
        self._canonical: dict[int, str] = {}
        self._buffers = {id(tensor) for tensor in module.buffers()}
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

    def concrete(self, node: fx.Node, unknown: int = 0) -> Any:
        """A number or size as it is, and a tensor where it is known before any data is.

        Args:
            node: an argument of the operator at hand.
            unknown: what stands for each entry of any other tensor.
        """
        value = self.values[node]
        if not isinstance(value, (Features, Parameter, Plain)):
            return value
        known = self._constants[node]
        return torch.full(value.shape or (), unknown, dtype=torch.int64) if known is None else known

    def known(self, node: fx.Node) -> bool:
        """Whether a node's value is known before any data is."""
        return self._constants[node] is not None

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

    def write(self, parameter: Parameter | None, axis: int, value: Value | Ids, groups: int = 1) -> None:
        """Entry k of the parameter's axis belongs to entry k of the feature axis, and makes it.

        With ``groups``, entry k of a row in the parameter's g-th part belongs to entry k of the g-th part of the
        features. Where the value holds no features, the axis lies along its positions.
        """
        if isinstance(value, (Plain, Parameter)):
            self.positional(parameter)
        else:
            self._note(parameter, axis, value, "producer", groups)

    def positional(self, *parameters: Any) -> None:
        """Entries of the parameters lie along positions of the input, or are not read: they keep their order."""
        for parameter in leaves(parameters):
            self._said.update(part.name for part in parts_of(parameter))

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
        self.pinned, self.mixed, self.opaque, self.touched = [], [], [], {}

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
        constant = id(tensor) in self._buffers
        return Parameter(known or name, tuple(tensor.shape), tuple(range(tensor.ndim)), name, counts(tensor), constant)

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
        self._said.add(event.name)
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
            self.node, self.shared = node, node not in tolerant
            try:
                if node.name in self.barriers:
                    raise self.error("it is a barrier")
                values[node] = self._with_node(self._run_node(node, values), node)
                self._constants.take(node, values)
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
            held = dict(enumerate(shape or ()))
            if value.ids.shape != tuple(held.get(axis) for axis in value.axes):
                raise self.error("what it returns has no features on the axes where they are looked for")
            return replace(value, shape=shape or (), node=node)
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
        if any(isinstance(value, Opaque) for value in inputs):
            if known is None or Trait.PRODUCER not in known.traits:
                raise self.error("an operator before it has no rule")
            args = tuple(Plain() if isinstance(value, Opaque) else value for value in args)
        if known is None and any(isinstance(value, Features) for value in inputs):
            raise self.error("no rule knows what it does to features")
        self._said = set()
        value = self.constant(inputs) if known is None else self._follow(known, args, kwargs)
        missing = unexplained(self.node, self.module, self._canonical, (args, kwargs), value, self._said)
        if missing and (self.shared or any(isinstance(value, Features) for value in inputs)):
            raise self.error(
                f"nothing says in which order the entries of {', '.join(f'`{name}`' for name in missing)} come: they "
                "belong to no features that are known, and to no positions of the input"
            )
        return value

    def _follow(self, known: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator's rule returns; whatever goes wrong in the rule makes the operator a barrier."""
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
                raise self.error("it writes features into a tensor that does not hold them")
        return value

    def constant(self, inputs: list[Any]) -> Any:
        """Arithmetic on sizes is done; whatever else touches no features is a plain tensor or an unknown number."""
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
