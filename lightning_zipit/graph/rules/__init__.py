"""Rules of operators: one small function per operator, which describes its effect on features.

A rule returns the value of the operator's output. Modules and functions with the same arguments share one rule.
"""

from lightning_zipit.graph.rules import (
    attention,
    creating,
    layers,
    norms,
    pointwise,
    positions,
    products,
    recurrent,
    selecting,
    shapes,
    symmetric,
)

__all__ = [
    "attention",
    "creating",
    "layers",
    "norms",
    "pointwise",
    "positions",
    "products",
    "recurrent",
    "selecting",
    "shapes",
    "symmetric",
]
