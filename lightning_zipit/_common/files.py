"""Atomic file writes and file locks."""

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
    """Context manager that yields a temporary file name, and moves the complete file to ``output`` at the end.

    If an error ends the block, or nothing was written, ``output`` does not change. The name is unique, even among
    containers with equal process ids.
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
    """Like :func:`replacing`, for a format that may write companion files into the same folder.

    The yielded file has the name of ``output`` and lies in a temporary folder. It is moved last, after its companions.
    """
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder:
        yield Path(folder) / output.name
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == output.name):
            os.replace(written, output.with_name(written.name))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file. Other processes that lock the same file wait until the block ends.

    The end of a process frees its locks. The lock is a hidden file in the folder of ``path``. It is deleted at the end.
    """
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            with suppress(OSError):  # an open file cannot be deleted on Windows; filelock deletes it there later
                lock.unlink()  # before the release: filelock discards a lock whose file was deleted meanwhile


def find_output_problem(output: str | Path, argument: str = "output") -> str | None:
    """Explain why a file cannot be written; return ``None`` if no reason is known in advance.

    Args:
        output: the file to write.
        argument: the name of the argument that holds the file, for the message.
    """
    path = Path(output)
    if path.is_dir():
        return f"`{argument}` is a folder: {path}. Give the name of a file inside it."
    if not path.parent.is_dir():
        return f"The folder {path.parent} of `{argument}` does not exist. Create it, or give another file."
    return None
