"""Rules of recurrent layers and cells: their hidden units are features, and their weights hold a block per gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, module_rule, rule
from lightning_zipit.graph.rules.layers import input_of
from lightning_zipit.graph.values import Features, Ids, Parameter, Plain, Value

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""The blocks of hidden units that the weights of each recurrent layer have."""


def _layer(ctx: Context, x: Value | Ids, weights: Sequence[Any], gates: int) -> tuple[Ids, Ids]:
    """Record one direction of one layer.

    Args:
        ctx: the context.
        x: its input, with features on the last axis.
        weights: of the input and of the hidden state, then biases and the weight of a projection, if there are.
        gates: the number of gates.

    Returns:
        The features of the hidden state, and those of the cell state of an LSTM.
    """
    of_input, of_hidden, *others = weights
    for weight in (of_input, of_hidden):
        if not isinstance(weight, Parameter) or weight.rank != 2:
            raise ctx.error("one of its weights is computed and is not a parameter of the network")
    cell = ctx.fresh(of_hidden.shape[0] // gates)
    projected = of_hidden.shape[1] != len(cell)
    hidden = ctx.fresh(of_hidden.shape[1]) if projected else cell
    rows = np.tile(cell, gates)
    for weight, read in ((of_input, x), (of_hidden, hidden)):
        ctx.write(weight, 0, rows)
        ctx.read(weight, 1, read)
    for other in others:
        if projected and other is others[-1]:
            ctx.write(other, 0, hidden)
            ctx.read(other, 1, cell)
        else:
            ctx.write(other, 0, rows)
    return hidden, cell


def _start(ctx: Context, ids: Ids, given: Any, node: Any) -> None:
    """Align an initial state ``(layers, samples, units)`` with the features of each layer, ``(layers, units)``."""
    if isinstance(given, Features):
        last = given.axes[-1] == given.rank - 1
        if not last or given.axes[:-1] not in ((), (0,)) or given.rank < 2:
            raise ctx.error("the features of its initial state are not on the last axis")
        for row, known in zip(ids, np.broadcast_to(given.ids, ids.shape), strict=True):
            ctx.tie(row, known.copy())
    elif isinstance(given, Parameter):
        for row in ids:
            ctx.write(given, given.rank - 1, row)
    elif given is not None and not _alike(given):
        ctx.pin(ids.ravel(), f"`{ctx.node.name}` starts at a state without features")


def _alike(given: Plain) -> bool:
    return given.shape is not None and len(given.shape) - 1 in given.alike


def _state(ids: Ids, rank: int) -> Features:
    """Return a state ``(layers, …, units)``. The units of several layers are features along two axes."""
    return Features(ids, (0, rank - 1)) if len(ids) > 1 else Features(ids[0], (rank - 1,))


def recurrent(
    ctx: Context,
    input: Value,
    states: Sequence[Any],
    weights: Sequence[Any],
    layers: int,
    directions: int,
    gates: int,
) -> tuple[Any, ...]:
    """Record a recurrent layer, and return its output and its last states."""
    x = input_of(ctx, input, -1)
    if isinstance(x, Features) and x.axes != (x.rank - 1,):
        raise ctx.error("its input features are not on the last axis only")
    if input.shape is None:
        raise ctx.error("the shape of its input is unknown")
    rank, each = len(input.shape), len(weights) // (layers * directions)
    hidden: list[Ids] = []
    cells: list[Ids] = []
    read: Value | Ids = x
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * each
            of_hidden, of_cell = _layer(ctx, read, weights[first : first + each], gates)
            hidden.append(of_hidden)
            cells.append(of_cell)
        read = np.concatenate(hidden[-directions:])
    made = [np.stack(hidden), np.stack(cells)][: len(states)]
    for ids, given in zip(made, states, strict=True):
        _start(ctx, ids, given, ctx.node)
    assert isinstance(read, np.ndarray)
    return (Features(read, (rank - 1,)), *(_state(ids, rank) for ids in made))


def _functions(name: str, gates: int) -> Callable[..., Any]:
    def layer(
        ctx: Context,
        input: Value,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        """Read features and write hidden units, one block per gate. The states of each layer are features."""
        if not isinstance(params, (tuple, list)):
            raise ctx.error("it reads packed sequences")
        if train and dropout:
            raise ctx.error("it applies dropout in eval mode too")
        states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        return recurrent(ctx, input, states, params, num_layers, 1 + bidirectional, gates)

    return rule(getattr(torch, name), traits=Trait.PRODUCER)(layer)


for _name, _gates in GATES.items():
    _functions(_name, _gates)


@module_rule(nn.RNN, nn.GRU, nn.LSTM, traits=Trait.PRODUCER, ignored=("dropout",))
def recurrent_module(ctx: Context, module: nn.RNNBase, input: Value, hx: Any = None) -> Any:
    """Read features and write hidden units, one block per gate. The states of each layer are features."""
    gates, directions = GATES[module.mode.lower()], 1 + module.bidirectional
    states = 1 + isinstance(module, nn.LSTM)
    given = list(hx) if isinstance(hx, (tuple, list)) else [hx] * states
    names = [name for names in module._all_weights for name in names]
    weights = [ctx.parameter(name) for name in names]
    output, *last = recurrent(ctx, input, given, weights, module.num_layers, directions, gates)
    return output, tuple(last) if states > 1 else last[0]


def cell(ctx: Context, input: Value, states: Sequence[Any], weights: Sequence[Any], gates: int) -> list[Features]:
    """Record one step of a recurrent layer, and return its states."""
    x = input_of(ctx, input, -1)
    if isinstance(x, Features) and x.axes != (x.rank - 1,):
        raise ctx.error("its input features are not on the last axis only")
    hidden, _ = _layer(ctx, x, weights, gates)
    for given in states:
        _start(ctx, hidden[None], given, ctx.node)
    return [Features(hidden, (len(input.shape or (0, 0)) - 1,)) for _ in states]


def _cell_functions(name: str, gates: int) -> Callable[..., Any]:
    def step(ctx: Context, input: Value, hx: Any, w_ih: Value, w_hh: Value, b_ih: Any = None, b_hh: Any = None) -> Any:
        """Read features and write hidden units, one block per gate."""
        states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        weights = [weight for weight in (w_ih, w_hh, b_ih, b_hh) if weight is not None]
        made = cell(ctx, input, states, weights, gates)
        return tuple(made) if isinstance(hx, (tuple, list)) else made[0]

    return rule(getattr(torch, f"{name}_cell"), traits=Trait.PRODUCER)(step)


for _name, _gates in GATES.items():
    _cell_functions(_name, _gates)


@module_rule(nn.RNNCell, nn.GRUCell, nn.LSTMCell, traits=Trait.PRODUCER)
def recurrent_cell_module(ctx: Context, module: nn.RNNCellBase, input: Value, hx: Any = None) -> Any:
    """Read features and write hidden units, one block per gate."""
    names = [name for name, weight in module.named_parameters() if weight is not None]
    gates, states = module.weight_ih.shape[0] // module.hidden_size, 1 + isinstance(module, nn.LSTMCell)
    given = list(hx) if isinstance(hx, (tuple, list)) else [hx] * states
    made = cell(ctx, input, given, [ctx.parameter(name) for name in names], gates)
    return tuple(made) if states > 1 else made[0]
