"""How another process makes a source model again: written down in strings, primitives and tensors, and read back.

Reading asks :class:`Trust` for everything that a description names, before any of it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor

from lightning_zipit._lightning.files.hyperparameters import find_requests, make_arguments, takes_any
from lightning_zipit._lightning.files.names import import_path, look_up, portable
from lightning_zipit._lightning.files.trust import Request, Trust, check_requests, find_source_class
from lightning_zipit._lightning.internals import INSTANTIATORS, recorded
from lightning_zipit.errors import CheckpointError, UntrustedError

INSTANTIATOR = "_instantiator"
"""The hyperparameter by which Lightning marks those that its command line parsed."""

CLASS_PATH = "_class_path"
"""The hyperparameter that holds the class of a model which Lightning's command line was given by class path."""

DESCRIPTION = "_zipit_description"
"""The attribute that holds what :func:`describe_source` said about a source of a module that was merged before."""


def describe_source(model: LightningModule) -> dict[str, Any]:
    """How to make a module of this class again, in strings, primitives and tensors.

    Returns:
        ``class_path`` (``None`` where the class cannot be imported), ``hyperparameters``, ``hparams_name``, whether
        the hyperparameters are those of a command line (``parsed``), which names objects by class path and arguments,
        and the names of hyperparameters that cannot be written down (``left_out``).
    """
    if DESCRIPTION in model.__dict__:
        return dict(model.__dict__[DESCRIPTION])
    held = dict(getattr(model, "_hparams", None) or {})  # `model.hparams` would make an attribute
    known = {key: value for key, value in held.items() if not key.startswith("_")}
    plain = {key: _to_plain(value) for key, value in known.items()}
    return {
        "class_path": import_path(type(model)),
        "hyperparameters": {key: value for key, value in plain.items() if value is not UNKNOWN},
        "hparams_name": getattr(model, "_hparams_name", None),
        "parsed": INSTANTIATOR in held,
        "left_out": [key for key, value in plain.items() if value is UNKNOWN],
    }


def describe_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of Lightning says of its model, as :func:`describe_source` says it."""
    known = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    return {
        "class_path": known.get(CLASS_PATH),
        "hyperparameters": {key: value for key, value in known.items() if key not in (INSTANTIATOR, CLASS_PATH)},
        "hparams_name": checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME),
        "parsed": INSTANTIATOR in known,
        "instantiator": known.get(INSTANTIATOR),
    }


def find_source_requests(
    description: Mapping[str, Any], trust: Trust, task: str | None = None, found: Any = None
) -> Iterator[Request]:
    """All that a description names.

    Args:
        description: what a file says.
        trust: what is allowed.
        task: the name of the source, for errors.
        found: its class, where the user has said it.
    """
    of = "" if task is None else f" of task {task!r}"
    path, instantiator = description.get("class_path"), description.get("instantiator")
    if path is not None and found is None:
        allowed = trust.allows(path, as_source=True)
        yield Request(path, f"the class{of}", allowed)
        found = look_up(path) if allowed else None
    if instantiator is not None and instantiator not in INSTANTIATORS:
        yield Request(instantiator, f"`{INSTANTIATOR}`{of}", trust.allows(instantiator))
    yield from find_requests(description["hyperparameters"], found, trust, bool(description.get("parsed")), of)


def make_sources(
    descriptions: Mapping[str, Mapping[str, Any]],
    trust: Trust,
    where: str,
    given: Mapping[str, LightningModule] | None = None,
) -> dict[str, LightningModule]:
    """Untrained source modules by task, as a file describes them.

    Args:
        descriptions: what :func:`describe_source` wrote down, by task.
        trust: what is allowed.
        where: the file, for errors.
        given: modules that the user gave instead.

    Raises:
        UntrustedError: with all that the file names, if some of it is not allowed.
        CheckpointError: if a module cannot be made.
    """
    given = given or {}
    trust = trust.naming(*given.values())
    others = {task: description for task, description in descriptions.items() if task not in given}
    ways_out = [
        f"give modules of the classes: models={{{next(iter(others), '')!r}: <a module of that class>, …}} of "
        "`MultiHeadModule.load_from_checkpoint`",
        "say the class on the command line: --model=CLASS_PATH of inspect, export, validate, test and predict, "
        "--classes.TASK=CLASS_PATH of merge and sweep",
    ]

    def check(classes: Mapping[str, type]) -> None:
        found = [find_source_requests(known, trust, task, classes.get(task)) for task, known in others.items()]
        check_requests(where, chain.from_iterable(found), ways_out)

    check({})
    classes = {task: _find_class(task, description, trust) for task, description in others.items()}
    check(classes)  # whose signatures say which strings stand for functions
    return {
        task: given[task] if task in given else make_source(task, classes[task], description, trust)
        for task, description in descriptions.items()
    }


def _find_class(task: str, description: Mapping[str, Any], trust: Trust) -> type[LightningModule]:
    path = description.get("class_path")
    if not path:
        raise CheckpointError(
            f"The class of task {task!r} was not defined in a module that can be imported. {_way_out(task)}"
        )
    try:
        return find_source_class(path, trust)
    except CheckpointError as error:
        raise type(error)(f"Task {task!r}: {error} {_way_out(task)}") from error


def _way_out(task: str) -> str:
    return f"Pass models={{{task!r}: <a module of that class>, …}} to `MultiHeadModule.load_from_checkpoint`."


def make_source(
    task: str, found: type[LightningModule], description: Mapping[str, Any], trust: Trust
) -> LightningModule:
    """An untrained module with the hyperparameters that :func:`describe_source` wrote down.

    Args:
        task: its task, for errors.
        found: its class.
        description: its hyperparameters.
        trust: what they may name.

    Raises:
        CheckpointError: if it cannot be made; it says to pass ``models=``.
    """
    left_out = "".join(
        f" The file leaves {name!r} out, which is an object." for name in description.get("left_out") or ()
    )
    if left_out:
        rank_zero_warn(f"Task {task!r} is made with the defaults of {found.__name__}.{left_out} {_way_out(task)}")
    try:
        return build_module(found, description, trust)
    except UntrustedError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{description['class_path']!r} of task {task!r} cannot be made from its saved hyperparameters "
            f"{dict(description['hyperparameters'])}: {error}.{left_out} Call `self.save_hyperparameters()` in its "
            f"__init__ before training. {_way_out(task)}"
        ) from error


def build_module(
    found: Any, description: Mapping[str, Any], trust: Trust, defaults: Mapping[str, Any] | None = None
) -> LightningModule:
    """Call a class, or a function that returns modules, with the arguments that a description stands for.

    Args:
        found: the class.
        description: hyperparameters, and whether they are those of a command line.
        trust: what they may name.
        defaults: arguments of a command line that they come before.
    """
    known = dict(description["hyperparameters"])
    parsed = bool(description.get("parsed"))
    values = make_arguments(known, found, trust) if parsed else known
    given = make_arguments(defaults or {}, found, trust)
    arguments = {**select_arguments(found, given), **select_arguments(found, values, description.get("hparams_name"))}
    # The modules' own hyperparameters stay in the form that a file can hold.
    with recorded({**(defaults or {}), **known}) if parsed else nullcontext():
        return found(**arguments)


def select_arguments(found: Any, hyperparameters: Mapping[str, Any], hparams_name: str | None = None) -> dict[str, Any]:
    """Those hyperparameters that a class takes.

    Args:
        found: the class.
        hyperparameters: by name.
        hparams_name: the parameter that takes all of them together, if there is one.
    """
    signature = inspect.signature(found).parameters
    if takes_any(signature):
        return dict(hyperparameters)
    own = {key: value for key, value in hyperparameters.items() if key in signature}
    if hparams_name is not None and hparams_name in signature and hparams_name not in own:
        own[hparams_name] = _with_attributes(hyperparameters)
    return own


def find_missing(found: Any, description: Mapping[str, Any]) -> list[str]:
    """The arguments that a class needs and a description does not have."""
    given = select_arguments(found, description["hyperparameters"], description.get("hparams_name"))
    needs_value = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty and parameter.kind in needs_value and name not in given
    ]


def _with_attributes(value: Any) -> Any:
    """Dicts whose items are attributes too, as those of argparse and OmegaConf are."""
    if isinstance(value, dict):
        return AttributeDict({key: _with_attributes(item) for key, item in value.items()})
    return [_with_attributes(item) for item in value] if type(value) is list else value


UNKNOWN = object()
"""Stands for a value that a file of tensors and primitives cannot hold."""


def _to_plain(value: Any) -> Any:
    """A value in primitives and tensors; :data:`UNKNOWN` where it is something else."""
    if type(value) is str:
        return portable(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is Tensor:
        return value.detach().clone()
    if isinstance(value, np.generic):
        return _to_plain(value.item())
    if isinstance(value, Mapping):
        held = {key: _to_plain(item) for key, item in value.items()}
        return UNKNOWN if any(item is UNKNOWN or type(key) is not str for key, item in held.items()) else held
    if type(value) is tuple or (isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple))):
        items = [_to_plain(item) for item in value]
        return UNKNOWN if any(item is UNKNOWN for item in items) else tuple(items) if type(value) is tuple else items
    return UNKNOWN
