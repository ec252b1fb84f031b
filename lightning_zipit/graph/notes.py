"""Human-readable notes on what is not matched by activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from lightning_zipit._common.text import printable
from lightning_zipit.graph.spaces import FeatureSpace
from lightning_zipit.graph.table import AxisRef


def find_notes(
    backbone: nn.Module,
    nodes: list[fx.Node],
    trunk: set[fx.Node],
    spaces: Mapping[str, FeatureSpace],
    axes: Mapping[str, tuple[AxisRef | None, ...]],
    barriers: Mapping[str, str],
) -> Iterator[str]:
    """List barriers, spaces that are matched by index, positional parameters and unused modules, with reasons.

    Args:
        backbone: the traced network.
        nodes: the nodes of its graph.
        trunk: the nodes of the trunk.
        spaces: the feature spaces of the trunk.
        axes: the table of axes.
        barriers: nodes that are kept out of the trunk, and the reasons.
    """
    for why in barriers.values():
        yield f"Kept per task from here on: {why.partition('. Register a rule')[0]}."
    holding = {space.units for space in spaces.values()}
    for space in spaces.values():
        why = space.pinned or ("" if space.tap or space.name in holding else "its activations cannot be measured")
        if why:
            yield f"`{space.name}` ({space.size} features) is matched by index: {why}."
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    positional = [
        name for name in reached(nodes, trunk, parameters) if parameters[name].ndim and not any(axes.get(name, ()))
    ]
    if positional:
        yield f"Averaged position by position, because they hold no features: {_list(positional)}."
    called = set(reached(nodes, set(nodes), parameters))
    unused = dict.fromkeys(_highest(name, called) for name in parameters if name not in called)
    if unused:
        yield f"Not called in eval mode, and omitted from the merged network: {_list(list(unused))}."


def reached(nodes: list[fx.Node], wanted: set[fx.Node], parameters: Mapping[str, object]) -> list[str]:
    """Return the names of the parameters that some nodes of a graph use."""
    targets = {str(node.target) for node in nodes if node in wanted and node.op in ("call_module", "get_attr")}
    return [name for name in parameters if any(part in targets for part in _prefixes(name))]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _highest(name: str, called: set[str]) -> str:
    """Return the outermost module that contains a parameter and no used parameter."""
    return next(
        prefix
        for prefix in _prefixes(name)
        if not any(other == prefix or other.startswith(f"{prefix}.") for other in called)
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def read_barriers(barriers: Mapping[str, str]) -> dict[str, str]:
    """Clean barriers and their reasons that were read from a file: control characters become spaces."""
    return {str(node): printable(str(reason), " ") for node, reason in barriers.items()}
