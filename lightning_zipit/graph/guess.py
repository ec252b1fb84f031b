"""Guesses of an input for networks that are traced without one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit.errors import UnknownShapeError
from lightning_zipit.graph.registry import Trait, operator_of_module
from lightning_zipit.graph.replay import working_copy

BATCH = 3
"""Number of samples of a guessed input."""
COMMON_SIZES = (32, 64, 224, 28, 96, 128, 256, 8, 16, 299, 384, 240, 260, 300, 336, 380, 448, 456, 512, 518, 528, 600)
TRIED_WITH_VALUES = 2
"""Number of guesses with which the network runs on its own device, if it fails on the meta device."""
TOKENS = (16, 128, 64, 32, 256, 512)


def guess_input(network: nn.Module) -> Tensor:
    """Guess an input of a network from its first layer with weights.

    The network runs on the meta device, without computing values.

    Args:
        network: a network of one input; it is not changed.

    Returns:
        An input of zeros, on the network's device.

    Raises:
        UnknownShapeError: if no guess fits.
    """
    needed = [
        each.name for each in inspect.signature(network.forward).parameters.values() if each.default is each.empty
    ]
    if len(needed) > 1:
        raise UnknownShapeError(
            f"{type(network).__name__}.forward takes {len(needed)} inputs ({', '.join(needed)}). Pass `example_input`, "
            "a tuple of positional arguments or a dict of keyword arguments."
        )
    meta, reason = _on_meta(network).eval(), None
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    for number, guess in enumerate(_guesses(network)):
        try:
            with torch.no_grad():
                meta(guess)
            return torch.zeros_like(guess, device=device)
        except Exception as error:  # forwards raise various exceptions for a wrong input
            reason = error
        if number < TRIED_WITH_VALUES and (found := _with_values(network, guess, device)) is not None:
            return found
    raise UnknownShapeError(
        f"The input shape of {type(network).__name__} cannot be inferred from its layers"
        f"{f' ({_first_line(reason)})' if reason else ''}. Pass `example_input`, a batch of at least one sample."
    )


def _with_values(network: nn.Module, guess: Tensor, device: torch.device) -> Tensor | None:
    """Return zeros that the network takes; ``None`` if it does not. Some forwards need values."""
    x = torch.zeros_like(guess, device=device)
    try:
        with torch.no_grad():
            working_copy(network)(x)
        return x
    except Exception:  # forwards raise various exceptions for a wrong input
        return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _on_meta(network: nn.Module) -> nn.Module:
    tensors = (*network.parameters(), *network.buffers())
    memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], requires_grad=False)
    return copy_module(network, memo)


def _guesses(network: nn.Module) -> Iterator[Tensor]:
    """Yield inputs that fit the first layer with weights."""
    weight, channels, embeds = _first_weight(network)
    if weight is None:
        return
    if embeds:
        yield from (torch.zeros(BATCH, length, dtype=torch.int64, device="meta") for length in TOKENS)
    elif weight.ndim == 2:
        for sizes in ((), (16,), (7, 7)):
            yield torch.empty(BATCH, *sizes, channels, device="meta", dtype=weight.dtype)
    else:
        for size in (*COMMON_SIZES, *range(4, 200)):
            positions = (size,) * (weight.ndim - 2)
            yield torch.empty(BATCH, channels, *positions, device="meta", dtype=weight.dtype)


def _first_weight(network: nn.Module) -> tuple[Tensor | None, int, bool]:
    """Return the weight of the first layer, its input channels, and whether integer indices look up its rows."""
    for module in network.modules():
        known = operator_of_module(module)
        weight = getattr(module, "weight", None) if known is not None else None
        if isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter) and weight.ndim >= 2:
            channels = getattr(module, "in_channels", weight.shape[1])
            return weight, channels, known is not None and Trait.LOOKUP in known.traits
    matrix = next((parameter for parameter in network.parameters() if parameter.ndim >= 2), None)
    return matrix, 0 if matrix is None else matrix.shape[1], False
