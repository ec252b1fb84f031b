"""The part of a page that a script writes."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- measured -->", "<!-- end -->"


def write_between_marks(page: Path, text: str) -> None:
    """Put a text between the marks of a page, in place of what is there; a page that is not there begins with it."""
    found = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = found[: found.index(BEGIN) + len(BEGIN)], found[found.index(END) :]
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
