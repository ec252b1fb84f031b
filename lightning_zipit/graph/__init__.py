"""Tracing: from a network to its feature spaces and table of axes."""

import lightning_zipit.graph.rules  # noqa: F401  (fills the registry)
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.operators.aten import register_all
from lightning_zipit.graph.prove import permute_spaces, verify_graph
from lightning_zipit.graph.registry import register_rule
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.graph.spaces import Crossing, FeatureSpace, MergeGraph, Projection, Tap
from lightning_zipit.graph.table import AxisRef, Block
from lightning_zipit.graph.trace import trace
from lightning_zipit.graph.values import Features, Parameter, Plain

register_all()

__all__ = [
    "AxisRef",
    "Block",
    "Context",
    "Crossing",
    "FeatureSpace",
    "Features",
    "MergeGraph",
    "Parameter",
    "Plain",
    "Projection",
    "Tap",
    "evaluating",
    "permute_spaces",
    "register_rule",
    "trace",
    "verify_graph",
]
