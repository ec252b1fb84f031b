"""What the documentation site does beside mkdocs: pages from files outside ``docs/``, and links in docstrings."""

import inspect
import os
import pkgutil
import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/cli/README.md": "command_line_example.md",
}
"""Files of the repository that are pages of the site, too."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
ROLE = re.compile(r":(?:class|func|meth|attr|exc|mod):`(~?)([\w.]+)`")
REMOTE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?https?:|<link\b[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*https?:"
)


def on_files(files, config):
    """Add the pages from elsewhere."""
    root = Path(config.config_file_path).parent
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links that are right in the repository to where the site has their targets."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    here = Path(page.file.abs_src_path)

    def relink(match):
        target = Path(os.path.normpath(here.parent / match[1]))
        if not target.exists():  # code, or a link that the build will find broken
            return match[0]
        uri = ELSEWHERE.get(target.relative_to(root).as_posix()) or os.path.relpath(target, docs)
        return os.path.relpath(uri, Path(page.file.src_uri).parent)

    return LINK.sub(relink, markdown)


def on_post_page(output, page, config):
    """Refuse what a reader would have to load from elsewhere."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")


SPELLED_OUT = {"with_options", "with_choices"}
"""Decorators that show each of the keyword arguments of ``**kwargs``."""


def spell_out(obj):
    """Show the signature and docstring that a decorated function or class has when it is imported."""
    runtime = pkgutil.resolve_name(obj.path)
    obj.docstring.value = inspect.getdoc(runtime)
    parameters = (obj.members["__init__"] if obj.is_class else obj).parameters
    (taken,) = (each.name for each in parameters if each.kind is griffe.ParameterKind.var_keyword)
    del parameters[taken]
    for name, parameter in inspect.signature(runtime).parameters.items():
        if name not in parameters and name != "self":
            hint = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(parameter.annotation))
            kind = griffe.ParameterKind.keyword_only
            parameters.add(griffe.Parameter(name, annotation=hint, kind=kind, default=repr(parameter.default)))


class Docstrings(griffe.Extension):
    """What docstrings name in Sphinx's manner becomes a link, where there is a page for it; examples become code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        if any(str(each.value) in SPELLED_OUT for each in getattr(obj, "decorators", ())):
            spell_out(obj)

        def link(match):
            short, path = match[1] == "~", match[2]
            shown = path.rpartition(".")[2] if short else path
            try:
                target = obj.resolve(path)
            except griffe.NameResolutionError:
                target = path
            return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value).replace("\nExample:\n", "\nExamples:\n")
