"""Runs of a captured graph with exchanged tensors, and its comparison with the network's forward."""

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


def returned(run: Run, x: Tensor) -> list[Tensor]:
    """Run a whole graph on an input and return its output tensors."""
    return tensors_in(list(run.results({node: x for node in run.nodes if node.op == "placeholder"}).values()))


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


def check_capture(network: nn.Module, graph: fx.Graph, x: Tensor, name: str = "") -> None:
    """Check that a captured graph computes the same as the network's forward.

    Args:
        network: the network, or a working copy of it.
        graph: the captured graph.
        x: an input whose batch size differs from the one of the capture.
        name: the task, for error messages.

    Raises:
        TraceError: if the graph computes something different, or the forward is random in eval mode.
        CalibrationError: if the forward fails on the input.
    """
    who = f"{type(network).__name__}{f' of task {name!r}' if name else ''}"
    with evaluating(network), torch.inference_mode(False), torch.no_grad():
        try:
            expected = tensors_in(network(x.clone()))
        except Exception as error:
            raise CalibrationError(
                f"The forward of the backbone {who} failed on an input of shape {tuple(x.shape)} ({x.dtype}): {error}"
            ) from error
        found = returned(Run(network, graph), x)
        if len(expected) == len(found) and all(map(_close, expected, found)):
            return
        again = tensors_in(network(x.clone()))
    if not all(map(_close, expected, again)):
        raise TraceError(
            f"The forward of {who} is random in eval mode: two runs on the same input give different results. A merge "
            "of it cannot be checked. Make the forward deterministic in eval mode."
        )
    raise TraceError(
        f"The captured graph of {who} does not compute the same as its forward. The forward branches on its input "
        "(such as `isinstance(x, torch.Tensor)`), or changes a tensor in place where torch.fx does not record it. "
        "Choose a submodule without that code as `backbone`, or register a rule for the block with "
        "`lightning_zipit.graph.register_rule`, so that it becomes a leaf module."
    )


def _close(expected: Tensor, found: Tensor) -> bool:
    return agree(expected, found, CAPTURE_TOLERANCE)
