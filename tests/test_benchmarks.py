"""Benchmarks run nightly or by hand; that they fit the package is seen at once."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.py"))] + ["zoo.examine", "zoo.__main__"])
def test_a_benchmark_imports_what_exists(name):
    pytest.importorskip("torchvision")
    importlib.import_module(name)


@pytest.mark.parametrize("name", ["others", "vision", "hugging_face"])
def test_the_zoo_enters_its_networks_without_their_packages(name):
    importlib.import_module(f"zoo.{name}")
    from zoo.registry import ENTRIES

    names = [(entry.package, entry.name) for entry in ENTRIES]
    assert names and len(set(names)) == len(names)
