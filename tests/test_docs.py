"""The documentation site describes everything that is public."""

import pkgutil
import re
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import griffe
import pytest
from mkdocs.exceptions import PluginError

import lightning_zipit
from lightning_zipit._common.options import keywords_of

hooks = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "hooks.py"))
DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
DOCUMENTED = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", lightning_zipit.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert any(pkgutil.resolve_name(path) is getattr(lightning_zipit, name) for path in DOCUMENTED)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_the_reference_names_what_exists(path):
    pkgutil.resolve_name(path)


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("sweep.md", "../README.md#merge", "index.md#merge"),
        ("index.md", "docs/sweep.md", "sweep.md"),
        ("index.md", "examples/cli/README.md", "command_line_example.md"),
        ("reference/plots.md", "../plots.md", "../plots.md"),
        ("sweep.md", "https://arxiv.org", "https://arxiv.org"),
        ("sweep.md", "*arguments", "*arguments"),
    ],
)
def test_links_are_right_in_the_repository_and_on_the_site(page, link, leads_to):
    elsewhere = {page: source for source, page in hooks["ELSEWHERE"].items()}
    file = SimpleNamespace(abs_src_path=DOCS.parent / elsewhere.get(page, f"docs/{page}"), src_uri=page)
    config = SimpleNamespace(config_file_path=DOCS.parent / "mkdocs.yml", docs_dir=DOCS)
    found = hooks["on_page_markdown"](f"see [this]({link})", SimpleNamespace(file=file), config, None)
    assert found == f"see [this]({leads_to})"


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://cdn.org/mathjax.js"></script>', True),
        ('<link rel="stylesheet" href="https://fonts.org/css">', True),
        ('<img src="images/zip.svg"><a href="https://arxiv.org">a link</a>', False),
    ],
)
def test_pages_load_nothing_from_elsewhere(html, refused):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(PluginError, match="loads something from elsewhere") if refused else nullcontext():
        hooks["on_post_page"](html, page, None)


def test_the_reference_shows_every_option_of_a_merge():
    extensions = griffe.load_extensions(str(DOCS / "hooks.py"))
    package = griffe.load("lightning_zipit", extensions=extensions)
    for path in ("driver.ZipIt.merge", "driver.ZipIt.sweep", "callback.ZipItCallback"):
        loaded = package[f"_lightning.{path}"]
        for option in keywords_of(lightning_zipit.MergeSettings):
            assert option in loaded.parameters and f"\n    {option}: " in loaded.docstring.value
