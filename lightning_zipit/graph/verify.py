"""Proves a merge graph: permuting any of its spaces must not change what the network computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit.errors import VerificationError
from lightning_zipit.graph.spaces import AxisRef, Crossing, MergeGraph, unit_members, units_around, units_first

SAMPLES = 8


def random_permutations(graph: MergeGraph, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """A permutation for every space of the trunk; pinned spaces keep their order."""
    permutations: dict[str, Tensor] = {}
    for name in units_first(graph):
        space = graph.spaces[name]
        permutation = torch.randperm(space.size, generator=generator)
        if space.pinned:
            permutation = torch.arange(space.size)
        elif space.units is not None:  # whole units, and features within them
            members = unit_members(space)
            inner = torch.rand(members.shape, generator=generator).argsort(1)
            permutation[members] = members[permutations[space.units]].gather(1, inner)
        permutations[name] = permutation
    return permutations


def permute_spaces(module: nn.Module, graph: MergeGraph, permutations: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network whose feature spaces are in another order; it computes the same function.

    Only for graphs whose every crossing into the heads is absorbed by weights, as with ``stop_at=None``; spaces that a
    stem writes must keep their order.

    Args:
        module: the traced network, or another of the same architecture.
        graph: its merge graph.
        permutations: per space a permutation ``(features,)``; spaces that are left out keep their order.

    Returns:
        The permuted copy.
    """
    module = copy.deepcopy(module)
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    with torch.no_grad():
        for name, refs in graph.axes.items():
            for axis, ref in enumerate(refs):  # in this order: rows first, then what is grouped by them
                if ref is not None:
                    tensors[name].copy_(ref.gather(tensors[name], axis, _tables(ref, graph, permutations)))
    return module


def _tables(ref: AxisRef, graph: MergeGraph, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {space: permutations.get(space, torch.arange(graph.spaces[space].size)) for space in ref.spaces}


def verify_graph(backbone: nn.Module, graph: MergeGraph, batch: Tensor) -> None:
    """Permute every space at random in a copy and compare what crosses into the heads.

    Args:
        backbone: the traced network.
        graph: its merge graph.
        batch: an input; its first 8 samples are used.

    Raises:
        VerificationError: naming every space whose permutation changes the result.
    """
    if failing := find_failing(backbone, graph, batch):
        raise VerificationError(explain(graph, list(failing)))


def explain(graph: MergeGraph, spaces: list[str]) -> str:
    """What is wrong with spaces whose permutation changes the result, and what to do."""
    written = {name: ", ".join(parameter for parameter, _ in graph.spaces[name].producers[:3]) for name in spaces}
    named = "; ".join(f"{name} (written by {parameters})" for name, parameters in written.items())
    return (
        f"Permuting these feature spaces changes what the network computes, so merging them would be wrong: {named}. "
        "A rule for an operator that they pass through is wrong, or the network uses the number of a feature: stop "
        "before it with `stop_at`, or register another rule."
    )


def find_failing(backbone: nn.Module, graph: MergeGraph, batch: Tensor) -> dict[str, str]:
    """The spaces whose random permutation in a copy changes what crosses into the heads.

    Args:
        backbone: the traced network.
        graph: its merge graph.
        batch: an input; its first 8 samples are used.

    Returns:
        Their names, and the first node of the graph that holds each; none where the input gives NaN or Inf, which
        proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    permutations = random_permutations(graph, generator)
    exact = batch.device.type != "mps"
    reference = copy.deepcopy(backbone).eval()
    example = batch[:SAMPLES].detach().clone()
    if exact:
        reference = reference.double()
        example = example.double() if example.is_floating_point() else example
    tolerance = 1e-6 if exact else 1e-3
    entering = _entering_values(reference, graph, example)
    expected = _crossing_values(reference, graph, entering)
    finite = all(value.isfinite().all() for value in expected)
    if not finite or _agree(graph, reference, permutations, entering, expected, tolerance):
        return {}
    alone = [[name, *(other for other in permutations if name in units_around(graph, other))] for name in permutations]
    wrong = [
        family[0]
        for family in alone
        if not _agree(graph, reference, {name: permutations[name] for name in family}, entering, expected, tolerance)
    ]
    return {
        name: next(node for node, held in graph.held.items() if name in held) for name in wrong or list(permutations)
    }


def _agree(
    graph: MergeGraph,
    reference: nn.Module,
    permutations: Mapping[str, Tensor],
    entering: Mapping[str, Any],
    expected: list[Tensor],
    tolerance: float,
) -> bool:
    permuted, entering = permute_spaces(reference, graph, permutations), dict(entering)
    for entry in graph.entries:
        if entry.ref is not None and entry.axis is not None:
            tables = _tables(entry.ref, graph, permutations)
            entering[entry.node] = entry.ref.gather(entering[entry.node], entry.axis, tables)
    found = _crossing_values(permuted, graph, entering)
    for crossing, value, other in zip(_tensor_crossings(graph), expected, found, strict=True):
        if crossing.ref is not None and crossing.axis is not None:
            value = crossing.ref.gather(value, crossing.axis, _tables(crossing.ref, graph, permutations))
        scale = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
        if not (value - other).abs().max() <= tolerance * scale:
            return False
    return True


def _tensor_crossings(graph: MergeGraph) -> list[Crossing]:
    return [crossing for crossing in graph.crossings if crossing.axis is not None]


def _entering_values(module: nn.Module, graph: MergeGraph, example: Tensor) -> dict[str, Any]:
    """What the trunk starts from: the input, or what the stem makes of it."""
    source = next(node for node in graph.fx_graph.nodes if node.op == "placeholder")
    names = [entry.node for entry in graph.entries] if graph.stem_nodes else [source.name]
    return _run(module, graph, graph.stem_graph(), {source.name: example}, names)


def _crossing_values(module: nn.Module, graph: MergeGraph, entering: Mapping[str, Any]) -> list[Tensor]:
    """What the trunk hands over."""
    names = [crossing.node for crossing in _tensor_crossings(graph)]
    return list(_run(module, graph, graph.trunk_graph(), entering, names).values())


def _run(
    module: nn.Module, graph: MergeGraph, nodes: Iterable[fx.Node], known: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The values of some nodes, by name, from those that are known."""
    interpreter = fx.Interpreter(module, graph=graph.fx_graph)
    interpreter.env = {node: _cloned(known[node.name]) for node in graph.fx_graph.nodes if node.name in known}
    kept = {name: known[name] for name in names if name in known}
    with torch.inference_mode(False), torch.no_grad():
        for node in nodes:
            if node.name not in known:
                interpreter.env[node] = interpreter.run_node(node)
            if node.name in names:
                kept[node.name] = _cloned(interpreter.env[node])
            for finished in interpreter.user_to_last_uses.get(node, ()):
                interpreter.env.pop(finished, None)
    return {name: kept[name] for name in names}


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
