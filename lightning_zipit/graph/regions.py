"""Blocks of a forward under ``torch.autocast`` or ``torch.no_grad``, which torch.export keeps as separate graphs."""

from __future__ import annotations

import operator

import torch
from torch import fx

REGIONS = tuple(
    found
    for name in ("wrap_with_autocast", "wrap_with_set_grad_enabled", "tag_activation_checkpoint", "wrap")
    if (found := getattr(torch.ops.higher_order, name, None)) is not None
)
"""Operators that call a graph, and compute what its operators do in eval mode and without gradients."""


def write_out_regions(module: fx.GraphModule) -> None:
    """Replace calls of regions by their operators. A region that computes in another precision loses the precision.

    Args:
        module: an exported module; its graph is changed.
    """
    for node in list(module.graph.nodes):
        if node.target in REGIONS:
            _write_out(module, node)
    module.graph.eliminate_dead_code()


def _write_out(module: fx.GraphModule, call: fx.Node) -> None:
    at = next(position for position, each in enumerate(call.args) if _region(module, each) is not None)
    region = _region(module, call.args[at])
    assert region is not None
    write_out_regions(region)
    given, built = iter(call.args[at + 1 :]), {}
    with module.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                built[node] = next(given)
            elif node.op == "output":
                returned = fx.map_arg(node.args[0], built.__getitem__)
            else:
                built[node] = module.graph.node_copy(node, built.__getitem__)
    if not isinstance(returned, (tuple, list)):
        call.replace_all_uses_with(returned)
    for item in list(call.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(returned[item.args[1]])
        module.graph.erase_node(item)
    module.graph.erase_node(call)


def _region(module: fx.GraphModule, value: object) -> fx.GraphModule | None:
    """Return the graph that an argument is, or ``None``."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = getattr(module, str(value.target), None)
    return found if isinstance(found, fx.GraphModule) else None
