"""Loading of trained source models from checkpoints of Lightning, this package or `torch.save`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_zipit._common.copying import copy_module
from lightning_zipit._lightning.files.checkpoint import find_record, naming_file, read_checkpoint
from lightning_zipit._lightning.files.descriptions import (
    build_module,
    describe_checkpoint,
    find_missing,
    find_source_requests,
)
from lightning_zipit._lightning.files.names import find_class
from lightning_zipit._lightning.files.trust import Trust, Trusted, check_requests, find_source_class
from lightning_zipit._lightning.files.weights import load_weights
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit.errors import CheckpointError


def load_sources(
    checkpoints: Mapping[str, str],
    model: LightningModule | type[LightningModule] | None,
    classes: Mapping[str, str],
    weights_only: bool,
    trust: Trusted | Trust | None = None,
    weights_key: str | None = None,
) -> dict[str, LightningModule]:
    """Load the trained module of each task; see :func:`load_source`."""
    return {
        task: load_source(path, model, classes.get(task), weights_only, task, trust, weights_key)
        for task, path in checkpoints.items()
    }


def load_source(
    path: str,
    model: LightningModule | type[LightningModule] | None,
    class_path: str | None = None,
    weights_only: bool = True,
    task: str | None = None,
    trust: Trusted | Trust | None = None,
    weights_key: str | None = None,
) -> LightningModule:
    """Load a trained module from a checkpoint.

    The module is created from the hyperparameters in the checkpoint. If they are missing, the module is a copy of
    ``model``. A checkpoint of a merged module gives the merged module.

    Args:
        path: the checkpoint.
        model: a module of the class of the checkpoint, or that class.
        class_path: the class of the checkpoint, if it differs from the class of ``model``.
        weights_only: read only tensors and primitives.
        task: the task of the checkpoint, for error messages.
        trust: modules or classes, by dotted name, that the checkpoint may refer to.
        weights_key: the entry of the checkpoint that holds the weights, or the prefix of their names.

    Raises:
        CheckpointError: if the checkpoint cannot be read, does not fit the class, or names something that is not
            allowed.
        ConfigurationError: if ``class_path`` cannot be imported.
    """
    where = path if task is None else f"Task {task!r}: {path}"
    checkpoint = _read(path, weights_only)
    own_class = find_class(class_path) if class_path else None
    allowed = Trust.of(trust, model, own_class)
    if find_record(checkpoint) is not None:
        return MultiHeadModule.restore(checkpoint, where, allowed)
    with naming_file(where, "is damaged"):
        description = describe_checkpoint(checkpoint)
        model_class = find_model_class(description, model, own_class, where, task, allowed)
    with naming_file(where, f"cannot be loaded into {model_class.__name__}"):  # the user's code may raise any error
        described = description["hyperparameters"] and not find_missing(model_class, description)
        if isinstance(model, model_class) and not described:
            source = copy_module(model)
        else:
            source = build_module(model_class, description, allowed)
        source.configure_model()
        load_weights(source, checkpoint, where, weights_key)
    return source


def find_model_class(
    description: Mapping[str, Any],
    model: LightningModule | type[LightningModule] | None,
    own_class: Any,
    where: str,
    task: str | None,
    trust: Trust,
) -> Any:
    """Find the class of the model in a checkpoint, and check that all names in the checkpoint are allowed.

    Args:
        description: the description of the model in the checkpoint.
        model: a module or class, for a checkpoint that does not name its class.
        own_class: the class that the user gave for this checkpoint. It overrides the class in the checkpoint.
        where: the file, for error messages.
        task: the task of the checkpoint, for error messages.
        trust: the names that the checkpoint may refer to.

    Raises:
        UntrustedError: if the checkpoint names something that is not allowed.
        CheckpointError: if no class is known.
    """
    named = description["class_path"]
    found = own_class or (None if named is not None or model is None else _class_of(model))
    option = "--model" if task is None else f"--classes.{task}"
    ways_out = [f"give the class: {option}={named}"] if named is not None and own_class is None else []
    check_requests(where, find_source_requests(description, trust, found=found), ways_out)
    if found is not None:
        return found
    if named is None:
        raise CheckpointError(f"{where} does not name the class of its model. Give the class with --model=CLASS_PATH.")
    found = find_source_class(named, trust)  # its signature shows which strings name functions
    check_requests(where, find_source_requests(description, trust, found=found), ways_out)
    return found


def _read(path: str, weights_only: bool) -> dict[str, Any]:
    try:
        return read_checkpoint(path, "cpu", weights_only)
    except CheckpointError as error:
        if not weights_only or not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise CheckpointError(
            f"{error}. If you trust the author of this file, use weights_only=False (--weights_only=false). This runs "
            "the code in the file."
        ) from error


def _class_of(model: LightningModule | type[LightningModule]) -> type[LightningModule]:
    return model if isinstance(model, type) else type(model)
