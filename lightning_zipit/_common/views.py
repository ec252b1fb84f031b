"""What a sample is to each model: a tensor for all, or a view of its own for every task, such as RGB and grayscale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, overload

import torch
from torch import Tensor, nn

from lightning_zipit.errors import CalibrationError

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""Inputs of all models: a tensor for all of them, or by task one tensor each, of the same samples in the same order."""

Sample: TypeAlias = tuple[str, tuple[int, ...]]
"""Type and shape of one sample, such as ``("float32", (3, 32, 32))``."""

DTYPES = {str(known).removeprefix("torch."): known for known in vars(torch).values() if isinstance(known, torch.dtype)}
"""The types of tensors by name."""


def describe_sample(example: Tensor) -> Sample:
    """Type and shape of the samples of a batch."""
    return str(example.dtype).removeprefix("torch."), tuple(example.shape[1:])


def zeros_like_sample(sample: Sample) -> Tensor:
    """Zeros ``(1, …)``.

    Raises:
        ValueError: if there is no such type.
    """
    dtype, shape = sample
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is no type of tensors")
    return torch.zeros((), dtype=DTYPES[dtype]).expand(1, *shape)


def view_of(inputs: Inputs, task: str) -> Tensor:
    """What the model of a task is given."""
    return inputs if isinstance(inputs, Tensor) else inputs[task]


def any_view(inputs: Inputs) -> Tensor:
    """One of the tensors, for what is the same in all: the number of samples and the device."""
    return inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))


def each_view(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs, changed tensor by tensor."""
    return change(inputs) if isinstance(inputs, Tensor) else {task: change(x) for task, x in inputs.items()}


@overload
def like(x: Tensor, module: nn.Module) -> Tensor: ...
@overload
def like(x: Inputs, module: nn.Module) -> Inputs: ...
def like(x: Inputs, module: nn.Module) -> Inputs:
    """Inputs as a network takes them: on its device, and of its type where they are not whole numbers."""
    parameter = next(module.parameters())
    return each_view(x, lambda one: one.to(parameter.device, parameter.dtype if one.is_floating_point() else None))


def check_views(inputs: Inputs, tasks: Iterable[str]) -> Inputs:
    """What ``get_input`` returned, if it is an input of every model.

    Raises:
        CalibrationError: if it is anything else.
    """
    if isinstance(inputs, Tensor) and inputs.ndim:
        return inputs
    if not isinstance(inputs, Mapping):
        raise CalibrationError(
            "`get_input` must return a tensor with a batch axis, or a dict of one for every task, got "
            f"{type(inputs).__name__}."
        )
    tasks = list(tasks)
    if missing := [task for task in tasks if task not in inputs]:
        raise CalibrationError(
            f"`get_input` returned inputs for {list(inputs)}: {', '.join(map(repr, missing))} is missing. All models "
            "see every sample, each its own view of it."
        )
    views = {task: inputs[task] for task in tasks}
    if wrong := [task for task, x in views.items() if not isinstance(x, Tensor) or x.ndim == 0]:
        raise CalibrationError(f"`get_input` must return tensors with a batch axis; that of {wrong[0]!r} is none.")
    if len({len(x) for x in views.values()}) > 1:
        counts = ", ".join(f"{len(x)} for {task!r}" for task, x in views.items())
        raise CalibrationError(f"`get_input` must return views of the same samples, but of these there are {counts}.")
    return views


def explain_views(tasks: Iterable[str]) -> str:
    """For errors: how to give each model a view of its own."""
    first, *others = tasks
    views = ", ".join([f"{first!r}: batch[0]", *(f"{task!r}: batch[0].mean(1, keepdim=True)" for task in others)])
    return (
        "Where models take different inputs, let `get_input` return a view of every sample for each, such as "
        f"get_input=lambda batch: {{{views}}} for RGB and grayscale images."
    )
