"""Collective operations: sums of tensors, results and errors of all ranks, decisions of rank 0."""

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
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; ``(0, 1)`` without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def all_reduce_sums(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Sum each tensor over all processes of ``group``, in place. All processes get identical results.

    Small tensors are packed into one all-reduce per 64 MiB. Without a process group, the tensors do not change.

    Args:
        tensors: tensors of one type, on one device, with the same shapes in the same order on every process.
        group: the process group; by default all processes.
    """
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        size = sum(each.nbytes for each in bucket)
        if index == len(tensors) - 1 or size + tensors[index + 1].nbytes > BUCKET_BYTES:
            _all_reduce(bucket, group)
            bucket = []


def _all_reduce(bucket: Sequence[Tensor], group: Any) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    packed = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(packed, group=group)
    for tensor, total in zip(bucket, packed.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))


def exchange(work: Callable[[], Result]) -> list[Result]:
    """Call a function on every rank, and return the results of all ranks.

    An error on one rank is raised on all ranks. No rank then waits for a rank that has failed.

    Args:
        work: the function; its result must be picklable.

    Returns:
        The results in the order of the ranks; one result without a process group.

    Raises:
        Exception: the error of the lowest rank that failed. That rank raises the original, the others a copy.
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
    """Call a function on rank 0, and return its result on every rank.

    Every rank must call ``decide`` at the same point. The other ranks wait for rank 0.

    Args:
        work: the function; its result must be picklable.

    Raises:
        Exception: the error of rank 0. Rank 0 raises the original, the others a copy.
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
    """Result or error of a function on this rank.

    Args:
        packed: the pickled result or the packed error, to send to the other ranks.
        result: the original result.
        error: the original error.
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
