"""Weights along a feature space, for matching by weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_zipit import functional as F
from lightning_zipit._matching.maps import Maps, apply_maps
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.table import Table, bind, named_tensors

SAME_INITIALISATION = 0.5
"""Lowest cosine of the weights of networks that seem to be trained from the same initialisation."""


def weights_of_space(table: Table, networks: Sequence[nn.Module], space: str, maps: Maps) -> Tensor | None:
    """Collect the weights that write or read each feature of a space, other axes in the order of the merged network.

    Args:
        table: the axes of the weights.
        networks: the source networks.
        space: the name of the space.
        maps: the map of each space.

    Returns:
        float64 ``(N·C, weights)``, or ``None`` if no weight writes or reads the space.
    """
    per_model = [
        [
            rows
            for name, axes in table.items()
            for rows in weights_along(network.get_parameter(name).detach(), axes, space, maps, source)
        ]
        for source, network in enumerate(networks)
    ]
    return torch.cat([torch.cat(rows, dim=1) for rows in per_model]) if per_model[0] else None


def weights_along(weight: Tensor, axes: Sequence[AxisRef | None], space: str, maps: Maps, source: int) -> list[Tensor]:
    """Collect the entries of a parameter along the features of a space, other axes in the order of the merged network.

    Args:
        weight: the parameter of one source model.
        axes: per axis, the spaces that it writes or reads.
        space: the name of the space.
        maps: the map of each space.
        source: the index of the source model.

    Returns:
        float64 ``(C, entries)`` for every block of an axis that holds the space.
    """
    weight, axes = _ungrouped(weight, axes)
    found = []
    for axis, ref in enumerate(axes):
        if ref is not None and space in ref.spaces:
            others = [None if index == axis else _as_consumer(other) for index, other in enumerate(axes)]
            aligned = apply_maps(weight, others, maps, source).movedim(axis, 0)
            aligned = aligned.reshape(len(aligned), -1)
            found += [aligned[block.entries()].flatten(1) for block in ref.blocks if block.space == space]
    return found


def _as_consumer(ref: AxisRef | None) -> AxisRef | None:
    """Turn an axis into a consumer axis, whose entries are summed into the merged entries with factor 1."""
    return None if ref is None else replace(ref, role="consumer")


def _ungrouped(weight: Tensor, axes: Sequence[AxisRef | None]) -> tuple[Tensor, list[AxisRef | None]]:
    """Convert a grouped weight to a dense weight with zeros, so that axis 1 is the same for all rows."""
    ref = next((ref for ref in axes if ref is not None and ref.groups > 1), None)
    if ref is None:
        return weight, list(axes)
    own = weight.unflatten(0, (ref.groups, -1))  # (groups, rows, entries, …)
    dense = own.new_zeros(ref.groups, ref.groups, *own.shape[1:])
    dense[range(ref.groups), range(ref.groups)] = own
    return dense.transpose(1, 2).flatten(2, 3).flatten(0, 1), [axes[0], replace(ref, groups=1), *axes[2:]]


def trunk_parameters(graph: MergeGraph) -> Table:
    """Return the axes of the trunk's parameters. Heads are excluded, because their outputs differ between tasks."""
    nodes = list(graph.trunk_graph())
    used = set(reached(nodes, set(nodes), named_tensors(graph.module)))
    rows = {name: row for name, row in graph.axes.items() if name in used}
    return {
        name: row for name, tensor, row in bind(rows, graph.module) if any(row) and isinstance(tensor, nn.Parameter)
    }


def common_start(graph: MergeGraph, networks: Sequence[nn.Module], maps: Maps) -> tuple[str, ...]:
    """Write a note if the networks seem to be trained from the same initialisation.

    The weights of such networks are similar index by index. For networks with different initialisations, the cosine of
    the weights is near 0.

    Args:
        graph: the merge graph.
        networks: the source networks.
        maps: the map of each space.

    Returns:
        The note, or an empty tuple.
    """
    matrices = [name for name in trunk_parameters(graph) if graph.module.get_parameter(name).ndim > 1]
    products = torch.zeros(len(networks), len(networks), dtype=torch.float64)
    for name in matrices:
        own = torch.stack([network.get_parameter(name).detach().flatten().cpu().float() for network in networks])
        products += own @ own.T
    cosine = min(F.correlation(products)[0, 1:].tolist(), default=0.0)
    if cosine < SAME_INITIALISATION:
        return ()
    labels = [space_map.labels for space_map in maps.values() if space_map.labels is not None]
    same = sum(int((own == F.average(len(own), len(networks))).sum()) for own in labels)
    matched = f"{same / sum(map(len, labels)):.0%} of the features were matched by index. " if labels else ""
    return (
        f"The sources seem to be trained from the same initialisation: their weights are similar index by index "
        f"(cosine {cosine:.2f}). {matched}matcher=Average() matches all features by index.",
    )
