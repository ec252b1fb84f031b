"""Eval mode, and shapes of all tensors in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.run import Run, enter_inputs


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode within the context, and restore the mode of every module on exit."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def note_shapes(network: nn.Module, graph: fx.Graph, inputs: list[Tensor]) -> None:
    """Run a graph, and note what depends on the sizes of the input: shapes and types of tensors, and numbers.

    These are ``node.meta["shape"]`` (of a tuple of tensors, a tuple), ``node.meta["dtype"]`` and
    ``node.meta["value"]``.

    Args:
        network: the network; it is not changed.
        graph: its graph.
        inputs: the tensors of an input.
    """

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            node.meta |= {"shape": tuple(value.shape), "dtype": value.dtype}
        elif node.op != "output" and isinstance(value, (tuple, list)) and all(isinstance(x, Tensor) for x in value):
            node.meta["shape"] = tuple(tuple(part.shape) for part in value)
        elif type(value) is int:
            node.meta["value"] = value

    known = enter_inputs(graph.nodes, inputs)
    for node, value in known.items():
        note(node, value)
    with evaluating(network), torch.no_grad():
        Run(network, graph, watch=note).results(known)
