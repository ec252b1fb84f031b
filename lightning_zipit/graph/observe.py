"""Runs of a network in eval mode, and what they return and read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_zipit._common.randomness import seeded
from lightning_zipit._common.structure import Structure, UnknownContainerError, flatten
from lightning_zipit.errors import CalibrationError
from lightning_zipit.graph.decisions import Read, Watch
from lightning_zipit.graph.explain_capture import unknown_container
from lightning_zipit.graph.replay import working_copy


class Observed(NamedTuple):
    """One run of a network: the tensors that it returned, their structure, and what it read from tensors."""

    tensors: list[Tensor]
    structure: Structure
    reads: list[Read]


def observe(
    network: nn.Module,
    inputs: Structure,
    tensors: Sequence[Tensor],
    who: str,
    seed: int = 0,
    working: nn.Module | None = None,
) -> Observed:
    """Run a network; it is not changed.

    Args:
        network: the network.
        inputs: the structure of its arguments.
        tensors: the tensors of an input, which are not changed.
        who: what errors call the network.
        seed: the seed of random numbers.
        working: a copy of the network to run, which may be changed.

    Raises:
        CalibrationError: if the network cannot take the input.
        TraceError: if it returns a value that may hold tensors and does not say where.
    """
    working = working if working is not None else working_copy(network)
    args, kwargs = inputs.unflatten([tensor.clone() for tensor in tensors])
    try:
        with observing(seed), Watch() as watch:
            returned = working(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(tensor.shape)} ({tensor.dtype})" for tensor in tensors)
        raise CalibrationError(f"The backbone {who} cannot take an input of shape {shapes}: {error}") from error
    try:
        found, structure = flatten(returned, "output")
    except UnknownContainerError as error:
        raise unknown_container(who, error, "returns") from error
    return Observed(found, structure, watch.reads)


@contextmanager
def observing(seed: int = 0) -> Iterator[None]:
    """Run a forward: without gradients, and with random numbers that are the same each time."""
    with torch.inference_mode(False), torch.no_grad(), seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
