"""One small rule per operator: what it does to the features of a tensor.

A rule returns the value of its output. Modules and functions share one rule where they take the same arguments.
"""

from lightning_zipit.graph.rules import attention, elementwise, layers, shapes
from lightning_zipit.graph.rules.elementwise import POOLING

POINTWISE = {
    *(elementwise.elementwise, elementwise.elementwise_module, elementwise.unchanged, elementwise.unchanged_module),
    *(layers.prelu, layers.prelu_module),
}
"""Rules of what acts on each entry by itself, such as activation functions."""

__all__ = ["POINTWISE", "POOLING", "attention", "elementwise", "layers", "shapes"]
