"""Runs of a captured graph with other tensors and types, and the comparison of their results."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_zipit._common.calls import Call
from lightning_zipit._common.copying import copy_module
from lightning_zipit.graph.run import Run, enter_inputs

CAPTURE_TOLERANCE = 1e-3
"""Tolerance of a capture, relative to the largest output. Both run the same kernels, which may round differently."""


def working_copy(network: nn.Module) -> nn.Module:
    """Copy a network in eval mode, so that running and tracing it leave the original unchanged.

    Parameters share memory with the original and need no gradients. Buffers and attributes are copied.

    Args:
        network: the network; it is not changed.
    """
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in network.parameters()
        if not isinstance(parameter, nn.UninitializedParameter)
    }
    copied = copy_module(network, shared)
    for module in copied.modules():
        module.training = False
    return copied


@contextmanager
def swapped(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters and buffers of a network within the context.

    Args:
        network: the network; its own tensors are restored on exit.
        tensors: the replacements by name. The names of a tied tensor may have different replacements.
    """
    before: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
    try:
        for name, tensor in tensors.items():
            owner_name, _, attribute = name.rpartition(".")
            owner = network.get_submodule(owner_name)
            registry: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
            before.setdefault((id(owner), attribute), (registry, registry[attribute]))
            registry[attribute] = tensor
        yield
    finally:
        for (_, attribute), (registry, tensor) in before.items():
            registry[attribute] = tensor


def returned(run: Run, x: Call) -> list[Tensor]:
    """Run a whole graph on an input and return its output tensors."""
    return tensors_in(list(run.results(enter_inputs(run.nodes, x.tensors)).values()))


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def agree(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal up to a tolerance relative to the largest finite entry.

    NaN and infinities must be at the same indices.
    """
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    expected, found = expected.double(), found.double()
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    if not torch.equal(expected[~finite].nan_to_num(), found[~finite].nan_to_num()):
        return False
    gap, scale = (expected - found)[finite].abs(), expected[finite].abs()
    return not gap.numel() or bool(gap.max() <= tolerance * scale.max().clamp(min=torch.finfo(torch.float32).tiny))


def in_dtype(graph: fx.Graph, dtype: torch.dtype) -> fx.Graph:
    """Return the graph of a network in which another floating-point type stands wherever the forward writes float32.

    Args:
        graph: a captured graph.
        dtype: the type.
    """
    if dtype is torch.float32:
        return graph
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        node.args = _exchanged(node.args, torch.float32, dtype)
        node.kwargs = _exchanged(node.kwargs, torch.float32, dtype)
    return graph


def _exchanged(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if value is old:
        return new
    if isinstance(value, (tuple, list)):
        return type(value)(_exchanged(part, old, new) for part in value)
    return {key: _exchanged(part, old, new) for key, part in value.items()} if isinstance(value, dict) else value
