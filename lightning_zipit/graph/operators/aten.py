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
    "_log_softmax": "log_softmax",
    "alias": "clone",
    "lift_fresh": "clone",
    "_to_copy": "to",
    "slice": "narrow",
    "index": "index_select",
    "split_with_sizes_copy": "split_with_sizes",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "zero": "zeros_like",
    "numpy_T": "transpose",
    "mT": "transpose",
    "mH": "transpose",
    "adjoint": "transpose",
    "unsafe_split_with_sizes": "split_with_sizes",
    "affine_grid_generator": "affine_grid",
    "grid_sampler_2d": "grid_sampler",
    "grid_sampler_3d": "grid_sampler",
    "upsample_nearest1d": "interpolate",
    "upsample_nearest2d": "interpolate",
    "upsample_nearest3d": "interpolate",
    "_upsample_nearest_exact1d": "interpolate",
    "_upsample_nearest_exact2d": "interpolate",
    "_upsample_nearest_exact3d": "interpolate",
    "upsample_linear1d": "interpolate",
    "upsample_bilinear2d": "interpolate",
    "upsample_bicubic2d": "interpolate",
    "upsample_trilinear3d": "interpolate",
    "_upsample_bilinear2d_aa": "interpolate",
    "_upsample_bicubic2d_aa": "interpolate",
}
"""ATen operators that have the rule of a function of another name."""
IN_AN_ORDER_OF_THEIR_OWN = frozenset({"embedding", "embedding_bag", "size", "numel", "dim", "stride", "unfold", "fold"})
"""ATen operators whose arguments come in another order, those that are others than the functions of their name, and
those that a graph never has."""


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


LAYER = rules.layers.LAYER
PER_CHANNEL = rules.norms.PER_CHANNEL
OWN: dict[str, tuple[Rule, Trait]] = {
    "embedding": (_embedding, LAYER | Trait.LOOKUP),
    "embedding_bag _embedding_bag": (rules.layers.bags, LAYER | Trait.LOOKUP),
    "sym_size": (_size, Trait.SHAPE),
    "unfold": (rules.shapes.rearrange, rules.shapes.MOVING),
    "im2col": (rules.positions.patches, NOTHING),
    "col2im": (rules.positions.sum_of_patches, NOTHING),
    "convolution": (rules.layers.any_convolution, LAYER),
    "copy": (rules.selecting.copy, Trait.REARRANGE),
    "fill": (rules.selecting.fill, Trait.SHAPE),
    "constant_pad_nd": (rules.positions.constant_pad, NOTHING),
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d": (
        rules.positions.pad_positions,
        Trait.POOLING,
    ),
    "max_pool2d_with_indices": (rules.positions.max_pool_with_indices(2), Trait.POOLING),
    "max_pool3d_with_indices": (rules.positions.max_pool_with_indices(3), Trait.POOLING),
    "native_layer_norm": (rules.norms.native_layer_norm, PER_CHANNEL | Trait.SYMMETRIC),
    "native_group_norm": (rules.norms.native_group_norm, PER_CHANNEL | Trait.SYMMETRIC),
    "_native_batch_norm_legit_no_training": (rules.norms.native_batch_norm, PER_CHANNEL),
}
"""The operators of ATen that torch has no function for, or whose arguments come in another order."""


def register_all() -> None:
    """Register the rules of all ATen operators; importing this module registers nothing."""
    records = _records()
    for name, record in records.items():
        if name not in IN_AN_ORDER_OF_THEIR_OWN:
            register(name, record.rule, record.traits)
    for name, other in OTHER_NAMES.items():
        if other in records:
            register(name, records[other].rule, records[other].traits)
    for own, (rule, traits) in OWN.items():
        for name in own.split():
            register(name, rule, traits)
