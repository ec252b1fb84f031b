"""The table of operators in the manual."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from torch._ops import OpOverload

from lightning_zipit.graph.registry import OPERATORS, Trait


def operators_as_markdown() -> str:
    """Format the registered operators as a Markdown table, with one row per rule and set of traits.

    Example:
        >>> "| `cumprod`, `cumsum`, `logcumsumexp` |" in operators_as_markdown()
        True
    """
    rows: dict[tuple[Trait, str], set[str]] = {}
    own = {key: known for key, known in OPERATORS.items() if known.rule.__module__.startswith(f"{__package__}.rules.")}
    for key, known in own.items():
        said = (inspect.getdoc(known.rule) or "").partition("\n")[0].replace("``", "`")
        rows.setdefault((known.traits, said), set()).add(_name(key))
    lines = ["| operators | traits | effect on features |", "| --- | --- | --- |"]
    for (traits, said), names in sorted(rows.items(), key=lambda row: min(map(str.lower, row[1]))):
        listed = ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name.lower(), name)))
        lines.append(f"| {listed} | {', '.join(_traits(traits))} | {said} |")
    return "\n".join(lines)


def _name(key: Any) -> str:
    """Return the usual name of an operator, without torch's prefixes."""
    if isinstance(key, OpOverload):
        key = key._schema.name.replace("::", ".")
    name = key if isinstance(key, str) else key.__name__
    return name.rpartition(".")[2].removeprefix("special_").removeprefix("linalg_")


def _traits(traits: Trait) -> list[str]:
    return sorted(str(trait.name).lower().replace("_", " ") for trait in Trait if trait in traits)


def write_into(page: Path) -> None:
    """Update the table on a page, between its two marks."""
    before, begin, rest = page.read_text().partition("<!-- operators -->\n")
    _, end, after = rest.partition("\n<!-- end of operators -->")
    page.write_text(before + begin + operators_as_markdown() + end + after)


if __name__ == "__main__":
    import lightning_zipit.graph.rules  # noqa: F401  (fills the registry)

    write_into(Path(sys.argv[1]))
