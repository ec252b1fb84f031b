"""Errors of one rank that end all ranks.

A rank that fails between two collectives leaves the other ranks waiting in the next one. Here, the rank writes its
error into the store of the process group and closes its connections. The collectives of the other ranks then fail, and
these ranks find the error in the store.
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
"""Seconds that a rank waits until the others have read its error: rank 0 hosts the store that holds it."""

POLL = 0.02
"""Seconds between two looks into the store."""

Result = TypeVar("Result")

_is_inside: ContextVar[bool] = ContextVar("inside ending_together", default=False)


@contextmanager
def ending_together() -> Iterator[None]:
    """End the block on every rank at once: all ranks complete it, or all raise the same error.

    Every rank must enter and leave the block. Without a process group, the block is left as usual.

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
    """Whether a surrounding :func:`ending_together` will handle an error."""
    return _is_inside.get()


def attempt_together(work: Callable[[], Result]) -> Result | Exception:
    """Call a function on every rank; an error that all ranks have is returned, and the ranks can go on.

    Args:
        work: the function.

    Returns:
        The result of this rank, or the error of all ranks.

    Raises:
        Exception: an error that not all ranks have; see :func:`end_together`.
    """
    try:
        result = work()
        _wait_for_all()
    except Exception as error:
        end_together(error)
        return error
    return result


def end_together(error: BaseException) -> None:
    """Tell the other ranks of an error, and end all ranks with the error of the rank that failed first.

    If all ranks have the same error, such as one of the configuration, this function returns: then no rank waits for
    another, and the process group stays usable. Otherwise the process group is closed.

    Args:
        error: the error of this rank.

    Raises:
        Exception: the error of the rank that failed first: the original on that rank, a copy on the others.
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
    """End the process group of this rank without waiting for collectives; those of the other ranks fail."""
    if is_distributed():
        destroy = dist.destroy_process_group
        if "nccl" in dist.get_backend():  # its `destroy` waits for the other ranks
            destroy = getattr(distributed_c10d, "_abort_process_group", destroy)  # torch < 2.6 has no `abort`
        destroy()


@dataclass(frozen=True)
class _Board:
    """Where ranks post their errors, in the store of the process group.

    Args:
        store: the store.
        prefix: of the keys. Every time that a rank has an error to tell, it uses another board.
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

        The wait is over once all ranks have posted, one has posted another error than ``own``, or time is up.
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
        """Wait until all ranks have read, at most ``READ_TIMEOUT`` seconds."""
        end = time.monotonic() + READ_TIMEOUT
        read = self.store.add(f"{self.prefix}/read", 1)
        while read < size and time.monotonic() < end:
            time.sleep(POLL)
            read = self.store.add(f"{self.prefix}/read", 0)
