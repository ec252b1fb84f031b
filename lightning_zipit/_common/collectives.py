"""What processes tell each other: sums of tensors, and the results or errors of shared work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 2**26

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def all_reduce_sums(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Sum each tensor over all processes of ``group``, in place; the results are identical on each.

    Small tensors travel together: one all-reduce for every 64 MiB. Without a process group, they stay as they are.

    Args:
        tensors: the same shapes in the same order on every process, of one type, on one device.
        group: the process group; by default all processes.
    """
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        size = sum(held.nbytes for held in bucket)
        if number == len(tensors) - 1 or size + tensors[number + 1].nbytes > BUCKET_BYTES:
            _all_reduce(bucket, group)
            bucket = []


def _all_reduce(bucket: Sequence[Tensor], group: Any) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    packed = torch.cat([held.flatten() for held in bucket])
    dist.all_reduce(packed, group=group)
    for held, total in zip(bucket, packed.split([held.numel() for held in bucket]), strict=True):
        held.copy_(total.view_as(held))


def exchange(work: Callable[[], Result]) -> list[Result]:
    """Do something on every process, and give every process what all have made of it.

    An error on one is raised on all, so that none waits for a process that has given up.

    Args:
        work: returns something that can be pickled.

    Returns:
        The results by rank; a list of one where there is no process group.

    Raises:
        Exception: the error of the lowest rank that has one.
    """
    if not is_distributed():
        return [work()]
    own: tuple[Result | None, Exception | None]
    try:
        own = work(), None
    except Exception as error:
        own = None, error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for _, raised in everyone:
        if raised is not None:
            raise own[1] or raised
    return [result for result, _ in everyone]
