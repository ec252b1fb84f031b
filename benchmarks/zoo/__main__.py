"""Merge the networks of the zoo; write the results as a table.

usage: cd benchmarks; python -m zoo [PREFIX …] [--output FILE]
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from zoo.examine import Result, examine
from zoo.registry import ENTRIES

FILES = ("others", "vision", "hugging_face")


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| package | network | parameters | outcome | in the trunk | by activation | error | unlike networks | s |"
    yield "|---|---|--:|---|--:|--:|--:|---|--:|"
    for each in results:
        who = f"| {each.entry.package} | {each.entry.name} | {each.parameters / 1e6:.2f} M | {each.outcome} "
        if each.outcome in ("refused", "crashed"):
            yield f"{who}| – | – | – | {first_sentence(each.said)} | {each.seconds:.0f} |"
        else:
            unlike = first_sentence(each.unlike) if each.unlike else "run, saved, loaded, exported"
            numbers = f"| {each.shared:.0%} | {each.by_activation:.0%} | {each.error:.0e} "
            yield f"{who}{numbers}| {unlike} | {each.seconds:.0f} |"


def first_sentence(text: str) -> str:
    """The first sentence of an error, fit for a table."""
    return " ".join(text.split()).partition(". ")[0][:200].replace("|", "\\|")


def main() -> None:
    """Examine the networks whose package or name begins with a prefix, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefixes", nargs="*", help="beginnings of `package/name` (default: all)")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in FILES:
        importlib.import_module(f"zoo.{name}")
    results = []
    for entry in ENTRIES:
        full = f"{entry.package}/{entry.name}"
        if arguments.prefixes and not any(full.startswith(prefix) for prefix in arguments.prefixes):
            continue
        result = examine(entry)
        results.append(result)
        said = result.said or (f"not with unlike networks: {result.unlike}" if result.unlike else "")
        print(
            f"{result.outcome:13} {full}: error {result.error:.0e}, {result.shared:.0%} in the trunk, "
            f"{result.by_activation:.0%} by activation, {result.seconds:.0f} s {' '.join(said.split())[:300]}",
            flush=True,
        )
    built = [result for result in results if result.outcome != "not built"]
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(each.outcome for each in results).items()))
    if arguments.output:
        arguments.output.write_text("\n".join([*table(built), ""]))


if __name__ == "__main__":
    main()
