"""Check that a module which was read from a file computes the same as the module that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_zipit._common.views import Inputs, each_view, like
from lightning_zipit._lightning.files.checkpoint import ask_for_module
from lightning_zipit.errors import CheckpointError
from lightning_zipit.graph.replay import agree, tensors_in
from lightning_zipit.graph.shapes import evaluating

TOLERANCE = 1e-2
"""Tolerance of outputs relative to the largest one: another device rounds differently."""

ENTRIES = 256
"""Maximum number of output entries of a task in a file."""


def sample_outputs(module: nn.Module, example: Inputs | None) -> dict[str, Tensor]:
    """Run a merged module on fixed random numbers in eval mode, and select some entries of each task's output.

    Args:
        module: the merged module.
        example: an input of one sample; ``None`` if it is unknown.

    Returns:
        The entries by task; an empty dict if the module cannot be run in this way, such as with sharded parameters.
    """
    sharded = any(type(tensor.data) is not Tensor for tensor in module.parameters())
    if example is None or sharded:
        return {}
    try:
        with evaluating(module), torch.no_grad(), isolate_rng():
            outputs = module(like(each_view(example, lambda one: one.repeated(2).with_noise()), module))
    except Exception:  # the forward may need more than such an input
        return {}
    return {task: _select(output) for task, output in outputs.items()}


def _select(output: Any) -> Tensor:
    flat = [tensor.detach().flatten().float().cpu() for tensor in tensors_in(output) if tensor.is_floating_point()]
    entries = torch.cat([torch.zeros(0), *flat])
    chosen = torch.linspace(0, max(len(entries) - 1, 0), min(ENTRIES, len(entries))).long()
    return entries[chosen].clone()


def check_outputs(module: nn.Module, example: Inputs | None, saved: Mapping[str, Tensor], where: str) -> None:
    """Compare a module that was read from a file with the outputs that were saved.

    Args:
        module: the module.
        example: an input of one sample.
        saved: the outputs of :func:`sample_outputs` in the file.
        where: the file, for error messages.

    Raises:
        CheckpointError: if the outputs differ.
    """
    found = sample_outputs(module, example) if saved else {}
    wrong = [task for task, expected in saved.items() if task in found and not _same(expected, found[task])]
    if wrong:
        raise CheckpointError(
            f"The module that was read from {where} does not compute the same as the module that was saved, for task "
            f"{wrong[0]!r}. Its source modules were made from their classes and hyperparameters, which lack something: "
            "a class as argument, an attribute that was set later, a buffer with persistent=False, or a changed class. "
            f"{ask_for_module(wrong[0], 'a module like the one that was merged')} "
            "If the weights in the file were changed, pass strict=False."
        )


def _same(expected: Tensor, found: Tensor) -> bool:
    return agree(expected, found.to(expected.device), TOLERANCE)
