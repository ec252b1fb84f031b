"""Propagation of an error on one rank to all ranks.

If a rank fails between two collectives, the other ranks wait in the next collective. To end them, the failed rank
writes its error into the store of the process group and closes its connections. The collectives of the other ranks then
fail, and these ranks read the error from the store.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_zipit._common.collectives import exchange, is_distributed, rank_and_size
from lightning_zipit._common.portable import PackedError

GRACE = 5.0
"""Seconds that a rank with an error waits for the same error of the other ranks."""

READ_TIMEOUT = 10.0
"""Seconds that a rank waits until the others have read its error, because rank 0 hosts the store."""

POLL = 0.02
"""Seconds between two reads of the store."""

Result = TypeVar("Result")

_is_inside: ContextVar[bool] = ContextVar("inside ending_together", default=False)


@contextmanager
def ending_together() -> Iterator[None]:
    """Context manager whose block all ranks complete, or all ranks leave with the same error.

    Every rank must enter and leave the block. Without a process group, nothing changes.

    Raises:
        Exception: the error of the rank that failed first; see :func:`end_together`.
    """
    token = _is_inside.set(True)
    try:
        yield
        _wait_for_all()
    except BaseException as error:
        end_together(error)
        raise
    finally:
        _is_inside.reset(token)


def is_ending_together() -> bool:
    """Whether this code runs inside :func:`ending_together`, which will handle an error."""
    return _is_inside.get()


def attempt_together(work: Callable[[], Result]) -> Result | Exception:
    """Call a function on every rank, and return an error that all ranks have in common, so that they can continue.

    Args:
        work: the function.

    Returns:
        The result of this rank, or the common error.

    Raises:
        Exception: an error that only some ranks have; see :func:`end_together`.
    """
    try:
        result = work()
        _wait_for_all()
    except Exception as error:
        end_together(error)
        return error
    return result


def end_together(error: BaseException) -> None:
    """Send an error to the other ranks, and end all ranks with the error of the rank that failed first.

    If all ranks have the same error, such as an error of the configuration, the function returns: no rank waits for
    another, and the process group stays usable. Otherwise the process group is closed.

    Args:
        error: the error of this rank.

    Raises:
        Exception: the error of the rank that failed first. That rank raises the original, the others a copy.
    """
    if not is_distributed():
        return
    rank, size = rank_and_size()
    own = first = PackedError.of(error, rank)
    with suppress(RuntimeError):  # the store may have ended with rank 0
        board = _Board.of_next_error(rank)
        board.post(own)
        posts = board.read(own, size)
        if len(posts) == size and all(own.same_as(post) for post in posts):
            return
        first = posts[0] if posts else own
        _close_connections()
        board.wait_for_readers(size)
    _close_connections()
    raise error if first.rank == rank else first.unpack()


def _wait_for_all() -> None:
    exchange(lambda: None)


def _close_connections() -> None:
    """Close the process group without waiting for collectives, so that the collectives of the other ranks fail."""
    if is_distributed():
        destroy = dist.destroy_process_group
        if "nccl" in dist.get_backend():  # its `destroy` waits for the other ranks
            destroy = getattr(distributed_c10d, "_abort_process_group", destroy)  # torch < 2.6 has no `abort`
        destroy()


@dataclass(frozen=True)
class _Board:
    """Board in the store of the process group, on which ranks post their errors.

    Args:
        store: the store.
        prefix: the prefix of the keys. A rank uses a new board for each of its errors.
    """

    store: Any
    prefix: str

    @classmethod
    def of_next_error(cls, rank: int) -> _Board:
        store = distributed_c10d._get_default_store()
        return cls(store, f"lightning_zipit/{store.add(f'lightning_zipit/errors/{rank}', 1)}")

    def post(self, error: PackedError) -> None:
        place = self.store.add(f"{self.prefix}/posts", 1)
        self.store.set(f"{self.prefix}/post/{place}", pickle.dumps(error))

    def read(self, own: PackedError, size: int) -> list[PackedError]:
        """Read the errors in the order in which they were posted.

        The wait ends when all ranks have posted, when a rank has posted an error different from ``own``, or after
        ``GRACE`` seconds.
        """
        posts: list[PackedError] = []
        end = time.monotonic() + GRACE
        while len(posts) < size and all(own.same_as(post) for post in posts):
            key = f"{self.prefix}/post/{len(posts) + 1}"
            if self.store.check([key]):
                posts.append(pickle.loads(self.store.get(key)))
            elif time.monotonic() < end:
                time.sleep(POLL)
            else:
                break
        return posts

    def wait_for_readers(self, size: int) -> None:
        """Wait until all ranks have read the board, for at most ``READ_TIMEOUT`` seconds."""
        end = time.monotonic() + READ_TIMEOUT
        read = self.store.add(f"{self.prefix}/read", 1)
        while read < size and time.monotonic() < end:
            time.sleep(POLL)
            read = self.store.add(f"{self.prefix}/read", 0)
