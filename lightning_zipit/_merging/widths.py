"""Widths: the number of merged features of each space, given as a ratio or chosen within a FLOPs budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from lightning_zipit._common.calls import Call
from lightning_zipit._matching.maps import SpaceMap
from lightning_zipit._merging.cost import FlopsModel
from lightning_zipit._merging.rebuild import build_head, build_merged, build_stem, build_stems, build_trunk
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import MergeGraph, evaluating
from lightning_zipit.graph.part import Part
from lightning_zipit.graph.spaces import handed_over

Width: TypeAlias = float | Mapping[str, float] | Literal["auto"]
"""Ratio to the width of the sources, for all spaces or per space; or ``"auto"`` for widths within a FLOPs budget."""

LEVELS = 8
"""Number of steps into which the width of one model is divided when widths are chosen."""
LOSS_POWER = 1.5
"""Exponent of the loss of a space in the price of a step."""
SAMPLES = 2


def changes_size(width: Width) -> bool:
    """Whether a width setting changes the size of any space."""
    return any(ratio != 1 for ratio in width.values()) if isinstance(width, Mapping) else width != 1


def find_choices(
    graph: MergeGraph, network: nn.Module, example: Call, width: Width, num_models: int
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Find the allowed widths of each space of the merged network.

    Args:
        graph: the merge graph of the networks.
        network: the first network.
        example: an input, on the network's device.
        width: the width setting of the merge.
        num_models: N.

    Returns:
        Per space its widths in ascending order; and a note on the spaces that keep their size.

    Raises:
        ConfigurationError: if a ratio is out of range, or if a named space does not exist or must keep its size.
    """
    if not changes_size(width):
        return {name: (space.size,) for name, space in graph.spaces.items()}, ()
    asked = width if isinstance(width, Mapping) else dict.fromkeys(graph.spaces, width)
    problems = [
        f"`width` names the space {name!r}, but the spaces of this network are {', '.join(graph.spaces)}."
        for name in asked
        if name not in graph.spaces
    ]
    problems += [
        f"`width` of {name!r} must be above 0 and at most {num_models} (the number of models), got {ratio}."
        for name, ratio in (asked if isinstance(width, Mapping) else {"all spaces": width}).items()
        if ratio != "auto" and not 0 < ratio <= num_models
    ]
    if problems:
        raise ConfigurationError.collect(problems)
    fixed = {name: why for name, why in find_fixed(graph, network, example).items() if asked.get(name, 1) != 1}
    if fixed and isinstance(width, Mapping):
        raise ConfigurationError.collect([f"`width` of {name!r} must be 1: {why}." for name, why in fixed.items()])
    choices = {}
    for name, space in graph.spaces.items():
        ratio = 1.0 if name in fixed else asked.get(name, 1.0)
        ratios = [step / LEVELS for step in range(1, LEVELS * num_models + 1)] if ratio == "auto" else [ratio]
        choices[name] = tuple(sorted({max(1, round(float(each) * space.size)) for each in ratios}))
    reasons: dict[str, list[str]] = {}
    for name, why in fixed.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    note = f"`width` was not applied to these spaces: {listed}."
    return choices, (note,) * bool(fixed)


def find_fixed(graph: MergeGraph, network: nn.Module, example: Call) -> dict[str, str]:
    """Find the spaces that must keep the size that they have in the sources.

    For all other spaces the function proves that they can be resized. It merges the network with itself, and leaves
    some features of the copy unmerged. The result must compute the same as the network.

    Args:
        graph: the merge graph.
        network: the traced network.
        example: an input, on the network's device. Only its first samples are used.

    Returns:
        The reason for each space that must keep its size, by the name of the space.
    """
    grouping = {space.units for space in graph.spaces.values()}
    fixed: dict[str, str] = {}
    for name, space in graph.spaces.items():
        if space.pinned:
            fixed[name] = "matched by index"
        elif space.units is not None or name in grouping:
            fixed[name] = "groups or heads"
        elif space.tap is None:
            fixed[name] = "not measured"
    for name in sorted(handed_over(graph)):
        fixed.setdefault(name, "written by stems, whose number of features is fixed")
    for refs in (*graph.axes.values(), *graph.head_axes.values()):
        for block in (block for ref in refs if ref is not None for block in ref.blocks):
            if not block.contiguous:
                fixed.setdefault(block.space, "its features are interleaved with other features")
    x = example.first(SAMPLES).with_noise()  # zeros would hide differences
    with torch.no_grad(), evaluating(network):
        resizable = _prove(graph, network, x, [name for name in graph.spaces if name not in fixed])
    return fixed | {
        name: "an operator depends on its size" for name in graph.spaces if name not in {*fixed, *resizable}
    }


def _prove(graph: MergeGraph, network: nn.Module, x: Call, spaces: Sequence[str]) -> list[str]:
    """Return the spaces that can be resized together."""
    if not spaces or _agrees(graph, network, x, dict.fromkeys(spaces, 1)):
        return list(spaces)
    fitting = [name for name in spaces if _fits(graph, x, {name: 1})]
    if len(fitting) < len(spaces) and _agrees(graph, network, x, dict.fromkeys(fitting, 1)):
        return fitting
    grown: dict[str, int] = {}
    for name in fitting:
        # A norm over all features changes if one feature is duplicated, but not if all features are duplicated.
        for extra in (1, graph.spaces[name].size):
            if name not in grown and _agrees(graph, network, x, {name: extra}):
                grown[name] = extra
    return list(grown) if _agrees(graph, network, x, grown) else []


def _fits(graph: MergeGraph, x: Call, extra: Mapping[str, int]) -> bool:
    """Whether a network runs without error if its spaces have more features. It runs on the meta device."""
    widths = {name: graph.spaces[name].size + more for name, more in extra.items()}
    try:
        parts = [build_stem] * bool(graph.stem_nodes) + [build_trunk, build_head]
        values: Any = x.each(lambda one: one.to("meta")).tensors
        for part in parts:
            values = part(graph, widths).to("meta")(*values)
    except Exception:  # the user's operators may raise any error for an unexpected size
        return False
    return True


def _agrees(graph: MergeGraph, network: nn.Module, x: Call, extra: Mapping[str, int]) -> bool:
    """Whether a network merged with itself computes the same if some features of the copy stay unmerged."""
    maps = {}
    for name, space in graph.spaces.items():
        unmerged = torch.arange(space.size, space.size + extra.get(name, 0))
        labels = torch.cat([torch.arange(space.size), unmerged, torch.arange(len(unmerged), space.size)])
        maps[name] = SpaceMap(labels, 2)
    expected = _tensors_in(x.run(network))
    try:
        trunk, heads = build_merged([graph, graph], [network, network], maps)
        stems: Sequence[Part | None] = build_stems([graph, graph], maps) or [None, None]
        found = []
        for stem, head in zip(stems, heads, strict=True):
            entering = x.copies if stem is None else stem(*x.copies)
            found.append(_tensors_in(head(*trunk(*entering))))
    except Exception:  # see _fits
        return False
    return all(
        value.shape == other.shape and bool((value - other).abs().max() <= 1e-3 * value.abs().max())
        for outputs in found
        for value, other in zip(expected, outputs, strict=True)
    )


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda item: found.append(item.clone()) if isinstance(item, Tensor) else None)
    return found


def spend(flops: FlopsModel, losses: Mapping[str, Mapping[int, float]], budget: float) -> dict[str, int]:
    """Choose widths within a FLOPs budget, with the smallest total matching loss (greedy).

    All spaces start at their largest width. Each step reduces the width of one space: the space with the smallest
    increase of the loss per saved FLOP. The loss of a space is raised to the power ``LOSS_POWER``, so that large losses
    weigh more. It is multiplied by the number of layers that read or write the space.

    Args:
        flops: the FLOPs of the merged network as a function of widths.
        losses: the matching loss by space and width; see :func:`~lightning_zipit.functional.zip_loss`.
        budget: the highest number of FLOPs.

    Returns:
        Per space its width. If even the smallest widths exceed the budget, these are returned.
    """
    levels = {name: sorted(known, reverse=True) for name, known in losses.items()}
    widths = {name: known[0] for name, known in levels.items()}
    layers = {name: flops.touched_by(name) for name in losses}
    cost = [flops.of_layer(layer, widths) for layer in range(len(flops.layers))]
    prices: dict[str, float] = {}  # price of the next step of each space
    while flops.rest + sum(cost) > budget:
        for name in levels.keys() - prices.keys():
            if len(levels[name]) > 1:
                wide, narrow = levels[name][:2]
                before, after = (max(losses[name][width], 0.0) ** LOSS_POWER for width in (wide, narrow))
                lost = len(layers[name]) * (after - before)
                saved = sum(cost[layer] - flops.of_layer(layer, {**widths, name: narrow}) for layer in layers[name])
                prices[name] = max(lost, 0.0) / saved if saved > 0 else math.inf
        if not prices:
            break
        chosen = min(prices, key=lambda name: (prices[name], name))
        levels[chosen].pop(0)
        widths[chosen] = levels[chosen][0]
        for layer in layers[chosen]:
            cost[layer] = flops.of_layer(layer, widths)
        changed = set(layers[chosen])
        prices = {name: price for name, price in prices.items() if changed.isdisjoint(layers[name])}
        prices.pop(chosen, None)
    return widths


def total_loss(flops: FlopsModel, losses: Mapping[str, Mapping[int, float]], widths: Mapping[str, int]) -> float:
    """Compute the total matching loss: each space is weighted by the number of layers that read or write it.

    Over networks of many widths, the order by this sum nearly agrees with the order by accuracy.
    """
    return sum(len(flops.touched_by(name)) * losses[name][width] for name, width in widths.items())


class BudgetedWidths(NamedTuple):
    """Widths within a FLOPs budget, and their total matching loss (infinite if no widths fit the budget)."""

    widths: dict[str, int]
    loss: float

    @classmethod
    def within(cls, flops: FlopsModel, losses: Mapping[str, Mapping[int, float]], budget: float) -> BudgetedWidths:
        """Choose widths within a budget; see :func:`spend`.

        Args:
            flops: the FLOPs of the merged network as a function of widths.
            losses: the matching loss by space and width.
            budget: ratio to the FLOPs of one source.
        """
        widths = spend(flops, losses, budget * flops.source)
        allowed = flops(widths) <= budget * flops.source * (1 + 1e-9)
        return cls(widths, total_loss(flops, losses, widths) if allowed else math.inf)
