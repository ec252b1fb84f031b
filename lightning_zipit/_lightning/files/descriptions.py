"""Descriptions of source models in strings, primitives and tensors, from which another process recreates the models.

Before a name in a description is used, :class:`Trust` must allow all names in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_zipit._common.views import like
from lightning_zipit._lightning.files.checkpoint import ask_for_module
from lightning_zipit._lightning.files.hyperparameters import find_given, find_requests, make_arguments, takes_any
from lightning_zipit._lightning.files.names import find_class, import_path, look_up, portable
from lightning_zipit._lightning.files.trust import Request, Trust, check_requests, find_source_class
from lightning_zipit._lightning.internals import INSTANTIATORS, recorded
from lightning_zipit._lightning.sources import get_backbone
from lightning_zipit.errors import CheckpointError, ConfigurationError, UntrustedError
from lightning_zipit.graph.shapes import evaluating

INSTANTIATOR = "_instantiator"
"""The hyperparameter with which Lightning marks hyperparameters that its command line has parsed."""

CLASS_PATH = "_class_path"
"""The hyperparameter with the class path of a model, if it was given on Lightning's command line."""

DESCRIPTION = "_zipit_description"
"""The attribute with the description of a source that was split from a merged module."""


def describe_source(model: LightningModule) -> dict[str, Any]:
    """Describe a module in strings, primitives and tensors, so that a module of its class can be created again.

    Returns:
        A dict with these keys:

        - ``class_path``: the class; ``None`` if it cannot be imported;
        - ``hyperparameters``: the hyperparameters by name;
        - ``hparams_name``: the parameter that takes all hyperparameters together, or ``None``;
        - ``parsed``: whether a command line parsed the hyperparameters, so that they give objects by class path and
          arguments;
        - ``left_out``: the names of hyperparameters that cannot be described.
    """
    if DESCRIPTION in model.__dict__:
        return dict(model.__dict__[DESCRIPTION])
    saved = dict(getattr(model, "_hparams", None) or {})  # `model.hparams` would create an attribute
    known = {key: value for key, value in saved.items() if not key.startswith("_")}
    plain = {key: _to_plain(value) for key, value in known.items()}
    return {
        "class_path": import_path(type(model)),
        "hyperparameters": {key: value for key, value in plain.items() if value is not UNKNOWN},
        "hparams_name": getattr(model, "_hparams_name", None),
        "parsed": INSTANTIATOR in saved,
        "left_out": [key for key, value in plain.items() if value is UNKNOWN],
    }


def describe_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Read the description of the model in a Lightning checkpoint, in the form of :func:`describe_source`."""
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
    """Find all names of classes and functions in a description.

    Args:
        description: the description of a source in a file.
        trust: the names that are allowed.
        task: the task of the source, for error messages.
        found: the class of the source, if the user gave it.
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
    """Make untrained source modules from the descriptions in a file.

    Args:
        descriptions: the descriptions of :func:`describe_source`, by task.
        trust: the names that are allowed.
        where: the file, for error messages.
        given: modules that the user gave instead, by task.

    Returns:
        The modules by task.

    Raises:
        UntrustedError: with all names in the file, if some of them are not allowed.
        CheckpointError: if a module cannot be created.
    """
    given = given or {}
    trust = trust.naming(*given.values())
    others = {task: description for task, description in descriptions.items() if task not in given}
    ways_out = [
        f"pass modules of the classes, models={{{next(iter(others), '')!r}: <a module of that class>, …}}, to "
        "`MultiHeadModule.load_from_checkpoint`",
        "give the class on the command line: --model=CLASS_PATH or --models.TASK=CLASS_PATH for inspect, export, "
        "validate, test and predict, --classes.TASK=CLASS_PATH for merge and sweep",
    ]

    def check(classes: Mapping[str, type]) -> None:
        found = [find_source_requests(known, trust, task, classes.get(task)) for task, known in others.items()]
        check_requests(where, chain.from_iterable(found), ways_out)

    check({})
    classes = {task: _find_class(task, description, trust) for task, description in others.items()}
    check(classes)  # again, because signatures of the classes show which strings name functions
    return {
        task: given[task] if task in given else configured(make_source(task, classes[task], description, trust), task)
        for task, description in descriptions.items()
    }


def _find_class(task: str, description: Mapping[str, Any], trust: Trust) -> type[LightningModule]:
    path = description.get("class_path")
    if not path:
        raise CheckpointError(
            f"The class of task {task!r} cannot be imported, because it was not defined at the top level of a module. "
            f"{ask_for_module(task)}"
        )
    try:
        return find_source_class(path, trust)
    except CheckpointError as error:
        raise type(error)(f"Task {task!r}: {error} {ask_for_module(task)}") from error


def make_source(
    task: str, found: type[LightningModule], description: Mapping[str, Any], trust: Trust
) -> LightningModule:
    """Make an untrained module from the description of :func:`describe_source`.

    Args:
        task: the task of the module, for error messages.
        found: the class of the module.
        description: the description with the hyperparameters.
        trust: the names that the hyperparameters may refer to.

    Raises:
        CheckpointError: if the module cannot be created. The message advises to pass ``models=``.
    """
    left_out = "".join(
        f" The file does not hold {name!r}, because its value is an object."
        for name in description.get("left_out") or ()
    )
    if left_out:
        rank_zero_warn(
            f"The module of task {task!r} is created with defaults of {found.__name__}.{left_out} "
            f"{ask_for_module(task)}"
        )
    try:
        return build_module(found, description, trust)
    except UntrustedError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{description['class_path']!r} of task {task!r} cannot be created from its saved hyperparameters "
            f"{dict(description['hyperparameters'])}: {error}.{left_out} Call `self.save_hyperparameters()` in its "
            f"__init__ before training. {ask_for_module(task)}"
        ) from error


def explain_unmakeable(task: str, description: Mapping[str, Any], found: type) -> str | None:
    """Explain, when a file is written, why a source module cannot be made from its description.

    Args:
        task: the task of the module.
        description: the description of :func:`describe_source`.
        found: the class of the module.

    Returns:
        The reason and the way out; ``None`` if nothing is known to be missing.
    """
    missing = [name for name in find_missing(found, description) if name not in description["left_out"]]
    if description["class_path"] is None:
        why = f"its class {found.__qualname__} is not defined at the top level of a module"
    elif missing or description["left_out"]:
        objects = "".join(f" The value of {name!r} is an object." for name in description["left_out"])
        unsaved = "".join(f" {name!r} is not a saved hyperparameter." for name in missing)
        why = f"the file does not hold all arguments of {found.__qualname__}.{objects}{unsaved}"
    else:
        return None
    return (
        f"The source module of task {task!r} cannot be made from the saved file alone, because {why.rstrip('.')}. "
        f"{ask_for_module(task)}"
    )


def configured(module: LightningModule, task: str) -> LightningModule:
    """Let a module make the layers that it makes in ``configure_model``, as a Trainer does.

    Args:
        module: the module.
        task: its task, for error messages.

    Raises:
        CheckpointError: if ``configure_model`` fails without a Trainer.
    """
    try:
        module.configure_model()
    except Exception as error:
        raise CheckpointError(
            f"`configure_model` of task {task!r} failed without a Trainer: {type(error).__name__}: {error}. "
            f"{ask_for_module(task)}"
        ) from error
    return module


def complete(task: str, module: LightningModule, backbone: str, example: Any) -> None:
    """Check that a module has its backbone, and give lazy layers their sizes.

    Args:
        task: the task of the module, for error messages.
        module: the module.
        backbone: dotted name of its backbone.
        example: an input of the backbone of one sample; ``None`` if it is unknown.

    Raises:
        CheckpointError: if the module does not have its backbone, or its lazy layers cannot get their sizes.
    """
    try:
        network = get_backbone(module, backbone)
    except ConfigurationError as error:
        raise CheckpointError(
            f"Task {task!r}: {error} A file cannot hold code, so that layers which are made in `setup` cannot be made "
            f"again. {ask_for_module(task)} The module must have its layers."
        ) from error
    if not any(map(is_lazy, network.parameters())):
        return
    if example is None:
        raise CheckpointError(
            f"The backbone of task {task!r} has lazy layers, and the shape of its input is not known. "
            f"{ask_for_module(task)} The module must have run once."
        )
    with evaluating(network), torch.no_grad():
        like(example, network).run(network)


def build_module(
    found: Any, description: Mapping[str, Any], trust: Trust, defaults: Mapping[str, Any] | None = None
) -> LightningModule:
    """Call a class, or a function that returns modules, with the arguments in a description.

    Args:
        found: the class or function.
        description: the hyperparameters, and whether a command line parsed them.
        trust: the names that the hyperparameters may refer to.
        defaults: arguments of the command line, which the hyperparameters override.
    """
    known = dict(description["hyperparameters"])
    parsed = bool(description.get("parsed"))
    values = make_arguments(known, found, trust) if parsed else known
    given = make_arguments(defaults or {}, found, trust)
    arguments = {**select_arguments(found, given), **select_arguments(found, values, description.get("hparams_name"))}
    # `save_hyperparameters` must keep the hyperparameters in a form that a file can hold.
    with recorded({**(defaults or {}), **known}) if parsed else nullcontext():
        return found(**arguments)


def make_given(models: Mapping[str, Any] | None) -> dict[str, LightningModule]:
    """Make the modules that a user gives on the command line.

    Args:
        models: by task, a class path, or a dict with ``class_path`` and ``init_args``.

    Raises:
        ConfigurationError: if a class cannot be imported, or called with its arguments.
    """
    made = {}
    for task, given in (models or {}).items():
        path, arguments = (given, {}) if isinstance(given, str) else (given["class_path"], given.get("init_args") or {})
        found = find_class(path)
        description = {"hyperparameters": dict(arguments), "parsed": True}
        try:
            if unknown := arguments.keys() - select_arguments(found, arguments).keys():
                raise TypeError(f"it has no arguments {sorted(unknown)}")
            made[task] = build_module(found, description, Trust.of(None, path, *find_given(arguments)))
        except Exception as error:
            raise ConfigurationError(f"--models.{task}: {path} cannot be made with {arguments}: {error}") from error
    return made


def select_arguments(found: Any, hyperparameters: Mapping[str, Any], hparams_name: str | None = None) -> dict[str, Any]:
    """Select the hyperparameters that a class accepts.

    Args:
        found: the class.
        hyperparameters: the hyperparameters by name.
        hparams_name: the parameter that takes all hyperparameters together, or ``None``.
    """
    signature = inspect.signature(found).parameters
    if takes_any(signature):
        return dict(hyperparameters)
    own = {key: value for key, value in hyperparameters.items() if key in signature}
    if hparams_name is not None and hparams_name in signature and hparams_name not in own:
        own[hparams_name] = _with_attributes(hyperparameters)
    return own


def find_missing(found: Any, description: Mapping[str, Any]) -> list[str]:
    """Find required arguments of a class that a description does not hold."""
    given = select_arguments(found, description["hyperparameters"], description.get("hparams_name"))
    needs_value = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty and parameter.kind in needs_value and name not in given
    ]


def _with_attributes(value: Any) -> Any:
    """Make the items of dicts accessible as attributes, as in namespaces of argparse and configs of OmegaConf."""
    if isinstance(value, dict):
        return AttributeDict({key: _with_attributes(item) for key, item in value.items()})
    return [_with_attributes(item) for item in value] if type(value) is list else value


UNKNOWN = object()
"""Placeholder for a value that is not made of tensors and primitives."""


def _to_plain(value: Any) -> Any:
    """Convert a value to primitives and tensors; return :data:`UNKNOWN` if that is not possible."""
    if type(value) is str:
        return portable(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is Tensor:
        return value.detach().clone()
    if isinstance(value, np.generic):
        return _to_plain(value.item())
    if isinstance(value, Mapping):
        plain = {key: _to_plain(item) for key, item in value.items()}
        return UNKNOWN if any(item is UNKNOWN or type(key) is not str for key, item in plain.items()) else plain
    if type(value) is tuple or (isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple))):
        items = [_to_plain(item) for item in value]
        return UNKNOWN if any(item is UNKNOWN for item in items) else tuple(items) if type(value) is tuple else items
    return UNKNOWN
