"""Where merged features may be linear combinations, and what becomes of batch norm there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._merging.maps import DenseMap, Maps
from lightning_zipit._merging.parameters import contract
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.layers import Fitted, Layer, find_stops, layer_of
from lightning_zipit.graph.registry import Trait, traits_of

PASSING = Trait.POINTWISE | Trait.POOLING | Trait.REARRANGE | Trait.SUM | Trait.DIFFERENCE
"""Operators behind which features are what they were: feature by feature, as if activations were linear."""


def find_rigid(graph: MergeGraph) -> dict[str, str]:
    """The spaces to which dense maps cannot be applied.

    Others are written by layers and batch norms right behind these alone, and go from there through activation
    functions, pooling, sums and concatenations to what reads them. That activation functions act on each feature by
    itself is left out of account, as the paper of CCA Merge does.

    Args:
        graph: the merge graph.

    Returns:
        Their names, and why.
    """
    folded = {str(stop.norm.target) for stop in find_folded(graph) if stop.norm is not None}
    grouping = {space.units for space in graph.spaces.values()}
    rigid: dict[str, str] = {}
    for name, space in graph.spaces.items():
        if space.units is not None or name in grouping:
            rigid[name] = "groups or heads"
    for node in graph.trunk_graph():
        why, made = _obstacle(node, graph, folded), graph.held.get(node.name, ())
        for name in made if why else ():
            rigid.setdefault(name, why)
        if Trait.SYMMETRIC in traits_of(node, graph.module):
            for name in (name for source in node.all_input_nodes for name in graph.held.get(source.name, ())):
                if name not in made:
                    rigid.setdefault(name, f"`{node.name}` reduces over features")
    for refs in graph.axes.values():
        for ref in refs:
            for name in ref.spaces if ref is not None and ref.groups > 1 else ():
                rigid.setdefault(name, "read in groups")
    for crossing in graph.crossings:
        if crossing.ref is not None and not crossing.absorbed:
            for block in crossing.ref.blocks:
                if block.repeat > 1:
                    rigid.setdefault(block.space, "handed over to the heads flattened")
    return rigid


def rigid_note(graph: MergeGraph) -> tuple[str, ...]:
    """A note for people on the spaces that a matcher of dense maps has matched one to one, if there are any."""
    reasons: dict[str, list[str]] = {}
    for name, why in find_rigid(graph).items():
        if graph.spaces[name].tap is not None and not graph.spaces[name].pinned:
            reasons.setdefault(why, []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return (f"Matched one to one, as combinations of features cannot be used there: {listed}.",) * bool(reasons)


def _obstacle(node: fx.Node, graph: MergeGraph, folded: set[str]) -> str:
    """Why the features that a node gives cannot be mixed; empty where they can."""
    name = str(node.target) if node.op == "call_module" else node.name
    traits = traits_of(node, graph.module)
    if node.op == "call_module":
        linear = Trait.LINEAR in traits
        if linear and getattr(graph.module.get_submodule(name), "groups", 1) > 1:
            return f"`{name}` is depthwise or grouped"
        if name in folded or (linear and any(graph.axes.get(f"{name}.weight", ()))):
            return ""
    bounded = Trait.POINTWISE in traits and len(node.all_input_nodes) > 1  # by a number for each feature
    if traits & PASSING and Trait.PER_FEATURE not in traits and not bounded:
        return ""
    return f"`{name}` acts on each feature by itself, or on all"


def find_folded(graph: MergeGraph) -> Iterator[Layer]:
    """The layers of the trunk with a batch norm right behind, which can be written as a layer alone."""
    for stop in find_stops(graph, graph.module, list(graph.trunk_graph())).stops:
        if isinstance(stop, Layer) and stop.norm is not None:
            ref = graph.axes.get(f"{stop.name}.weight", (None,))[0]
            if ref is not None and ref.whole:
                yield stop


def fold_norms(trunk: nn.Module, networks: Sequence[nn.Module], graph: MergeGraph, maps: Maps) -> None:
    """Set layers with a batch norm behind them, where dense maps act on what the norm gives.

    Scale, shift and statistics of a norm belong to a feature each, and have no image under a dense map. In eval mode,
    layer and norm are one layer: its weights and bias are merged, exactly, and then divided among layer and norm again.
    Scale and shift are those that give merged features, once statistics are re-estimated, the means and the deviations
    of what the sources contribute to them (see :func:`moments_under`); until then, the whole is exact.

    Args:
        trunk: the merged trunk; it is changed.
        networks: the source networks.
        graph: the merge graph.
        maps: the matching of each space.
    """
    with torch.no_grad():
        for stop in find_folded(graph) if any(isinstance(each, DenseMap) for each in maps.values()) else ():
            axes = graph.axes[f"{stop.name}.weight"]
            assert axes[0] is not None
            space_map = maps[axes[0].spaces[0]]
            if isinstance(space_map, DenseMap):
                pairs = [layer_of(network, stop) for network in networks]
                _merge_folded(layer_of(trunk, stop), pairs, axes, maps, space_map)


def _merge_folded(
    target: tuple[Fitted, _BatchNorm | None],
    pairs: Sequence[tuple[Fitted, _BatchNorm | None]],
    axes: Sequence[AxisRef | None],
    maps: Maps,
    space_map: DenseMap,
) -> None:
    layer, norm = target
    weight, bias, mean, deviation, before = (torch.zeros(()).double() for _ in range(5))
    for source, (own_layer, own_norm) in enumerate(pairs):
        assert own_norm is not None
        scale, shift = _folded(own_norm)
        rows = own_layer.weight.detach().cpu().double()
        weight = weight + contract(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)), axes, maps, source)
        if own_layer.bias is not None:
            shift = shift + scale * own_layer.bias.detach().cpu().double()
        bias = bias + space_map.merge(source, shift)
        own_mean, own_deviation = moments_under(space_map, source, own_norm)
        mean, deviation = mean + own_mean, deviation + own_deviation
        variances = own_norm.get_buffer("running_var").cpu().double()
        before = before + (space_map.merging(source).square() @ variances).sqrt()
    assert norm is not None
    ratio = torch.where(deviation > 0, before / deviation, 1.0)  # of what the layer gives to what the norm does
    layer.weight.copy_(weight * ratio.reshape(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.zero_()
    norm.get_buffer("running_mean").copy_((mean - bias) * ratio)
    norm.get_buffer("running_var").copy_(before.square())
    set_moments(norm, mean, deviation)


def _folded(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies features with in eval mode, and what it adds to them then."""
    mean, variance = (norm.get_buffer(name).cpu().double() for name in ("running_mean", "running_var"))
    scale = norm.weight.detach().cpu().double() / (variance + norm.eps).sqrt()
    return scale, norm.bias.detach().cpu().double() - scale * mean


def set_moments(norm: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Let what a batch norm gives have a mean and a deviation, where its statistics are those of what reaches it."""
    assert isinstance(norm, _BatchNorm)
    variance = norm.get_buffer("running_var").cpu().double()
    norm.weight.copy_(deviation * torch.where(variance > 0, (1 + norm.eps / variance).sqrt(), 1.0))
    norm.bias.copy_(mean)


def moments_under(space_map: DenseMap, source: int, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of M_i z, with z what a batch norm of source i gives.

    Its features are taken to be uncorrelated: their means and variances are known from the norm, and no more.

    Args:
        space_map: the maps.
        source: the number i of the source model.
        norm: the norm, as it is in the source.

    Returns:
        float64 ``(W,)`` each.
    """
    assert isinstance(norm, _BatchNorm)
    matrix = space_map.merging(source)
    scale, _ = _folded(norm)
    variances = scale.square() * norm.get_buffer("running_var").cpu().double()
    return matrix @ norm.bias.detach().cpu().double(), (matrix.square() @ variances).sqrt()
