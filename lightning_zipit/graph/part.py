"""Parts of a network, such as trunk and heads: the modules that a graph calls, and the graph."""

from __future__ import annotations

import copy
import hashlib
import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from lightning_zipit.graph.dtypes import FOLLOWS, following
from lightning_zipit.graph.training import IN_TRAINING, switching

map_arg: Any = fx.node.map_arg  # their types allow for results of a graph alone
map_aggregate: Any = fx.node.map_aggregate

GRAPH = "_graph_of_part"
"""Attribute of a part that holds its graph."""


class Added(nn.ModuleDict):
    """Modules that a part has beside those of the network."""


class Part(nn.Module):
    """The modules and tensors that a graph uses, under their own names, and a forward that computes the graph.

    It stands for ``torch.fx.GraphModule``, which has attributes such as ``code``, ``graph`` and ``meta``, so that no
    module of a network can have these names. :func:`graph_of` returns the graph.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the graph as data, because operators of torch cannot be pickled."""
        state = {name: value for name, value in vars(self).items() if name != GRAPH}
        return _unpickle, (type(self).__name__, state, _packed(graph_of(self)))


def make_part(root: nn.Module, graph: fx.Graph, name: str) -> Part:
    """Make a part of a network. It shares the modules and tensors of the network.

    Args:
        root: the network.
        graph: the graph of the part. Its modules and tensors have their names in the network.
        name: the name of the part's class.
    """
    part = Part()
    part.training = root.training
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _share(root, part, str(node.target))
    return set_graph(part, graph, name)


def graph_of(part: Part) -> fx.Graph:
    """Return the graph that a part computes. After a change, call :func:`set_graph`."""
    graph: fx.Graph = vars(part)[GRAPH]
    return graph


def set_graph(part: Part, graph: fx.Graph, name: str | None = None) -> Part:
    """Let a part compute a graph. The forward has an argument for each input of the graph.

    Args:
        part: the part; it is changed and returned.
        graph: the graph.
        name: the name of the part's class; by default, the class keeps its name.
    """
    vars(part)[GRAPH] = graph
    code = switching(following(graph, part), part).python_code("self")
    file = f"<part {hashlib.blake2b(code.src.encode(), digest_size=8).hexdigest()}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)  # for tracebacks
    members = dict(code.globals)
    exec(compile(code.src, file, "exec", dont_inherit=True), members)
    # A class of its own, as for an fx.GraphModule: a method in the instance would keep it alive in a cycle.
    part.__class__ = type(name or type(part).__name__, (Part,), {"forward": members["forward"], "__module__": __name__})
    return part


def name_of_added(network: nn.Module, name: str) -> str:
    """Return the name of modules that parts of a network get: the usual one, unless a module of the network has it."""
    while not isinstance(network._modules.get(name, Added()), Added):
        name += "_"
    return name


def _share(root: nn.Module, part: nn.Module, target: str) -> None:
    """Let a part have a module or tensor of a network, in plain modules of the names around it."""
    *around, name = target.split(".")
    for step in around:
        root = getattr(root, step)
        inside = part._modules.get(step)
        if inside is root:  # the part has the whole module
            return
        if inside is None:
            inside = part._modules[step] = Added() if isinstance(root, Added) else nn.Module()
        part = inside
    value = attrgetter(name)(root)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        part.register_buffer(name, value, persistent=name not in root._non_persistent_buffers_set)
    else:
        setattr(part, name, value)


@dataclass(frozen=True)
class _Of:
    """Stands for a node of a graph in a pickle."""

    node: str


@dataclass(frozen=True)
class _Operator:
    """Stands for an operator of torch in a pickle."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, operator: OpOverload) -> _Operator:
        namespace, _, name = operator._schema.name.partition("::")
        return cls(namespace, name, operator._overloadname)

    def find(self) -> OpOverload:
        found: OpOverload = getattr(getattr(getattr(torch.ops, self.namespace), self.name), self.overload)
        return found


class _Packed(NamedTuple):
    """A node of a graph in a pickle."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: Mapping[str, Any]


KEPT_META = ("shape", "dtype", "value", "stack_trace", FOLLOWS, IN_TRAINING)


def _packed(graph: fx.Graph) -> list[_Packed]:
    packed = []
    for node in graph.nodes:
        target = _Operator.of(node.target) if isinstance(node.target, OpOverload) else node.target
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: _Of(source.name))
        meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        meta["nn_module_stack"] = dict.fromkeys(node.meta.get("nn_module_stack") or ())
        packed.append(_Packed(node.op, node.name, target, args, kwargs, meta))
    return packed


def _unpickle(name: str, state: dict[str, Any], packed: list[_Packed]) -> Part:
    part, graph = Part(), fx.Graph()
    built: dict[str, fx.Node] = {}
    vars(part).update(state)

    def unpacked(value: Any) -> Any:
        return built[value.node] if isinstance(value, _Of) else value

    for node in packed:
        target = node.target.find() if isinstance(node.target, _Operator) else node.target
        args, kwargs = map_aggregate((node.args, node.kwargs), unpacked)
        built[node.name] = graph.create_node(node.op, target, args, kwargs, node.name)
        built[node.name].meta = dict(node.meta)
    return set_graph(part, graph, name)
