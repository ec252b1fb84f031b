"""Comparison of the architectures of captured networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from lightning_zipit.graph.naming import describe_node, modules_around
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.registry import Operator, Trait, operator_of, operator_of_module
from lightning_zipit.graph.spaces import Crossing, MergeGraph
from lightning_zipit.graph.table import named_tensors

SETTINGS = (bool, int, float, str, type(None))
"""Types of attributes by which a difference is explained."""
INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has. They do not change what it computes."""


def first_difference(first: MergeGraph, second: MergeGraph) -> str | None:
    """Find the first difference between the trunks of two networks in eval mode.

    The comparison covers operators and their arguments, modules and their attributes, and the shapes and feature spaces
    of their parameters. Stems and heads may differ, because they are not merged.

    Args:
        first: the merge graph of the first network.
        second: the merge graph of the second network.

    Returns:
        A phrase for an error message; ``None`` if the trunks have one architecture.
    """
    comparisons: tuple[Callable[[MergeGraph, MergeGraph], str | None], ...] = (
        _compare_shapes,
        _compare_nodes,
        _compare_ties,
        _compare_ends,
        _compare_tables,
    )
    return next((found for compare in comparisons if (found := compare(first, second))), None)


def _compare_shapes(first: MergeGraph, second: MergeGraph) -> str | None:
    shapes, others = _trunk_shapes(first), _trunk_shapes(second)
    for name in (*shapes, *others):
        if shapes.get(name) != others.get(name):
            return f"parameter `{name}` has shape {_pair(shapes.get(name), others.get(name))}"
    return None


def _trunk_shapes(graph: MergeGraph) -> dict[str, tuple[int, ...]]:
    tensors, nodes = named_tensors(graph.module), list(graph.trunk_graph())
    return {name: tuple(tensors[name].shape) for name in reached(nodes, set(nodes), tensors)}


def _compare_nodes(first: MergeGraph, second: MergeGraph) -> str | None:
    nodes, others = list(first.trunk_graph()), list(second.trunk_graph())
    for node, other in zip(nodes, others, strict=False):
        if found := _compare_node(first, node, second, other):
            return found
    if len(nodes) != len(others):
        return f"the trunk has {_pair(len(nodes), len(others))} nodes"
    return None


def _compare_node(first: MergeGraph, node: fx.Node, second: MergeGraph, other: fx.Node) -> str | None:
    known, others = operator_of(node, first.module), operator_of(other, second.module)
    name, other_name = _called(first, node), _called(second, other)
    if node.op != other.op or name != other_name:
        in_words = _explain(first.module, second.module, node)
        return in_words or f"node `{node.name}` is {_pair(name, other_name)}"
    if node.op == "call_module":
        modules = (graph.module.get_submodule(str(each.target)) for graph, each in ((first, node), (second, other)))
        if found := _compare_modules(str(node.target), *modules):
            return found
    if node.op == "get_attr" and node.target not in named_tensors(first.module):  # a constant; constants are not merged
        values = [attrgetter(str(node.target))(graph.module) for graph in (first, second)]
        if not _same(*values):
            return f"attribute `{node.target}` is {_pair(*values)}"
    arguments = _arguments(first, node, known), _arguments(second, other, others)
    for key in dict.fromkeys((*arguments[0], *arguments[1])):
        values = [each.get(key) for each in arguments]
        if not _same(*values):
            in_words = _explain(first.module, second.module, node)
            return in_words or f"node `{node.name}` ({describe_node(node, first.module)}) has {key}={_pair(*values)}"
    return None


def _explain(first: nn.Module, second: nn.Module, node: fx.Node) -> str | None:
    """Find the attribute of a module around a node that differs, from the innermost module to the outermost."""
    for name in reversed(modules_around(node)):
        modules = first.get_submodule(name), second.get_submodule(name)
        if not name or nn.Module in map(type, modules):  # a container of a merged network
            continue
        if type(modules[0]) is not type(modules[1]):
            return f"module `{name}` is {_pair(*(type(module).__name__ for module in modules))}"
        settings, others = (
            {key: value for key, value in configuration(module).items() if isinstance(value, SETTINGS)}
            for module in modules
        )
        for key in dict.fromkeys((*settings, *others)):
            if settings.get(key) != others.get(key):
                where = f"module `{name}` ({type(modules[0]).__name__})" if name else type(modules[0]).__name__
                return f"{where} has {key}={_pair(settings.get(key), others.get(key))}"
    return None


def _called(graph: MergeGraph, node: fx.Node) -> str:
    """Return the operator of a node. With a stem, node names may differ between networks, so it includes the module."""
    if node.op == "call_module":
        where = f"`{node.target}` " if graph.entries else ""
        cls = type(graph.module.get_submodule(str(node.target)))
        return f"{where}{cls.__module__}.{cls.__qualname__}"
    return str(node.target)


def _compare_modules(name: str, first: nn.Module, second: nn.Module) -> str | None:
    parts, others = dict(first.named_modules()), dict(second.named_modules())
    for part in dict.fromkeys((*parts, *others)):
        where = f"module `{f'{name}.{part}'.rstrip('.')}`"
        module, other = parts.get(part), others.get(part)
        if module is None or other is None or type(module) is not type(other):
            return f"{where} is {_pair(*(None if each is None else type(each).__name__ for each in (module, other)))}"
        settings, other_settings = configuration(module), configuration(other)
        for key in dict.fromkeys((*settings, *other_settings)):
            if not _same(settings.get(key), other_settings.get(key)):
                values = _pair(settings.get(key), other_settings.get(key))
                return f"{where} ({type(module).__name__}) has {key}={values}"
    return None


def configuration(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that can change what it computes in eval mode.

    Args:
        module: a module; its parameters, buffers and submodules are not part of the result.
    """
    known = operator_of_module(module)
    if known is not None and Trait.IDENTITY in known.traits:
        return {}
    ignored = known.ignored if known is not None else frozenset()
    return {name: value for name, value in vars(module).items() if name not in INTERNAL | ignored}


def _arguments(graph: MergeGraph, node: fx.Node, known: Operator | None) -> dict[str, Any]:
    """Return the arguments of a call by name, without ignored ones. Node names replace tensors."""
    entries = {entry.node: f"entry {number}" for number, entry in enumerate(graph.entries)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: entries.get(source.name, source.name))
    if known is not None and Trait.IDENTITY in known.traits:
        return {"input": args[:1]}
    ignored = known.ignored if known is not None else frozenset()
    return {key: value for key, value in _by_name(node, args, kwargs).items() if key not in ignored}


def _by_name(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
        return {**dict(zip(names, args, strict=False)), **kwargs}
    try:
        bound = inspect.signature(node.target).bind(*args, **kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a module, a method, or a function without a Python signature
        return {**{f"argument {number}": value for number, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def _same(first: Any, second: Any) -> bool:
    """Whether two settings are equal. Objects of one class are compared by their attributes."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, partial):
        return all(_same(getattr(first, part), getattr(second, part)) for part in ("func", "args", "keywords"))
    if inspect.isfunction(first):
        return first.__code__ == second.__code__ and _same(first.__defaults__, second.__defaults__)
    try:
        return bool(first == second) or (hasattr(first, "__dict__") and _same(vars(first), vars(second)))
    except Exception:  # objects that cannot be compared are treated as different
        return False


def _compare_ties(first: MergeGraph, second: MergeGraph) -> str | None:
    ties, others = _ties(first), _ties(second)
    for name in (*ties, *others):
        if ties.get(name) != others.get(name):
            pair = _pair(*(f"tied to `{tied}`" if tied else "not tied" for tied in (ties.get(name), others.get(name))))
            return f"parameter `{name}` is {pair}"
    return None


def _ties(graph: MergeGraph) -> dict[str, str]:
    """Map each parameter of the trunk that is tied to an earlier one to that parameter's name."""
    tensors, nodes = named_tensors(graph.module), list(graph.trunk_graph())
    used = reached(nodes, set(nodes), tensors)
    first: dict[int, str] = {}
    for name in used:
        first.setdefault(id(tensors[name]), name)
    return {name: first[id(tensors[name])] for name in used if first[id(tensors[name])] != name}


def _compare_tables(first: MergeGraph, second: MergeGraph) -> str | None:
    sizes, others = ({name: space.size for name, space in graph.spaces.items()} for graph in (first, second))
    for name in (*sizes, *others):
        if sizes.get(name) != others.get(name):
            return f"feature space `{name}` has {_pair(sizes.get(name), others.get(name))} features"
    for name in _trunk_shapes(first):
        rows = [[str(ref) for ref in graph.axes[name]] for graph in (first, second)]
        if rows[0] != rows[1]:
            return f"parameter `{name}` has axes {_pair(*map(', '.join, rows))}"
    return None


def _compare_ends(first: MergeGraph, second: MergeGraph) -> str | None:
    if _read_by_heads(first) != _read_by_heads(second):
        return "their heads read different values of the trunk"
    handed, others = ([_features(entry) for entry in graph.entries] for graph in (first, second))
    if handed != others:
        return f"their stems output different features: {_pair(' and '.join(handed), ' and '.join(others))}"
    return None


def first_difference_of_entries(first: MergeGraph, second: MergeGraph) -> str | None:
    """Find a difference in the shapes of the stems' outputs. These shapes are reliable only with an example input."""
    shapes, others = ([entry.shape for entry in graph.entries] for graph in (first, second))
    if shapes == others:
        return None
    return (
        f"for one sample of their inputs, their stems output tensors of shape {', '.join(map(str, shapes))} in the "
        f"first and {', '.join(map(str, others))} in the second"
    )


def _read_by_heads(graph: MergeGraph) -> list[str]:
    """Return the names of the trunk values that heads read, and ``""`` for values that bypass the trunk."""
    return [crossing.node if crossing.node in graph.trunk_nodes else "" for crossing in graph.crossings]


def _features(entry: Crossing) -> str:
    if entry.ref is None:
        return "none"
    size, blocks = sum(block.size for block in entry.ref.blocks), ", ".join(map(str, entry.ref.blocks))
    return f"{size} on axis {entry.axis} ({blocks})"


def _pair(first: Any, second: Any) -> str:
    return f"{first} in the first and {second} in the second"
