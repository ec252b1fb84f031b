"""One small rule per operator: what it does to the features of a tensor.

A rule returns the value of its output. Modules and functions share one rule where they take the same arguments.
"""

from lightning_zipit.graph.rules import attention, layers, norms, pointwise, positions, products, shapes, symmetric

__all__ = ["attention", "layers", "norms", "pointwise", "positions", "products", "shapes", "symmetric"]
