"""The records of ATen operators, by overload.

Most take their arguments in the order of the function of torch of the same name, and have its rule. The others are
written out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_zipit.graph import rules
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import NOTHING, OPERATORS, Operator, Rule, Trait, register_rule
from lightning_zipit.graph.values import Value

OTHER_NAMES = {
    "_unsafe_view": "view",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "_softmax": "softmax",
    "alias": "clone",
    "_to_copy": "to",
    "linalg_vector_norm": "norm",
    "slice": "narrow",
    "index": "index_select",
    "upsample_nearest1d": "interpolate",
    "upsample_nearest2d": "interpolate",
    "upsample_nearest3d": "interpolate",
    "upsample_linear1d": "interpolate",
    "upsample_bilinear2d": "interpolate",
    "upsample_bicubic2d": "interpolate",
    "upsample_trilinear3d": "interpolate",
}
"""ATen operators that have the rule of a function of another name."""
IN_AN_ORDER_OF_THEIR_OWN = frozenset({"embedding", "embedding_bag", "size", "numel", "dim", "stride"})
"""ATen operators whose arguments come in another order, and those that a graph never has."""


def overloads(name: str) -> Iterator[OpOverload]:
    """The overloads of an ATen operator that write nowhere; none where there is no such operator."""
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        operator = getattr(packet, overload)
        if not operator._schema.is_mutable:
            yield operator


def _records() -> dict[str, Operator]:
    """The records of torch's functions and of tensor methods, by name."""
    found: dict[str, Operator] = {}
    for key, record in OPERATORS.items():
        name = key if isinstance(key, str) else str(getattr(key, "__name__", ""))
        if not isinstance(key, type) and "." not in name:
            found.setdefault(name, record)
    return found


def register(name: str, rule: Rule, traits: Trait = NOTHING) -> None:
    """Teach tracing all overloads of an ATen operator."""
    for operator in overloads(name):
        register_rule(operator, rule, traits)


def _embedding(ctx: Context, weight: Value, indices: Value, padding_idx: int = -1, *_: Any) -> Value:
    """ATen takes the weight first."""
    return rules.layers.embedding(ctx, indices, weight)


def _size(ctx: Context, input: Value, dim: int) -> Any:
    return rules.shapes.size(ctx, input, dim)


def register_all() -> None:
    """Register the rules of all ATen operators; importing this module registers nothing."""
    records = _records()
    for name, record in records.items():
        if name not in IN_AN_ORDER_OF_THEIR_OWN:
            register(name, record.rule, record.traits)
    for name, other in OTHER_NAMES.items():
        if other in records:
            register(name, records[other].rule, records[other].traits)
    register("embedding", _embedding, rules.layers.LAYER | Trait.LOOKUP)
    register("sym_size", _size, Trait.SHAPE)
