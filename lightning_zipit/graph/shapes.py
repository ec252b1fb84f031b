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
    """Run a graph, and note shape and type of each tensor (``node.meta["shape"]``, ``node.meta["dtype"]``).

    Args:
        network: the network; it is not changed.
        graph: its graph.
        inputs: the tensors of an input.
    """

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            node.meta |= {"shape": tuple(value.shape), "dtype": value.dtype}

    known = enter_inputs(graph.nodes, inputs)
    for node, value in known.items():
        note(node, value)
    with evaluating(network), torch.no_grad():
        Run(network, graph, watch=note).results(known)
