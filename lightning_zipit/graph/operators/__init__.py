"""One record per ATen operator, the operators of a captured graph."""

from lightning_zipit.graph.operators import aten

__all__ = ["aten"]
