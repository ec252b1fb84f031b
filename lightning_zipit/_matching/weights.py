"""The weights that write and read the features of a space."""

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

ALIKE = 0.5
"""Cosine from which the weights of networks count as alike."""


def weights_of_space(table: Table, networks: Sequence[nn.Module], space: str, maps: Maps) -> Tensor | None:
    """The weights that write or read each feature of a space, with all other axes in the order of the merged network.

    Args:
        table: the axes of the weights.
        networks: the source networks.
        space: the space.
        maps: the map of each space.

    Returns:
        float64 ``(N·C, weights)``; ``None`` if no weight writes or reads the space.
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
    """The entries of a parameter along the features of a space, all other axes in the order of the merged network.

    Args:
        weight: the parameter of one source model.
        axes: what its axes hold.
        space: the space.
        maps: the map of each space.
        source: the number of the source model.

    Returns:
        float64 ``(C, entries)``, one for every block of an axis that holds the space.
    """
    weight, axes = _ungrouped(weight, axes)
    found = []
    for axis, ref in enumerate(axes):
        if ref is not None and space in ref.spaces:
            others = [None if number == axis else _moved(other) for number, other in enumerate(axes)]
            aligned = apply_maps(weight, others, maps, source).movedim(axis, 0)
            aligned = aligned.reshape(len(aligned), -1)
            found += [aligned[block.entries()].flatten(1) for block in ref.blocks if block.space == space]
    return found


def _moved(ref: AxisRef | None) -> AxisRef | None:
    """An axis whose entries are summed into the merged ones, each with factor 1."""
    return None if ref is None else replace(ref, role="consumer")


def _ungrouped(weight: Tensor, axes: Sequence[AxisRef | None]) -> tuple[Tensor, list[AxisRef | None]]:
    """A grouped weight with zeros for the entries that a row does not read, so that axis 1 is the same for all rows."""
    ref = next((ref for ref in axes if ref is not None and ref.groups > 1), None)
    if ref is None:
        return weight, list(axes)
    own = weight.unflatten(0, (ref.groups, -1))  # (groups, rows, entries, …)
    dense = own.new_zeros(ref.groups, ref.groups, *own.shape[1:])
    dense[range(ref.groups), range(ref.groups)] = own
    return dense.transpose(1, 2).flatten(2, 3).flatten(0, 1), [axes[0], replace(ref, groups=1), *axes[2:]]


def trunk_parameters(graph: MergeGraph) -> Table:
    """The axes of the parameters that the trunk holds; those of heads belong to different outputs."""
    nodes = list(graph.trunk_graph())
    used = set(reached(nodes, set(nodes), named_tensors(graph.module)))
    rows = {name: row for name, row in graph.axes.items() if name in used}
    return {
        name: row for name, tensor, row in bind(rows, graph.module) if any(row) and isinstance(tensor, nn.Parameter)
    }


def common_start(graph: MergeGraph, networks: Sequence[nn.Module], maps: Maps) -> tuple[str, ...]:
    """Note that the networks seem to be trained from one start, because their weights are alike index by index.

    Networks that were initialised apart have cosines near 0.

    Args:
        graph: the merge graph.
        networks: the source networks.
        maps: the map of each space.

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
    labels = [space_map.labels for space_map in maps.values() if space_map.labels is not None]
    same = sum(int((own == F.average(len(own), len(networks))).sum()) for own in labels)
    matched = f"{same / sum(map(len, labels)):.0%} of the features were matched by index; " if labels else ""
    return (
        f"The sources seem to be trained from one start: their weights are alike, feature by feature (cosine "
        f"{cosine:.2f}). {matched}matcher=Average() does so with all.",
    )
