"""Proves a merge graph: permuting any of its spaces must not change what the network computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

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

    Only for graphs whose every crossing into the heads is absorbed by weights, as with ``stop_at=None``.

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
    expected = _crossing_values(reference, graph, example)
    finite = all(value.isfinite().all() for value in expected)
    if not finite or _agree(graph, reference, permutations, example, expected, tolerance):
        return {}
    alone = [[name, *(other for other in permutations if name in units_around(graph, other))] for name in permutations]
    wrong = [
        family[0]
        for family in alone
        if not _agree(graph, reference, {name: permutations[name] for name in family}, example, expected, tolerance)
    ]
    return {
        name: next(node for node, held in graph.held.items() if name in held) for name in wrong or list(permutations)
    }


def _agree(
    graph: MergeGraph,
    reference: nn.Module,
    permutations: Mapping[str, Tensor],
    example: Tensor,
    expected: list[Tensor],
    tolerance: float,
) -> bool:
    permuted = permute_spaces(reference, graph, permutations)
    found = _crossing_values(permuted, graph, example)
    for crossing, value, other in zip(_tensor_crossings(graph), expected, found, strict=True):
        if crossing.ref is not None and crossing.axis is not None:
            value = crossing.ref.gather(value, crossing.axis, _tables(crossing.ref, graph, permutations))
        scale = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
        if not (value - other).abs().max() <= tolerance * scale:
            return False
    return True


def _tensor_crossings(graph: MergeGraph) -> list[Crossing]:
    return [crossing for crossing in graph.crossings if crossing.axis is not None]


def _crossing_values(module: nn.Module, graph: MergeGraph, example: Tensor) -> list[Tensor]:
    """What the trunk hands over for an input."""
    interpreter = fx.Interpreter(module, graph=graph.fx_graph)
    kept: dict[str, Tensor] = {}
    names = {crossing.node for crossing in _tensor_crossings(graph)}
    with torch.inference_mode(False), torch.no_grad():
        for node in graph.trunk_graph():
            interpreter.env[node] = example if node.op == "placeholder" else interpreter.run_node(node)
            if node.name in names:
                kept[node.name] = interpreter.env[node].clone()
            for finished in interpreter.user_to_last_uses.get(node, ()):
                interpreter.env.pop(finished, None)
    return [kept[crossing.node] for crossing in _tensor_crossings(graph)]
