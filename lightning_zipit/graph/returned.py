"""The output of a head: the value that the source network returns, of the same types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from lightning_zipit._common.structure import Structure

RETURNED = "_returned"
"""Name of the submodule of a head that makes the output of its tensors."""
WRITTEN_OUT = (tuple, list, dict)
"""Types that generated code writes out."""


class Returned(nn.Module):
    """Makes a nested value, such as a dataclass, of its tensors.

    Args:
        structure: the structure of the value.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *tensors: Tensor) -> Any:
        """Return the value with these tensors, in the order of :func:`~lightning_zipit._common.structure.flatten`."""
        return self.structure.unflatten(tensors)

    def extra_repr(self) -> str:
        return self.structure.kind.__name__


def return_as(structure: Structure | None, root: nn.Module, graph: fx.Graph, tensors: Sequence[fx.Node]) -> None:
    """End a graph with its output.

    Args:
        structure: the structure of the output; ``None`` for a tuple of the tensors.
        root: the module of the graph, which gets a submodule if generated code cannot write out the structure.
        graph: the graph; it is changed.
        tensors: the nodes of the tensors of the output.
    """
    if structure is None:
        graph.output(tuple(tensors))
    elif is_written_out(structure):
        graph.output(structure.unflatten(tensors))
    else:
        root._modules[RETURNED] = Returned(structure)
        graph.output(graph.call_module(RETURNED, tuple(tensors)))


def tensors_returned(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of the tensors in the output of a graph that :func:`return_as` ended."""
    (returned,) = next(iter(reversed(graph.nodes))).args
    if isinstance(returned, fx.Node) and returned.op == "call_module" and returned.target == RETURNED:
        return list(returned.args)  # type: ignore[arg-type]
    found: list[fx.Node] = []
    fx.map_arg(returned, found.append)
    return found


def is_written_out(structure: Structure) -> bool:
    """Whether generated code can write out a nested value."""
    if structure.kind is Tensor:
        return True
    if structure.kind in WRITTEN_OUT:
        return all(map(is_written_out, structure.parts))
    return structure.kind in (type(None), bool, int, float, str)
