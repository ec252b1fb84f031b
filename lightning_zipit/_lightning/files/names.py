"""Dotted names of classes and functions: format, lookup and import."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import LightningModule

from lightning_zipit._lightning.internals import lightning_modules
from lightning_zipit.errors import ConfigurationError

MAIN = ("__main__", "__mp_main__")
"""The module name of the running script: in this process, and in processes that multiprocessing spawns."""


def import_path(cls: type) -> str | None:
    """Return the name ``module:Class`` with which another process can import a class, also from the running script."""
    module = _main_name() if cls.__module__ in MAIN else cls.__module__
    return None if module is None or "<locals>" in cls.__qualname__ else f"{module}:{cls.__qualname__}"


def portable(text: str) -> str:
    """Replace ``__main__`` in a name by the module name with which another process can import the running script."""
    main = _main_name()
    return f"{main}{text.removeprefix('__main__')}" if main is not None and text.startswith("__main__.") else text


def homes_of(found: Any) -> set[str]:
    """Return the full dotted names of a class or function; an empty set for any other object."""
    if not isinstance(found, type) and not inspect.isroutine(found):
        return set()
    module, qualname = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return set()
    return {f"{name}.{qualname}" for name in (module, _main_name() if module in MAIN else None) if name}


def is_name(text: str) -> bool:
    """Whether a text has the form of a dotted name. Hyphens are allowed, as a script may be called ``2-train.py``."""
    return text.count(":") <= 1 and all(re.fullmatch(r"[\w-]+", part) for part in dotted(text).split("."))


def is_import_path(text: str) -> bool:
    """Whether a text has the form of a name in a module: ``module.Class``, or ``module:Outer.Inner``."""
    return is_name(text) and any(_readings(text))


def dotted(name: str) -> str:
    """Replace the colon in a name by a dot."""
    return name.replace(":", ".")


def look_up(name: str) -> Any:
    """Look up a name in the modules that are already imported, without running any code.

    Returns:
        The class, function or other object; ``None`` if it is not found.
    """
    for module_name, inside in _readings(name):
        found: Any = _imported(module_name)
        for part in inside if found is not None else ():
            found = inspect.getattr_static(found, part, None)
        if found is not None:
            return found
    return None


def find_object(name: str) -> Any:
    """Import a class or function that the user named.

    Args:
        name: ``module.Class``, or ``module:Outer.Inner``.

    Raises:
        ConfigurationError: if it cannot be imported.
    """
    reasons: list[Exception] = []
    for module_name, inside in _readings(name):
        try:
            # Importing the running script again would create a second copy of its classes, and might run it again.
            module = _imported(module_name) or importlib.import_module(module_name)
            return reduce(getattr, inside, module)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            reasons.append(error)
    raise ConfigurationError(
        f"{name!r} cannot be imported ({reasons[0] if reasons else 'the name has no module'}). Give a name such as "
        "my_project.LitNet, and run the command in a folder from which it can be imported."
    )


def find_class(name: str) -> type[LightningModule]:
    """Import a LightningModule class that the user named; see :func:`find_object`.

    Raises:
        ConfigurationError: if the name cannot be imported, or is not a LightningModule class.
    """
    found = find_object(name)
    if not (isinstance(found, type) and issubclass(found, lightning_modules())):
        raise ConfigurationError(f"{name!r} is not a LightningModule class.")
    return found


def _readings(name: str) -> Iterator[tuple[str, list[str]]]:
    """Split a name into module and attributes in every possible way, the longest module first."""
    if ":" in name:
        module, _, inside = name.partition(":")
        yield module, inside.split(".")
        return
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:length]), parts[length:]


def _imported(module_name: str) -> ModuleType | None:
    return sys.modules.get("__main__" if module_name == _main_name() else module_name)


def _main_name() -> str | None:
    """Return the module name with which another process can import the running script; ``None`` in a notebook."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return None if spec.name == "__main__" else spec.name
    return None if file is None or "." in Path(file).stem else Path(file).stem
