"""Atomic file writes, and locks."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """The name of a file to write, which takes the place of ``output`` once it is complete.

    Where an error ends the block, or nothing was written, ``output`` stays as it was. The name is unique, also among
    containers that have the same process ids.
    """
    temporary = output.with_name(f".{output.stem}.{uuid.uuid4().hex}.part{output.suffix}")
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_with_companions(output: Path) -> Iterator[Path]:
    """The same, for a format that may put a part of its content into files beside the one that is asked for.

    The file to write has the name of ``output``, in a folder of its own; it moves last, once its companions are there.
    """
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder:
        yield Path(folder) / output.name
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == output.name):
            os.replace(written, output.with_name(written.name))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file: other processes that lock it wait until the block ends.

    The lock of a process that has ended is free. The lock is a hidden file beside ``path``, and is deleted.
    """
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            with suppress(OSError):  # an open file cannot be deleted on Windows, where filelock does it later
                lock.unlink()  # before it is released: filelock ignores the lock of a file that was deleted meanwhile


def find_output_problem(output: str | Path, argument: str = "output") -> str | None:
    """Why a file cannot be written, as far as that is known before; ``None`` where it can."""
    path = Path(output)
    if path.is_dir():
        return f"`{argument}` is a folder: {path}. Give the name of a file inside it."
    if not path.parent.is_dir():
        return f"The folder {path.parent} of `{argument}` does not exist."
    return None
