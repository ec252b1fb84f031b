"""Matching by what the weights of features are, space after space until nothing changes any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_zipit import functional as F
from lightning_zipit._matching.families import families, match
from lightning_zipit._merging.maps import DenseMap, Maps, SpaceMap
from lightning_zipit._merging.parameters import contract
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.table import Table, bind, named_tensors
from lightning_zipit.matchers import DualSpace

ALIKE = 0.5
"""From which cosine on the weights of networks are alike."""


def match_by_weights(
    graph: MergeGraph,
    networks: Sequence[nn.Module],
    activations: Mapping[str, Tensor],
    matcher: DualSpace,
    widths: Mapping[str, int] | None = None,
) -> dict[str, tuple[SpaceMap | DenseMap, Tensor | None]]:
    """Match all spaces by weights and activations, by coordinate descent.

    Weights of a feature can be compared only where the features that they read or write are matched already, so that
    the matching of every space depends on those around it: the spaces are matched in turn, in random order, until no
    label changes (Git Re-Basin, arXiv 2209.04836, algorithm 1). It starts from the matching by activations, or by
    number where there are none, and the first round goes from the input on, as the input's order is the same for all.

    Args:
        graph: the merge graph.
        networks: the source networks.
        activations: per space, its similarity by activations, ``(N·C, N·C)``.
        matcher: how the two similarities are weighed, and what matches them.
        widths: how many features are to be left in each space; those of one model by default.

    Returns:
        Per space its map, and its similarity where it was matched by one.
    """
    count, inner = len(networks), matcher.matcher
    table = trunk_parameters(graph)
    by_number = {name: F.average(count * space.size, count) for name, space in graph.spaces.items()}
    maps: dict[str, SpaceMap | DenseMap] = {name: SpaceMap(labels, count) for name, labels in by_number.items()}
    similarities: dict[str, Tensor | None] = {}

    def weighed(name: str) -> Tensor | None:
        if graph.spaces[name].pinned:
            return None
        weights, measured = weight_similarity(table, networks, name, maps), activations.get(name)
        if weights is None or measured is None:
            return measured if weights is None else weights
        return weights.mul_(matcher.tau).add_(measured, alpha=1 - matcher.tau)

    def go_through(order: Iterable[list[str]], similarity_of: Callable[[str], Tensor | None]) -> bool:
        changed = False
        for family in order:
            for name, space_map, similarity in match(graph, family, similarity_of, inner, count, widths):
                changed |= not torch.equal(_labels(space_map), _labels(maps[name]))
                maps[name], similarities[name] = space_map, similarity
        return changed

    everything, generator = families(graph), torch.Generator().manual_seed(matcher.seed)
    if activations:
        go_through(everything, activations.get)
    order = everything
    for _ in range(matcher.rounds):
        if not go_through(order, weighed):
            break
        order = [everything[number] for number in torch.randperm(len(everything), generator=generator).tolist()]
    return {name: (maps[name], similarities.get(name)) for name in graph.spaces}


def _labels(space_map: SpaceMap | DenseMap) -> Tensor:
    assert isinstance(space_map, SpaceMap)  # weights are compared feature by feature
    return space_map.labels


def weight_similarity(table: Table, networks: Sequence[nn.Module], space: str, maps: Maps) -> Tensor | None:
    """The cosine of the weights that write and read each feature, with all other spaces as they are matched now.

    Args:
        table: the axes of the weights.
        networks: the source networks.
        space: the space.
        maps: the matching of each space.

    Returns:
        float64 ``(N·C, N·C)``; ``None`` where no weight tells its features apart.
    """
    per_model = [
        [
            rows
            for name, axes in table.items()
            for rows in weights_of(network.get_parameter(name).detach(), axes, space, maps, source)
        ]
        for source, network in enumerate(networks)
    ]
    if not per_model[0]:
        return None
    features = torch.cat([torch.cat(rows, dim=1) for rows in per_model])
    return F.correlation(features @ features.T)


def weights_of(weight: Tensor, axes: Sequence[AxisRef | None], space: str, maps: Maps, source: int) -> list[Tensor]:
    """The entries of a parameter along the features of a space, all other axes in the order of the merged network.

    Args:
        weight: the parameter of one source model.
        axes: what its axes hold.
        space: the space.
        maps: the matching of each space.
        source: the number of the source model.

    Returns:
        float64 ``(C, entries)``, one for every block of an axis that holds the space.
    """
    weight, axes = _ungrouped(weight, axes)
    found = []
    for axis, ref in enumerate(axes):
        if ref is not None and space in ref.spaces:
            others = [None if number == axis else _moved(other) for number, other in enumerate(axes)]
            aligned = contract(weight, others, maps, source).movedim(axis, 0)
            aligned = aligned.reshape(len(aligned), -1)
            found += [aligned[block.entries()].flatten(1) for block in ref.blocks if block.space == space]
    return found


def _moved(ref: AxisRef | None) -> AxisRef | None:
    """An axis whose entries go where they are merged, with all their weight."""
    return None if ref is None else replace(ref, role="consumer")


def _ungrouped(weight: Tensor, axes: Sequence[AxisRef | None]) -> tuple[Tensor, list[AxisRef | None]]:
    """A grouped weight with zeros where a row does not read, so that axis 1 is the same for all rows."""
    ref = next((ref for ref in axes if ref is not None and ref.groups > 1), None)
    if ref is None:
        return weight, list(axes)
    own = weight.unflatten(0, (ref.groups, -1))  # (groups, rows, entries, …)
    dense = own.new_zeros(ref.groups, ref.groups, *own.shape[1:])
    dense[range(ref.groups), range(ref.groups)] = own
    return dense.transpose(1, 2).flatten(2, 3).flatten(0, 1), [axes[0], replace(ref, groups=1), *axes[2:]]


def common_start(graph: MergeGraph, networks: Sequence[nn.Module], maps: Maps) -> tuple[str, ...]:
    """A note for people where the networks seem to be trained from one start, as their weights are alike by number.

    Those of networks that were initialised apart have cosines near 0.

    Args:
        graph: the merge graph.
        networks: the source networks.
        maps: the matching of each space.

    Returns:
        The note, or nothing.
    """
    matrices = [name for name in trunk_parameters(graph) if graph.module.get_parameter(name).ndim > 1]
    products = torch.zeros(len(networks), len(networks), dtype=torch.float64)
    for name in matrices:
        own = torch.stack([network.get_parameter(name).detach().flatten().cpu().float() for network in networks])
        products += own @ own.T
    cosine = min(F.correlation(products)[0, 1:].tolist(), default=0.0)
    if cosine < ALIKE:
        return ()
    labels = [space_map.labels for space_map in maps.values() if isinstance(space_map, SpaceMap)]
    same = sum(int((own == F.average(len(own), len(networks))).sum()) for own in labels)
    share = f"{same / sum(map(len, labels)):.0%} of the features were matched by number; " if labels else ""
    return (
        f"The sources seem to be trained from one start: their weights are alike, feature by feature (cosine "
        f"{cosine:.2f}). {share}matcher=Average() does so with all.",
    )


def trunk_parameters(graph: MergeGraph) -> Table:
    """The axes of the parameters that the trunk holds; those of heads belong to different outputs."""
    nodes = list(graph.trunk_graph())
    used = set(reached(nodes, set(nodes), named_tensors(graph.module)))
    rows = {name: row for name, row in graph.axes.items() if name in used}
    return {
        name: row for name, tensor, row in bind(rows, graph.module) if any(row) and isinstance(tensor, nn.Parameter)
    }
