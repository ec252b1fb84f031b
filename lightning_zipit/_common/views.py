"""Inputs of the models: one tensor for all models, or one view of each sample per task, such as RGB and grayscale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, overload

import torch
from torch import Tensor, nn

from lightning_zipit.errors import CalibrationError

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""Inputs of all models: one tensor for all models, or one tensor per task, of the same samples in the same order."""

Sample: TypeAlias = tuple[str, tuple[int, ...]]
"""Type and shape of one sample, such as ``("float32", (3, 32, 32))``."""

DTYPES = {str(known).removeprefix("torch."): known for known in vars(torch).values() if isinstance(known, torch.dtype)}
"""The tensor types by name."""


def describe_sample(example: Tensor) -> Sample:
    """Return the type and shape of one sample of a batch."""
    return str(example.dtype).removeprefix("torch."), tuple(example.shape[1:])


def zeros_like_sample(sample: Sample) -> Tensor:
    """Return a batch of one sample of zeros, ``(1, …)``.

    Raises:
        ValueError: if the type is unknown.
    """
    dtype, shape = sample
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is not a tensor type")
    return torch.zeros((), dtype=DTYPES[dtype]).expand(1, *shape)


def view_of(inputs: Inputs, task: str) -> Tensor:
    """Return the input of a task's model."""
    return inputs if isinstance(inputs, Tensor) else inputs[task]


def any_view(inputs: Inputs) -> Tensor:
    """Return any one of the tensors, for properties that all share: the number of samples and the device."""
    return inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))


def each_view(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to each tensor of the inputs."""
    return change(inputs) if isinstance(inputs, Tensor) else {task: change(x) for task, x in inputs.items()}


@overload
def like(x: Tensor, module: nn.Module) -> Tensor: ...
@overload
def like(x: Inputs, module: nn.Module) -> Inputs: ...
def like(x: Inputs, module: nn.Module) -> Inputs:
    """Convert inputs for a network: to its device, and if they are floating-point, to its type."""
    parameter = next(module.parameters())
    return each_view(x, lambda one: one.to(parameter.device, parameter.dtype if one.is_floating_point() else None))


def check_views(inputs: Inputs, tasks: Iterable[str]) -> Inputs:
    """Check the result of ``get_input``.

    Args:
        inputs: the result.
        tasks: the tasks.

    Returns:
        The inputs of these tasks.

    Raises:
        CalibrationError: unless the result is a tensor with a batch axis, or a dict with such a tensor, of equal batch
            size, for every task.
    """
    if isinstance(inputs, Tensor) and inputs.ndim:
        return inputs
    if not isinstance(inputs, Mapping):
        raise CalibrationError(
            "`get_input` must return a tensor with a batch axis, or a dict with such a tensor for every task, but it "
            f"returned an object of type {type(inputs).__name__}{' without axes' * isinstance(inputs, Tensor)}."
        )
    tasks = list(tasks)
    if missing := [task for task in tasks if task not in inputs]:
        raise CalibrationError(
            f"`get_input` returned inputs for {list(inputs)}, but not for {', '.join(map(repr, missing))}. Every model "
            "sees every sample: return a view of the sample for each task."
        )
    views = {task: inputs[task] for task in tasks}
    if wrong := [task for task, x in views.items() if not isinstance(x, Tensor) or x.ndim == 0]:
        x = views[wrong[0]]
        raise CalibrationError(
            f"`get_input` must return tensors with a batch axis, but for task {wrong[0]!r} it returned an object "
            f"of type {type(x).__name__}{' without axes' * isinstance(x, Tensor)}."
        )
    if len({len(x) for x in views.values()}) > 1:
        counts = ", ".join(f"{len(x)} for {task!r}" for task, x in views.items())
        raise CalibrationError(
            f"`get_input` must return views of the same samples, but the batch sizes differ: {counts}."
        )
    return views


def explain_views(tasks: Iterable[str]) -> str:
    """Explain, for an error message, how to give each model its own view of a sample."""
    first, *others = tasks
    views = ", ".join([f"{first!r}: batch[0]", *(f"{task!r}: batch[0].mean(1, keepdim=True)" for task in others)])
    return (
        "If the models take different inputs, pass a `get_input` that returns a view of every sample for each task, "
        f"such as get_input=lambda batch: {{{views}}} for RGB and grayscale images."
    )
