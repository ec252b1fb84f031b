"""Options that a dataclass declares and functions take as keyword arguments."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Target = TypeVar("Target", bound=Callable[..., Any])

ENTRY = re.compile(r"^    (\w+): (.*?)(?=\n    \w+: |\n\n|\Z)", re.MULTILINE | re.DOTALL)
"""An entry in a section of a docstring: its name and text."""


@dataclass(frozen=True)
class Option:
    """Declaration of an option: its allowed values and its use.

    Attributes:
        allowed: the allowed values, in words that complete "must be …".
        valid: a function that checks a value of the right type.
        swept: whether a sweep accepts several values.
        slowest: whether a sweep changes the option least often, because each value needs its own statistics.
        column: whether the option is a column in the results of a sweep.
        keyword: whether functions accept the option as a keyword argument.
    """

    allowed: str
    valid: Callable[[Any], bool] | None = None
    swept: bool = False
    slowest: bool = False
    column: bool = True
    keyword: bool = True


def option(allowed: str, valid: Callable[[Any], bool] | None = None, **how: bool) -> dict[str, Option]:
    """Make the metadata of a dataclass field: an :class:`Option`."""
    return {"option": Option(allowed, valid, **how)}


def options_of(cls: type) -> dict[str, Option]:
    """Return the declarations of the options of a dataclass, by name."""
    return {field.name: field.metadata["option"] for field in fields(cls)}


def keywords_of(cls: type) -> list[str]:
    """Return the names of the options that functions accept as keyword arguments."""
    return [name for name, declared in options_of(cls).items() if declared.keyword]


def unknown_names(given: Collection[str], known: Collection[str]) -> list[str]:
    """Return a problem for each name that is not an option."""
    problems = []
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            problems.append(f"The option `{name}` does not exist.{hint} The options are {', '.join(known)}.")
    return problems


def wrong_values(settings: Any) -> dict[str, str]:
    """Find options whose value has the wrong type or is out of range, and return their problems by name.

    Args:
        settings: an instance of a dataclass of options.
    """
    hints, problems = get_type_hints(type(settings)), {}
    for name, declared in options_of(type(settings)).items():
        value = getattr(settings, name)
        typed = fits(value, hints[name])
        if not typed or (declared.valid is not None and value is not None and not declared.valid(value)):
            problems[name] = f"`{name}` must be {declared.allowed}, got {_shown(value, typed)}."
    return problems


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation. NaN and ``bool`` do not count as numbers.

    Example:
        >>> fits(3, float), fits(True, int), fits({"a": 0.5}, float | Mapping[str, float]), fits("ab", list[str])
        (True, False, True, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if hint is float or hint is int:
        kind = Real if hint is float else Integral
        return isinstance(value, kind) and not isinstance(value, bool) and not math.isnan(value)
    if origin is None:
        return isinstance(value, NoneType if hint is None else hint)
    if not isinstance(value, origin) or isinstance(value, (str, bytes)):
        return False
    if isinstance(value, Mapping):
        return all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    return all(fits(item, arguments[0]) for item in value)


def _shown(value: Any, typed: bool) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}. Give an instance, such as {value.__name__}()"
    return repr(value) if typed or value is None else f"{value!r} of type {type(value).__name__}"


class Spelled(NamedTuple):
    """A keyword argument in ``**kwargs``: its type, default value and documentation."""

    hint: Any
    default: Any
    text: str


def spelled_options(cls: type) -> dict[str, Spelled]:
    """Return the options of a dataclass as keyword arguments, with the documentation of the attributes.

    The type of an option with the default ``None`` includes ``None``.
    """
    texts, hints = entries(inspect.getdoc(cls) or ""), get_type_hints(cls)
    defaults = {field.name: field.default for field in fields(cls)}
    return {
        name: Spelled(hints[name] | None if defaults[name] is None else hints[name], defaults[name], texts[name])
        for name in keywords_of(cls)
    }


def entries(doc: str) -> dict[str, str]:
    """Parse the entries of all sections of a docstring in Google style, by name. Line breaks stay."""
    return dict(ENTRY.findall(doc))


def spell_out(target: Target, spelled: Mapping[str, Spelled]) -> Target:
    """Replace ``**kwargs`` in a signature and docstring by the keyword arguments that it stands for.

    ``inspect.signature``, ``help()``, jsonargparse and the documentation site then show each argument. A parameter of
    the same name that the function declares itself stays.

    Args:
        target: a function, or a class for its ``__init__``. It is changed in place.
        spelled: the keyword arguments by name.
    """
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    (taken,) = set(signature.parameters) - {each.name for each in own}
    more = {name: each for name, each in spelled.items() if name not in signature.parameters}
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.hint)
        for name, each in more.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *keywords])
    doc = inspect.cleandoc(target.__doc__ or "")
    text = "\n".join(f"    {name}: {each.text}" for name, each in more.items())
    target.__doc__ = ENTRY.sub(lambda entry: text if entry[1] == taken else entry[0], doc)
    return target
