"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """The name of a file to write, which takes the place of ``output`` once it is complete.

    Where an error ends the block, or nothing was written, ``output`` stays as it was.
    """
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.part{output.suffix}")
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def find_output_problem(output: str | Path, argument: str = "output") -> str | None:
    """Why a file cannot be written, as far as that is known before; ``None`` where it can."""
    path = Path(output)
    if path.is_dir():
        return f"`{argument}` is a folder: {path}. Give the name of a file inside it."
    if not path.parent.is_dir():
        return f"The folder {path.parent} of `{argument}` does not exist."
    return None
