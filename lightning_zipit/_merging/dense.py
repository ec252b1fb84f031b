"""Merging of batch norms under dense maps, where merged features are linear combinations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._matching.maps import FeatureMap, Maps, apply_maps
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.layers import Fitted, layer_of
from lightning_zipit.graph.rigid import find_folded


def fold_norms(trunk: nn.Module, networks: Sequence[nn.Module], graph: MergeGraph, maps: Maps) -> None:
    """Merge each layer together with the batch norm directly after it, if dense maps act on the output of the norm.

    Scale, shift and statistics of a norm belong to single features, so a dense map cannot be applied to them. In eval
    mode, layer and norm are together one linear layer. Its weights and bias are merged exactly, and then split into
    layer and norm again. Scale and shift are chosen for the later re-estimation of the statistics: the merged features
    then get the mean and the standard deviation of the sources' contributions; see :func:`moments_under`. Before
    re-estimation, layer and norm together are exact.

    Args:
        trunk: the merged trunk, which is changed in place.
        networks: the source networks.
        graph: the merge graph.
        maps: the matching of each space.
    """
    with torch.no_grad():
        for stop in find_folded(graph) if any(each.mixes for each in maps.values()) else ():
            axes = graph.axes[f"{stop.name}.weight"]
            assert axes[0] is not None
            space_map = maps[axes[0].spaces[0]]
            if space_map.mixes:
                pairs = [layer_of(network, stop) for network in networks]
                _merge_folded(layer_of(trunk, stop), pairs, axes, maps, space_map)


def _merge_folded(
    target: tuple[Fitted, _BatchNorm | None],
    pairs: Sequence[tuple[Fitted, _BatchNorm | None]],
    axes: Sequence[AxisRef | None],
    maps: Maps,
    space_map: FeatureMap,
) -> None:
    layer, norm = target
    weight, bias, mean, deviation, before = (torch.zeros(()).double() for _ in range(5))
    for source, (own_layer, own_norm) in enumerate(pairs):
        assert own_norm is not None
        scale, shift = _folded(own_norm)
        rows = own_layer.weight.detach().cpu().double()
        weight = weight + apply_maps(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)), axes, maps, source)
        if own_layer.bias is not None:
            shift = shift + scale * own_layer.bias.detach().cpu().double()
        bias = bias + space_map.merge(source, shift)
        own_mean, own_deviation = moments_under(space_map, source, own_norm)
        mean, deviation = mean + own_mean, deviation + own_deviation
        variances = own_norm.get_buffer("running_var").cpu().double()
        before = before + (space_map.merging(source).square() @ variances).sqrt()
    assert norm is not None
    ratio = torch.where(deviation > 0, before / deviation, 1.0)  # standard deviation before the norm / after it
    layer.weight.copy_(weight * ratio.reshape(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.zero_()
    norm.get_buffer("running_mean").copy_((mean - bias) * ratio)
    norm.get_buffer("running_var").copy_(before.square())
    set_moments(norm, mean, deviation)


def _folded(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset that a batch norm applies to each feature in eval mode."""
    mean, variance = (norm.get_buffer(name).cpu().double() for name in ("running_mean", "running_var"))
    scale = norm.weight.detach().cpu().double() / (variance + norm.eps).sqrt()
    return scale, norm.bias.detach().cpu().double() - scale * mean


def set_moments(norm: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Set scale and shift of a batch norm so that its output has a given mean and standard deviation."""
    assert isinstance(norm, _BatchNorm)
    variance = norm.get_buffer("running_var").cpu().double()
    norm.weight.copy_(deviation * torch.where(variance > 0, (1 + norm.eps / variance).sqrt(), 1.0))
    norm.bias.copy_(mean)


def moments_under(space_map: FeatureMap, source: int, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of M_i z, where z is the output of a batch norm of source i.

    Features are assumed to be uncorrelated, because the norm has only their means and variances.

    Args:
        space_map: the map of the space.
        source: the index i of the source model.
        norm: the batch norm of the source model.

    Returns:
        float64 ``(W,)`` each.
    """
    assert isinstance(norm, _BatchNorm)
    matrix = space_map.merging(source)
    scale, _ = _folded(norm)
    variances = scale.square() * norm.get_buffer("running_var").cpu().double()
    return matrix @ norm.bias.detach().cpu().double(), (matrix.square() @ variances).sqrt()
