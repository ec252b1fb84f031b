"""Tables that scripts write into pages."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- measured -->", "<!-- end -->"


def write_between_marks(page: Path, text: str) -> None:
    """Replace the text between the marks of a page. Create the page if it does not exist."""
    found = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = found[: found.index(BEGIN) + len(BEGIN)], found[found.index(END) :]
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
