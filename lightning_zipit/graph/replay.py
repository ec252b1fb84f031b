"""Runs a captured graph on a network with other tensors in place of its own, and compares it with the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_zipit._common.copying import copy_module
from lightning_zipit.errors import CalibrationError, TraceError
from lightning_zipit.graph.run import Run
from lightning_zipit.graph.shapes import evaluating

CAPTURE_TOLERANCE = 1e-3
"""Of a capture, relative to the largest output: both run the same kernels, which may round differently."""


def working_copy(network: nn.Module) -> nn.Module:
    """A copy of a network in eval mode to run and to trace: whatever a forward keeps, it keeps there.

    Parameters share the memory of the network's and take no gradients; buffers and attributes are the copy's own.

    Args:
        network: the network; it is left as it is.
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
    """Inside, a network has other parameters and buffers.

    Args:
        network: the network; its own are back afterwards.
        tensors: the others by name; under two names, a tied tensor can be two.
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


def returned(run: Run, x: Tensor) -> list[Tensor]:
    """The tensors that a whole graph returns for an input."""
    return tensors_in(list(run.results({node: x for node in run.nodes if node.op == "placeholder"}).values()))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def agree(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same up to a tolerance relative to the largest finite entry.

    NaN and infinities must be in the same places.
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


def check_capture(network: nn.Module, graph: fx.Graph, x: Tensor, name: str = "") -> None:
    """Compare a captured graph with the forward that it was captured from.

    Args:
        network: the network, or a working copy of it.
        graph: the captured graph.
        x: an input of another batch size than the graph was captured with.
        name: how errors call the network.

    Raises:
        TraceError: if the graph computes anything else, or the forward is random in eval mode.
        CalibrationError: if the network cannot take the input.
    """
    who = f"{type(network).__name__}{f' of task {name!r}' if name else ''}"
    with evaluating(network), torch.inference_mode(False), torch.no_grad():
        try:
            expected = tensors_in(network(x.clone()))
        except Exception as error:
            raise CalibrationError(
                f"The backbone {who} cannot take an input of shape {tuple(x.shape)} ({x.dtype}): {error}"
            ) from error
        found = returned(Run(network, graph), x)
        if len(expected) == len(found) and all(map(_close, expected, found)):
            return
        again = tensors_in(network(x.clone()))
    if not all(map(_close, expected, again)):
        raise TraceError(
            f"The forward of {who} gives another result each time in eval mode, so that a merge of it cannot be "
            "checked. Switch off what is random in eval mode."
        )
    raise TraceError(
        f"The graph that was captured of {who} does not compute what its forward does: the forward decides something "
        "by what it is given (such as `isinstance(x, torch.Tensor)`), or changes a tensor in place where the capture "
        "cannot follow. Name a submodule without that line as `backbone`, or hide the block behind a leaf module with "
        "`lightning_zipit.graph.register_rule`."
    )


def _close(expected: Tensor, found: Tensor) -> bool:
    return agree(expected, found, CAPTURE_TOLERANCE)
