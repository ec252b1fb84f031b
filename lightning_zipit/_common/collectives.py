"""Collectives: sums of tensors, results and errors of all ranks, decisions of rank 0."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zipit._common.portable import PackedError, pack_result

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
    """Call a function on every rank, and give every rank the results of all.

    An error on one rank is raised on all ranks, so that no rank waits for one that has given up.

    Args:
        work: the function; its result must be picklable.

    Returns:
        The results by rank; one result without a process group.

    Raises:
        Exception: the error of the lowest rank that has one. On that rank it is the original, on the others a copy.
        TypeError: if a result cannot be pickled.
    """
    if not is_distributed():
        return [work()]
    rank, size = rank_and_size()
    own = _Outcome.of(work, rank)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own.packed)
    for packed in everyone:
        if isinstance(packed, PackedError):
            raise own.error if packed.rank == rank and own.error else packed.unpack()
    return [own.result if number == rank else pickle.loads(packed) for number, packed in enumerate(everyone)]


def decide(work: Callable[[], Result]) -> Result:
    """Call a function on rank 0, and give every rank its result.

    Every rank must call this function at the same point. Ranks other than 0 wait there.

    Args:
        work: the function; its result must be picklable.

    Raises:
        Exception: the error of rank 0. On rank 0 it is the original, on the others a copy.
        TypeError: if the result cannot be pickled.
    """
    if not is_distributed():
        return work()
    own = _Outcome.of(work, 0) if dist.get_rank() == 0 else None
    sent: list[Any] = [own and own.packed]
    dist.broadcast_object_list(sent, src=0)
    (packed,) = sent
    if isinstance(packed, PackedError):
        raise own.error if own and own.error else packed.unpack()
    return cast(Result, own.result if own else pickle.loads(packed))


@dataclass(frozen=True)
class _Outcome:
    """What a function of this rank has returned or raised.

    Args:
        packed: the result or the error, as it is sent to the other ranks.
        result: the result itself.
        error: the error itself.
    """

    packed: bytes | PackedError
    result: Any = None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], Any], rank: int) -> _Outcome:
        try:
            result = work()
            return cls(pack_result(result), result)
        except Exception as error:
            return cls(PackedError.of(error, rank), error=error)
