"""Results and errors as bytes, to send them to other ranks."""

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
            f"A result of type {kind.__module__}.{kind.__qualname__} cannot be sent to the other processes, as it "
            f"cannot be pickled ({error}). Objects in it must belong to classes and functions at the top of a module."
        ) from error


@dataclass(frozen=True)
class PackedError:
    """An error of one rank, which every other rank can read.

    Args:
        rank: the rank that had the error.
        kind: the dotted name of its type.
        message: its text.
        traceback: its traceback as text.
        pickled: the error itself; ``None`` if it cannot be pickled.
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
        """Whether both errors have one type and one text."""
        return (self.kind, self.message) == (other.kind, other.message)

    def unpack(self) -> Exception:
        """Make the error anew: of its own type if possible, else a :class:`~lightning_zipit.errors.RankError`.

        The traceback of the original is the ``__cause__`` of the new error.
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
    except Exception:  # of a `__str__` that fails itself
        return "(its text cannot be read)"


def _pickle(error: BaseException) -> bytes | None:
    """Pickle an error, if it is an ``Exception`` that can be made anew from its pickle."""
    if not isinstance(error, Exception):  # KeyboardInterrupt and SystemExit would end other ranks without a word
        return None
    try:
        pickled = pickle.dumps(error)
    except Exception:
        return None
    copy = _unpickle(pickled)
    return pickled if copy is not None and _text_of(copy) == _text_of(error) else None


def _unpickle(pickled: bytes) -> Exception | None:
    """Make an error anew.

    Returns:
        ``None`` if its class is unknown here, or cannot be made from what an exception keeps.
    """
    try:
        error = pickle.loads(pickled)
    except Exception:
        return None
    return error if isinstance(error, Exception) else None
