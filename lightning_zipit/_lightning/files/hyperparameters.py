"""Safe conversion of hyperparameters in a file to arguments.

LightningCLI writes an object as ``{"class_path": …, "init_args": …}``, and a class or function as its name. The parser
of LightningCLI imports and calls any name in a file. This module uses only names that :class:`Trust` allows.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from lightning_zipit._common.samples import DTYPES
from lightning_zipit._lightning.files.names import is_import_path, look_up
from lightning_zipit._lightning.files.trust import Request, Trust

CLASS_PATH, ARGUMENTS = "class_path", ("init_args", "dict_kwargs")
NAMING_KEYS = (CLASS_PATH, "_target_")
"""Keys of a class path in a dict: the key of LightningCLI, and the key of Hydra, which a user's class may call."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a signature.

    Attributes:
        hints: the types of the parameter, without ``Union`` and ``Optional``.
        default: the default of the parameter; ``None`` if it has none.
    """

    hints: tuple[Any, ...] = ()
    default: Any = None

    @property
    def items(self) -> Parameter:
        """The types of the items, if the parameter is a list, tuple or dict."""
        known = [get_args(hint) for hint in self.hints if _kind(hint) in CONTAINERS]
        return Parameter(_flat(hint for arguments in known for hint in arguments[-1:] if hint is not ...))

    @property
    def takes_names(self) -> bool:
        """Whether a string as value can only be the name of a class or function."""
        return str not in self.hints and any(_kind(hint) in (Callable, type) for hint in self.hints)

    def is_made_later(self, found: Any) -> bool:
        """Whether the parameter expects a function that makes an object of the class, such as an optimizer."""
        results = _flat(get_args(hint)[-1] for hint in self.hints if _kind(hint) is Callable and get_args(hint))
        return any(isinstance(kind, type) and isinstance(found, type) and issubclass(found, kind) for kind in results)


ANY = Parameter()
CONTAINERS = (list, tuple, set, frozenset, dict, Sequence, Mapping, AbstractSet)


def parameters_of(found: Any) -> dict[str, Parameter]:
    """Return the parameters of a class or function by name. ``**kwargs`` stands for those of the base class."""
    known: dict[str, Parameter] = {}
    for base in found.__mro__ if isinstance(found, type) else (found,):
        function = base.__dict__.get("__init__") if isinstance(base, type) else base
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function).parameters
        try:
            hints = get_type_hints(function)
        except Exception:  # annotations can use names that only type checkers know
            hints = {}
        for name, parameter in signature.items():
            default = None if parameter.default is parameter.empty else parameter.default
            hint = _flat([hints[name]]) if name in hints else _guess(default)
            known.setdefault(name, Parameter(hint, default))
        if not takes_any(signature):
            break
    return known


def _guess(default: Any) -> tuple[Any, ...]:
    """Guess the types of a parameter without annotation like LightningCLI: the type of its default, or any type."""
    if default is None:
        return (Any,)
    return (type if isinstance(default, type) else Callable if inspect.isroutine(default) else type(default), Any)


def takes_any(signature: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function accepts keyword arguments with any name."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())


def find_requests(
    hyperparameters: Mapping[str, Any], found: Any, trust: Trust, parsed: bool, of: str = ""
) -> Iterator[Request]:
    """Find all names of classes and functions in hyperparameters, at any depth.

    Args:
        hyperparameters: the hyperparameters in a file.
        found: the class that takes them; ``None`` if it is not imported or not allowed.
        trust: the names that are allowed.
        parsed: whether a command line parsed the hyperparameters, so that a string may name a class or function.
        of: the owner of the hyperparameters, for error messages, such as " of task 'a'".
    """
    known = parameters_of(found) if found is not None and parsed else {}
    for key in NAMING_KEYS:  # all hyperparameters together may be one argument
        if key in hyperparameters:
            yield Request(hyperparameters[key], f"`{key}`{of}", trust.allows(hyperparameters[key]))
    for name, value in hyperparameters.items():
        yield from _find_in(value, known.get(name, ANY), trust, str(name), of)


def find_given(value: Any) -> Iterator[Any]:
    """Find everything that arguments of the command line name: strings, classes and functions, at any depth."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from find_given(item)
    elif not isinstance(value, nn.Module):
        yield value


def _find_in(value: Any, parameter: Parameter, trust: Trust, place: str, of: str) -> Iterator[Request]:
    if isinstance(value, str):
        if parameter.takes_names and is_import_path(value):
            yield Request(value, f"`{place}`{of}", trust.allows(value, default=parameter.default))
    elif isinstance(value, Mapping):
        for name in (value[key] for key in NAMING_KEYS if key in value):
            yield Request(name, f"`{place}`{of}", trust.allows(name, default=parameter.default))
        known = _parameters_in(value, parameter, trust)
        for key, item in value.items():
            inside = item if key in ARGUMENTS and isinstance(item, Mapping) else {key: item}
            for name, nested in inside.items():
                yield from _find_in(nested, known.get(name, parameter.items), trust, f"{place}.{name}", of)
    elif isinstance(value, (list, tuple, AbstractSet)):
        for number, item in enumerate(value):
            yield from _find_in(item, parameter.items, trust, f"{place}.{number}", of)


def _parameters_in(value: Mapping[str, Any], parameter: Parameter, trust: Trust) -> dict[str, Parameter]:
    """Return the parameters that the keys of a dict refer to, as far as they are known without an import."""
    name = value.get(CLASS_PATH)
    if name is None:
        return parameters_of(kind) if (kind := _dataclass_in(parameter)) else {}
    return parameters_of(look_up(name)) if trust.allows(name, default=parameter.default) and look_up(name) else {}


def make_arguments(hyperparameters: Mapping[str, Any], found: Any, trust: Trust) -> dict[str, Any]:
    """Convert the hyperparameters of a command line to arguments, and create the objects that they describe.

    Args:
        hyperparameters: the hyperparameters in a file.
        found: the class that takes them.
        trust: the names that are allowed.

    Raises:
        CheckpointError: if a name does not exist or is not allowed.
    """
    known = parameters_of(found)
    return {name: _make(value, known.get(name, ANY), trust) for name, value in hyperparameters.items()}


def _make(value: Any, parameter: Parameter, trust: Trust) -> Any:
    if isinstance(value, str):
        if parameter.takes_names and is_import_path(value):
            return trust.find(value, default=parameter.default)
        return _convert(value, parameter)
    if isinstance(value, Mapping):
        if CLASS_PATH in value and set(value) <= {CLASS_PATH, *ARGUMENTS}:
            return _make_object(value, parameter, trust)
        if kind := _dataclass_in(parameter):
            return kind(**make_arguments(value, kind, trust))
        return {key: _make(item, parameter.items, trust) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_make(item, parameter.items, trust) for item in value]
        return _convert(made, parameter, tuple if isinstance(value, tuple) else list)
    return value


def _make_object(value: Mapping[str, Any], parameter: Parameter, trust: Trust) -> Any:
    found = trust.find(value[CLASS_PATH], default=parameter.default)
    given = {name: item for key in ARGUMENTS for name, item in (value.get(key) or {}).items()}
    arguments = make_arguments(given, found, trust)
    return partial(found, **arguments) if parameter.is_made_later(found) else found(**arguments)


CONVERSIONS: tuple[tuple[type, type, Callable[[Any, Any], Any]], ...] = (
    (str, Enum, lambda kind, value: kind.__members__.get(value, value)),
    (str, PathLike, lambda kind, value: Path(value)),
    (str, torch.dtype, lambda kind, value: DTYPES.get(value.removeprefix("torch."), value)),
    (list, tuple, lambda kind, value: tuple(value)),
    (list, AbstractSet, lambda kind, value: set(value)),
)
"""Conversions of values in YAML: the type of the value, the type of the parameter, and the conversion."""


def _convert(value: Any, parameter: Parameter, back: Callable[[Any], Any] | None = None) -> Any:
    """Convert a value to the type of its parameter.

    Args:
        value: the value.
        parameter: the parameter that takes it.
        back: the conversion if the types of the parameter are unknown.

    Raises:
        TypeError: if the parameter does not accept a string.
    """
    kinds = [kind for hint in parameter.hints if isinstance(kind := _kind(hint), type) and kind is not Any]
    if type(value) in kinds:
        return value
    for given, wanted, convert in CONVERSIONS:
        for kind in kinds if isinstance(value, given) else ():
            if issubclass(kind, wanted):
                return convert(kind, value)
    if isinstance(value, str) and kinds and len(kinds) == len(parameter.hints) and not isinstance(value, tuple(kinds)):
        raise TypeError(f"{value!r} cannot be converted to {' or '.join(kind.__name__ for kind in kinds)}")
    return value if back is None else back(value)


def _flat(hints: Any) -> tuple[Any, ...]:
    """Flatten ``Union`` and ``Optional`` into their types."""
    flat: list[Any] = []
    for hint in hints:
        united = get_origin(hint) in (Union, types.UnionType)
        flat += _flat(get_args(hint)) if united else [hint]
    return tuple(flat)


def _kind(hint: Any) -> Any:
    """Return a type without its arguments."""
    return get_origin(hint) or hint


def _dataclass_in(parameter: Parameter) -> Any:
    return next((hint for hint in parameter.hints if isinstance(hint, type) and is_dataclass(hint)), None)
