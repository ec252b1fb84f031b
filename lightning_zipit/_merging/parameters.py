"""Merged weights from maps: one generic loop over the table of axes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from lightning_zipit._matching.maps import Maps, apply_maps, model_shares
from lightning_zipit.graph import AxisRef
from lightning_zipit.graph.table import Table, bind


def merge_parameter(
    copies: Sequence[Tensor],
    axes: Sequence[AxisRef | None],
    maps: Maps,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Merge one parameter of N source models: Σ_i M_i W_i U_i over its axes (ZipIt!, section 4).

    A parameter that writes no space is averaged. Integers, and equal copies that hold no features, are copied.

    Args:
        copies: the parameter in each source model, all of one shape.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis as it is.
        maps: the map of each space.
        weights: how much each model counts in a parameter that writes no space; all the same by default.

    Returns:
        The merged parameter, of the type of the first copy, on the CPU.
    """
    first = copies[0].detach()
    untouched = not any(axes)
    if not first.is_floating_point() or (untouched and all(torch.equal(first.cpu(), copy.cpu()) for copy in copies)):
        return first.cpu().clone()
    parts = torch.stack([apply_maps(copy, axes, maps, source) for source, copy in enumerate(copies)])
    if not any(ref is not None and ref.role == "producer" for ref in axes):
        parts *= model_shares(len(copies), weights).reshape(-1, *[1] * first.ndim)
    return parts.sum(0).to(first.dtype)


def merge_into(
    target: nn.Module,
    sources: Sequence[nn.Module],
    table: Table,
    maps: Maps,
    weights: Sequence[float] | None = None,
) -> None:
    """Write the merged parameters and buffers into a trunk.

    Args:
        target: a module with parameters under the names that they have in the sources, of the sizes of the merged
            network.
        sources: the source networks.
        table: the rows of its parameters.
        maps: the matching of each space.
        weights: how much each network counts in parameters that write no space; all the same by default.
    """
    with torch.no_grad():
        for name, tensor, row in bind(table, target):
            copies = [attrgetter(name)(source) for source in sources]
            tensor.copy_(merge_parameter(copies, row, maps, weights))


def unmerge_into(
    target: nn.Module,
    network: nn.Module,
    table: Table,
    maps: Maps,
    source: int,
) -> None:
    """Write U_i into the first layers of one head, so that they read merged features: W_i U_i.

    Args:
        target: the head of one source model, with parameters under the names that they have there, of the sizes of the
            merged network.
        network: that model.
        table: the rows of its parameters.
        maps: the matching of each space.
        source: the number i of the source model.
    """
    with torch.no_grad():
        for name, tensor, row in bind(table, target):
            if any(row):
                tensor.copy_(apply_maps(attrgetter(name)(network), row, maps, source))
