"""Judges rules by the real operators: inputs are permuted by hand, and outputs must be permuted as a rule says."""

import copy
import importlib
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_zipit.errors import TraceError
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Features, Opaque, Parameter, Plain, leaves


@dataclass(frozen=True)
class Weight:
    """An argument that is a parameter of the network."""

    shape: tuple


@dataclass(frozen=True)
class Input:
    """An argument that is a tensor.

    Attributes:
        axes: those of its features; none for a tensor without features.
        make: makes it from random numbers.
        alike: axes along which all entries are the same, which the rule is told.
    """

    shape: tuple
    axes: tuple = ()
    make: object = None
    alike: tuple = ()


@dataclass
class Call:
    """One call of an operator: a function, the name of a method, or a module."""

    operator: object
    args: tuple
    kwargs: dict = field(default_factory=dict)

    def build(self):
        """A network that consists of the call alone, its graph, and its inputs."""
        network, graph, inputs = nn.Module(), fx.Graph(), {}

        def place(value):
            if isinstance(value, Input):
                node = graph.placeholder(f"input{len(inputs)}")
                inputs[node] = value
                return node
            if isinstance(value, Weight):
                name = f"weight{len(list(network.parameters()))}"
                setattr(network, name, nn.Parameter(torch.rand(value.shape, dtype=torch.float64) + 0.5))
                return graph.get_attr(name)
            if isinstance(value, (tuple, list)):
                return type(value)(map(place, value))
            return value

        args, kwargs = place(self.args), {name: place(value) for name, value in self.kwargs.items()}
        operator = self.operator
        if isinstance(operator, nn.Module):
            network.module = operator.double().eval()
            with torch.no_grad():
                for tensor in (*operator.parameters(), *operator.buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(torch.rand_like(tensor) + 0.5)
            result = graph.call_module("module", args, kwargs)
        elif isinstance(operator, str):
            result = graph.call_method(operator, args, kwargs)
        else:
            result = graph.call_function(operator, args, kwargs)
        graph.output(result)
        return network, graph, inputs


def resolve(key):
    """What an entry of the registry stands for: the name of a method, or an object by its dotted name."""
    if not isinstance(key, str) or "." not in key:
        return key
    module, _, name = key.rpartition(".")
    return getattr(importlib.import_module(module), name)


@torch.no_grad()
def judge(call, draws=2):
    """Compare an operator with its rule.

    Returns:
        ``None`` where torch takes no such call, the reason where the rule refuses, else the number of features that
        were moved.
    """
    network, graph, inputs = call.build()
    tensors = {node: _tensor(value) for node, value in inputs.items()}
    try:
        result, shapes = _run(network, graph, tensors)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError):
        return None
    ctx, values = Context(network, shapes), {}
    for node, value in inputs.items():
        sizes = [value.shape[axis] for axis in value.axes]
        given = (
            Features(ctx.fresh(*sizes), value.axes, value.shape, node)
            if value.axes
            else Plain(value.shape, value.alike)
        )
        values[node] = given
    nodes = list(graph.nodes)
    given = dict(values)
    try:
        ctx.run(nodes, values, tolerant=())
    except TraceError as error:
        return str(error)
    output = values[nodes[-1]]
    if any(isinstance(value, (Opaque, Parameter)) for value in leaves(output)):
        return "a value that is not a tensor of the forward"
    permute = Permutations(ctx, [*given.values(), *leaves(output)])
    if permute.clash():
        return "it divides the features in two ways"
    most = 0
    for _ in range(draws):
        table = permute.draw()
        most = max(most, sum(table[feature] != feature for feature in table))
        moved = {node: permute.move(tensor, given[node], table) for node, tensor in tensors.items()}
        changed = copy.deepcopy(network)
        permute.move_parameters(changed, table)
        found, _ = _run(changed, graph, moved)
        for value, before, after in zip(*map(list, map(_items, (output, result, found))), strict=True):
            if isinstance(before, Tensor):
                assert isinstance(value, (Features, Plain)), f"{call}: {value} for a tensor"
                expected = permute.move(before, value, table)
                assert torch.allclose(expected.double(), after.double(), equal_nan=True), f"{call}: {value}"
    return most


def _items(value):
    return [item for part in value for item in _items(part)] if isinstance(value, (tuple, list)) else [value]


def _tensor(value):
    sizes = [1 if axis in value.alike else size for axis, size in enumerate(value.shape)]
    tensor = torch.randn(sizes, dtype=torch.float64).expand(value.shape).contiguous()
    return value.make(tensor) if value.make else tensor


def _run(network, graph, tensors):
    """What the only call of a graph returns, and the sizes of all tensors."""
    known = {node: tensor.clone() for node, tensor in tensors.items()}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(network, node.target)
        if node.op.startswith("call"):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            if node.op == "call_method":
                run = getattr(torch.Tensor, node.target)
            else:
                run = network.module if node.op == "call_module" else node.target
            result = known[node] = run(*args, **kwargs)
        if node.op == "output":
            known[node] = result
    shapes = {node.name: tuple(value.shape) for node, value in known.items() if isinstance(value, Tensor)}
    return result, shapes


class Permutations:
    """The permutations of features that the rules allow."""

    def __init__(self, ctx, values):
        self.ctx, self.component, self.random = ctx, ctx.components(), np.random.default_rng(0)
        held = [value.ids.ravel() for value in values if isinstance(value, Features)]
        held += [event.entries for events in ctx.events.values() for event in events]
        held += ctx.touched.values()
        self.nested = [(self.component[nest.members], self.component[nest.units]) for nest in ctx.nestings]
        kinds = defaultdict(list)
        for index, ids in enumerate(held):
            for feature, times in zip(*np.unique(self.component[ids], return_counts=True), strict=True):
                kinds[int(feature)].append((index, int(times)))
        for index, (members, units) in enumerate(self.nested):
            for feature in {*members.ravel().tolist(), *units.tolist()}:
                kinds[feature].append(("nested", index))
        fixed = {int(feature) for ids, _ in ctx.pinned for feature in self.component[ids]}
        for members, units in self.nested:
            fixed |= {
                unit for unit, row in zip(units.tolist(), members.tolist(), strict=True) if not fixed.isdisjoint(row)
            }
        self.kind = {
            feature: ("fixed", feature) if feature in fixed else tuple(kind) for feature, kind in kinds.items()
        }

    def clash(self):
        """Whether an operator divides the features of a unit in two ways, which tracing refuses."""
        rows = defaultdict(set)
        for index, (members, units) in enumerate(self.nested):
            for unit, row in zip(units.tolist(), members.tolist(), strict=True):
                rows[index, unit].add(tuple(sorted(row)))
        return any(len(held) > 1 for held in rows.values())

    def draw(self):
        table = {}
        unit_set = {unit for _, units in self.nested for unit in units.tolist()}
        inner = {feature for members, _ in self.nested for feature in members.ravel().tolist()}
        self._shuffle([feature for feature in self.kind if feature in unit_set and feature not in inner], table)
        for members, units in self.nested:
            row_of = dict(zip(units.tolist(), members.tolist(), strict=True))
            for unit, row in row_of.items():
                target = row_of[table.get(unit, unit)]
                by_kind = defaultdict(list)
                for feature in self.random.permutation(target).tolist():
                    by_kind[self.kind[feature]].append(feature)
                for feature in row:
                    if feature not in table:
                        table[feature] = by_kind[self.kind[feature]].pop()
        self._shuffle([feature for feature in self.kind if feature not in table], table)
        return table

    def _shuffle(self, features, table):
        """Within each kind, without fixed points where there are several."""
        groups = defaultdict(list)
        for feature in features:
            groups[self.kind[feature]].append(feature)
        for group in groups.values():
            order = self.random.permutation(group).tolist()
            table.update(zip(order, order[1:] + order[:1], strict=True))

    def index(self, ids, table):
        """Per entry, the one that takes its place: the k-th of a feature goes where the k-th of another was."""
        held, places = self.component[ids.ravel()].tolist(), defaultdict(list)
        for position, feature in enumerate(held):
            places[feature].append(position)
        seen, index = defaultdict(int), []
        for feature in held:
            index.append(places[table[feature]][seen[feature]])
            seen[feature] += 1
        return torch.tensor(index)

    def move(self, tensor, value, table):
        if not isinstance(value, Features):
            return tensor
        front = tensor.movedim(value.axes, tuple(range(len(value.axes))))
        flat = front.flatten(0, len(value.axes) - 1)
        assert len(flat) == value.ids.size, f"{value} for a tensor of shape {tuple(tensor.shape)}"
        moved = flat[self.index(value.ids, table)].reshape(front.shape)
        return moved.movedim(tuple(range(len(value.axes))), value.axes).contiguous()

    def move_parameters(self, network, table):
        tensors = dict((*network.named_parameters(), *network.named_buffers()))
        for (name, axis), (event, *_) in sorted(self.ctx.events.items(), key=lambda item: item[0][1]):
            if event.kind not in ("producer", "consumer"):
                continue
            tensor, index = tensors[name], self.index(event.entries, table)
            if event.groups == 1:
                tensor.copy_(tensor.index_select(axis, index))
                continue
            size, rows = tensor.shape[axis], len(tensor) // event.groups
            for group, own in enumerate(index.reshape(event.groups, size)):
                part = tensor[group * rows : (group + 1) * rows]
                part.copy_(part.clone().index_select(axis, own % size))
