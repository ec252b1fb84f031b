"""Computation of merged weights from maps: one generic loop over the table of axes."""

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

    A parameter that writes no space is averaged. Integers are copied from the first model. A parameter without
    features is also copied if it is equal in all models.

    Args:
        copies: the parameter in each source model, all of one shape.
        axes: per axis, the spaces that it writes or reads; ``None`` leaves the axis unchanged.
        maps: the map of each space.
        weights: the weight of each model in a parameter that writes no space; equal weights by default.

    Returns:
        The merged parameter on the CPU, with the dtype of the first copy.
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
        target: a module with the parameter names of the sources, and the sizes of the merged network.
        sources: the source networks.
        table: the axes of the parameters of ``target``.
        maps: the map of each space.
        weights: the weight of each network in parameters that write no space; equal weights by default.
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
    """Write W_i U_i into the first layers of a head, so that they read merged features.

    Args:
        target: the head of one source model, with the parameter names of the source and the sizes of the merged
            network.
        network: the source network.
        table: the axes of the parameters of ``target``.
        maps: the map of each space.
        source: the index i of the source model.
    """
    with torch.no_grad():
        for name, tensor, row in bind(table, target):
            if any(row):
                tensor.copy_(apply_maps(attrgetter(name)(network), row, maps, source))
