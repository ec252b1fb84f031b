"""Hyperparameters in a file: what they name, and the arguments that they stand for.

LightningCLI writes an object as ``{"class_path": …, "init_args": …}``, and a class or function as its name. Its parser,
which reads them back, imports and calls whatever stands there. This one asks :class:`Trust`.
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

from lightning_zipit._common.views import DTYPES
from lightning_zipit._lightning.files.names import is_import_path, look_up
from lightning_zipit._lightning.files.trust import Request, Trust

CLASS_PATH, ARGUMENTS = "class_path", ("init_args", "dict_kwargs")
NAMING_KEYS = (CLASS_PATH, "_target_")
"""Keys of a dict that names a class to be made: those of LightningCLI, and of Hydra, which a user's class may call."""


@dataclass(frozen=True)
class Parameter:
    """What a signature says of one of its parameters.

    Attributes:
        hints: its types, without ``Union`` and ``Optional``.
        default: its default, if it has one.
    """

    hints: tuple[Any, ...] = ()
    default: Any = None

    @property
    def items(self) -> Parameter:
        """What is known of the items of a list, tuple or dict."""
        known = [get_args(hint) for hint in self.hints if _kind(hint) in CONTAINERS]
        return Parameter(_flat(hint for arguments in known for hint in arguments[-1:] if hint is not ...))

    @property
    def takes_names(self) -> bool:
        """Whether a string can only stand for a class or function."""
        return str not in self.hints and any(_kind(hint) in (Callable, type) for hint in self.hints)

    def is_made_later(self, found: Any) -> bool:
        """Whether it is to be given what makes an object of a class, as an optimizer is, rather than an object."""
        results = _flat(get_args(hint)[-1] for hint in self.hints if _kind(hint) is Callable and get_args(hint))
        return any(isinstance(kind, type) and isinstance(found, type) and issubclass(found, kind) for kind in results)


ANY = Parameter()
CONTAINERS = (list, tuple, set, frozenset, dict, Sequence, Mapping, AbstractSet)


def parameters_of(found: Any) -> dict[str, Parameter]:
    """The parameters of a class or function by name, with those that ``**kwargs`` hands on to a base class."""
    known: dict[str, Parameter] = {}
    for base in found.__mro__ if isinstance(found, type) else (found,):
        function = base.__dict__.get("__init__") if isinstance(base, type) else base
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function).parameters
        try:
            hints = get_type_hints(function)
        except Exception:  # names that are there for type checkers alone
            hints = {}
        for name, parameter in signature.items():
            default = None if parameter.default is parameter.empty else parameter.default
            hint = _flat([hints[name]]) if name in hints else _guess(default)
            known.setdefault(name, Parameter(hint, default))
        if not takes_any(signature):
            break
    return known


def _guess(default: Any) -> tuple[Any, ...]:
    """The types of a parameter without any, as LightningCLI guesses them: that of its default, or anything."""
    if default is None:
        return (Any,)
    return (type if isinstance(default, type) else Callable if inspect.isroutine(default) else type(default), Any)


def takes_any(signature: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function takes keyword arguments of any name."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())


def find_requests(
    hyperparameters: Mapping[str, Any], found: Any, trust: Trust, parsed: bool, of: str = ""
) -> Iterator[Request]:
    """All that hyperparameters name, at any depth.

    Args:
        hyperparameters: what a file holds.
        found: the class that they are for; ``None`` where that is not imported or not allowed.
        trust: what is allowed.
        parsed: whether they are those of a command line, where a string may stand for a class or function.
        of: whose they are, for errors.
    """
    known = parameters_of(found) if found is not None and parsed else {}
    for key in NAMING_KEYS:  # all of them together may be one argument
        if key in hyperparameters:
            yield Request(hyperparameters[key], f"`{key}`{of}", trust.allows(hyperparameters[key]))
    for name, value in hyperparameters.items():
        yield from _find_in(value, known.get(name, ANY), trust, str(name), of)


def find_given(value: Any) -> Iterator[Any]:
    """What arguments of a command line name: their strings, and the classes and functions that it made of some."""
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
            for name, held in inside.items():
                yield from _find_in(held, known.get(name, parameter.items), trust, f"{place}.{name}", of)
    elif isinstance(value, (list, tuple, AbstractSet)):
        for number, item in enumerate(value):
            yield from _find_in(item, parameter.items, trust, f"{place}.{number}", of)


def _parameters_in(value: Mapping[str, Any], parameter: Parameter, trust: Trust) -> dict[str, Parameter]:
    """What is known, without importing anything, of the parameters that the keys of a dict are for."""
    name = value.get(CLASS_PATH)
    if name is None:
        return parameters_of(kind) if (kind := _dataclass_in(parameter)) else {}
    return parameters_of(look_up(name)) if trust.allows(name, default=parameter.default) and look_up(name) else {}


def make_arguments(hyperparameters: Mapping[str, Any], found: Any, trust: Trust) -> dict[str, Any]:
    """The arguments that the hyperparameters of a command line stand for, with the objects that they name.

    Raises:
        CheckpointError: if they name anything that is not there or not allowed.
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
"""From what YAML has to what a parameter takes: the type of a value, that of the parameter, and how."""


def _convert(value: Any, parameter: Parameter, back: Callable[[Any], Any] | None = None) -> Any:
    """A value as its parameter takes it; ``back`` is for one that its parameter says nothing of.

    Raises:
        TypeError: for a string that its parameter does not take.
    """
    kinds = [kind for hint in parameter.hints if isinstance(kind := _kind(hint), type) and kind is not Any]
    if type(value) in kinds:
        return value
    for held, wanted, convert in CONVERSIONS:
        for kind in kinds if isinstance(value, held) else ():
            if issubclass(kind, wanted):
                return convert(kind, value)
    if isinstance(value, str) and kinds and len(kinds) == len(parameter.hints) and not isinstance(value, tuple(kinds)):
        raise TypeError(f"{value!r} stands for no {' or '.join(kind.__name__ for kind in kinds)} that is known here")
    return value if back is None else back(value)


def _flat(hints: Any) -> tuple[Any, ...]:
    """Types without ``Union`` and ``Optional``."""
    flat: list[Any] = []
    for hint in hints:
        united = get_origin(hint) in (Union, types.UnionType)
        flat += _flat(get_args(hint)) if united else [hint]
    return tuple(flat)


def _kind(hint: Any) -> Any:
    """A type without its arguments."""
    return get_origin(hint) or hint


def _dataclass_in(parameter: Parameter) -> Any:
    return next((hint for hint in parameter.hints if isinstance(hint, type) and is_dataclass(hint)), None)
