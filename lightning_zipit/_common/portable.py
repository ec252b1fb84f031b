"""Serialisation of results and errors for other ranks."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

from lightning_zipit.errors import RankError


def pack_result(result: Any) -> bytes:
    """Pickle a result.

    Raises:
        TypeError: if the result cannot be pickled.
    """
    try:
        return pickle.dumps(result)
    except Exception as error:
        kind = type(result)
        raise TypeError(
            f"A result of type {kind.__module__}.{kind.__qualname__} cannot be sent to the other processes, because "
            f"it cannot be pickled ({error}). Define the classes and functions that it uses at the top level of a "
            "module."
        ) from error


@dataclass(frozen=True)
class PackedError:
    """An error of one rank in a form that every other rank can unpickle.

    Args:
        rank: the rank that failed.
        kind: the dotted name of its type.
        message: its text.
        traceback: its traceback as text.
        pickled: the pickled error; ``None`` if it cannot be pickled.
    """

    rank: int
    kind: str
    message: str
    traceback: str
    pickled: bytes | None

    @classmethod
    def of(cls, error: BaseException, rank: int) -> PackedError:
        kind = type(error)
        text = "".join(traceback.format_exception(kind, error, error.__traceback__))
        return cls(rank, f"{kind.__module__}.{kind.__qualname__}", _text_of(error), text, _pickle(error))

    def same_as(self, other: PackedError) -> bool:
        """Whether both errors have the same type and message."""
        return (self.kind, self.message) == (other.kind, other.message)

    def unpack(self) -> Exception:
        """Recreate the error, with its own type if possible, otherwise as a :class:`~lightning_zipit.errors.RankError`.

        The ``__cause__`` of the new error holds the traceback of the original.
        """
        origin = RankError(f"Traceback of rank {self.rank}:\n{self.traceback}")
        error = None if self.pickled is None else _unpickle(self.pickled)
        if error is None:
            error = RankError(f"Rank {self.rank} ended with {self.kind}: {self.message}")
        error.__cause__ = origin
        return error


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # `__str__` itself can fail
        return "(its text cannot be read)"


def _pickle(error: BaseException) -> bytes | None:
    """Pickle an error; return ``None`` if it is not an ``Exception``, or cannot be unpickled."""
    if not isinstance(error, Exception):  # KeyboardInterrupt and SystemExit would end other ranks without a message
        return None
    try:
        pickled = pickle.dumps(error)
    except Exception:
        return None
    copy = _unpickle(pickled)
    return pickled if copy is not None and _text_of(copy) == _text_of(error) else None


def _unpickle(pickled: bytes) -> Exception | None:
    """Unpickle an error.

    Returns:
        The error; ``None`` if its class is unknown in this process, or cannot be created from the pickled arguments.
    """
    try:
        error = pickle.loads(pickled)
    except Exception:
        return None
    return error if isinstance(error, Exception) else None
