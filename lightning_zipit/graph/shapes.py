"""Shapes of all tensors in a captured graph, from an example input or a guessed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit.errors import TraceError, UnknownShapeError
from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.run import Run

BATCH = 3
"""Batch size of the input: small, and seldom equal to another size."""
COMMON_SIZES = (32, 64, 224, 28, 96, 128, 256, 8, 16, 299, 384, 240, 260, 300, 336, 380, 448, 456, 512, 518, 528, 600)
TOKENS = (16, 128, 64, 32, 256, 512)


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


def shapes_of(backbone: nn.Module, graph: fx.Graph, example: Tensor | None) -> dict[str, tuple[int, ...]]:
    """Find the shape of every tensor in a captured graph, by node name.

    The network runs on the meta device, without computing values. It runs on its own device only with an example and
    with an operator that needs values.

    Args:
        backbone: the network.
        graph: its graph.
        example: an input; its values do not matter. Without an example, inputs that fit the first layer are tried.

    Raises:
        UnknownShapeError: if no guess fits.
        TraceError: if the network fails on the example.
    """
    meta = _on_meta(backbone)
    if example is not None:
        samples = example[:1].expand(BATCH, *example.shape[1:])
        try:
            return _record(meta, graph, torch.empty_like(samples, device="meta", memory_format=torch.contiguous_format))
        except Exception:  # operators that need values raise various exceptions
            return _record_or_explain(backbone, graph, samples)
    reason: Exception | None = None
    for guess in _guesses(backbone, graph):
        try:
            return _record(meta, graph, guess)
        except Exception as error:  # forwards raise various exceptions for a wrong input
            reason = error
    raise UnknownShapeError(
        f"The input shape of {type(backbone).__name__} cannot be inferred from its layers"
        f"{f' ({_first_line(reason)})' if reason else ''}. Pass `example_input`, a batch of at least one sample."
    )


def _record(backbone: nn.Module, graph: fx.Graph, x: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)

    inputs = {node: x for node in graph.nodes if node.op == "placeholder"}
    shapes.update({node.name: tuple(x.shape) for node in inputs})
    with evaluating(backbone), torch.no_grad():
        Run(backbone, graph, watch=note).results(inputs)
    return shapes


def _record_or_explain(backbone: nn.Module, graph: fx.Graph, x: Tensor) -> dict[str, tuple[int, ...]]:
    try:
        return _record(backbone, graph, x.clone())
    except Exception as error:
        raise TraceError(
            f"{type(backbone).__name__} failed on an input of shape {tuple(x.shape)}: {_first_line(error)}. Pass an "
            "`example_input` that the backbone's own forward accepts."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _on_meta(backbone: nn.Module) -> nn.Module:
    tensors = (*backbone.parameters(), *backbone.buffers())
    memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], requires_grad=False)
    return copy_module(backbone, memo)


def _guesses(backbone: nn.Module, graph: fx.Graph) -> Iterator[Tensor]:
    """Yield inputs that fit the first layer with weights."""
    weight, embeds = _first_weight(backbone, graph)
    if weight is None:
        return
    if embeds:
        yield from (torch.zeros(BATCH, length, dtype=torch.int64, device="meta") for length in TOKENS)
    elif weight.ndim == 2:
        for sizes in ((), (16,), (7, 7)):
            yield torch.empty(BATCH, *sizes, weight.shape[1], device="meta", dtype=weight.dtype)
    else:
        for size in (*COMMON_SIZES, *range(4, 200)):
            positions = (size,) * (weight.ndim - 2)
            yield torch.empty(BATCH, weight.shape[1], *positions, device="meta", dtype=weight.dtype)


def _first_weight(backbone: nn.Module, graph: fx.Graph) -> tuple[Tensor | None, bool]:
    """Return the weight of the first layer, and whether integer indices look up its rows."""
    for node in graph.nodes:
        traits = traits_of(node, backbone)
        weight: Any = None
        if node.op == "call_module":
            weight = getattr(backbone.get_submodule(str(node.target)), "weight", None)
        elif Trait.PRODUCER in traits:
            source = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            weight = attrgetter(str(source.target))(backbone) if getattr(source, "op", "") == "get_attr" else None
        if isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter) and weight.ndim >= 2:
            return weight, Trait.LOOKUP in traits
    return None, False
