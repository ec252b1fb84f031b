"""The documentation site describes everything that is public."""

import importlib
import re
from pathlib import Path

import pytest

import lightning_zipit

DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
DOCUMENTED = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", lightning_zipit.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert f"lightning_zipit.{name}" in DOCUMENTED


@pytest.mark.parametrize("path", DOCUMENTED)
def test_the_reference_names_what_exists(path):
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
