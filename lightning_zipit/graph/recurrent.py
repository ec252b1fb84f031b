"""Keeps recurrent layers whole while a network is captured: torch.export would unroll them step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMESPACE = "lightning_zipit_capture"
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""The recurrent operators of torch, and how many blocks of hidden units their weights have."""
OPTIONS = "bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"lstm(Tensor input, Tensor[] hx, Tensor[] params, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _library.define(f"{_name}(Tensor input, Tensor hx, Tensor[] params, {OPTIONS}) -> (Tensor, Tensor)")


def _shapes(input: Tensor, hx: Any, params: list[Tensor], *options: Any) -> tuple[Tensor, ...]:
    """Outputs of the right sizes, for the meta device."""
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    features = states[0].shape[-1] * (2 if options[4] else 1)
    return (input.new_empty(*input.shape[:2], features), *(torch.empty_like(state) for state in states))


for _name in GATES:
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shapes, lib=_library)
    _library.impl(_name, getattr(torch._VF, _name), "CompositeExplicitAutograd")

WHOLE = {getattr(torch._C._VariableFunctions, name): getattr(getattr(torch.ops, NAMESPACE), name) for name in GATES}
"""Function of torch → the operator that stands for it in a capture."""
ORIGINALS = {
    getattr(getattr(torch.ops, NAMESPACE), name).default: getattr(torch.ops.aten, name).input for name in GATES
}
"""Operator that stands for a recurrent layer in a capture → torch's own."""


class KeepRecurrent(TorchFunctionMode):
    """Inside, recurrent layers are called as one operator each."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packed = func in WHOLE and isinstance(args[3], (tuple, list))  # (data, batch_sizes, hx, params, …)
        if func in WHOLE and not packed:
            return _layer_by_layer(WHOLE[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_by_layer(
    operator: Any,
    x: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Call a recurrent operator once for each layer, so that the graph holds the output of every layer."""
    if num_layers == 1 or (train and dropout):
        return operator(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    directions, each = 1 + bidirectional, len(params) // num_layers
    last: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        given = [state.narrow(0, layer * directions, directions) for state in states]
        own = params[layer * each : (layer + 1) * each]
        if layer and dropout:
            x = torch.dropout(x, dropout, train)
        start = given if isinstance(hx, (tuple, list)) else given[0]
        x, *reached = operator(x, start, own, has_biases, 1, dropout, train, bidirectional, batch_first)
        last.append(tuple(reached))
    return (x, *(torch.cat(state) for state in zip(*last, strict=True)))
