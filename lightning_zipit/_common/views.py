"""Inputs of the models: one for all models, or one view of each sample per task, such as RGB and grayscale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, overload

from torch import nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import UnknownContainerError
from lightning_zipit.errors import CalibrationError

Inputs: TypeAlias = Call | Mapping[str, Call]
"""Inputs of all models: one for all models, or one per task, of the same samples in the same order."""


def view_of(inputs: Inputs, task: str) -> Call:
    """Return the input of a task's model."""
    return inputs if isinstance(inputs, Call) else inputs[task]


def all_views(inputs: Inputs) -> list[Call]:
    """List the different inputs: one if all models have the same, else one per task."""
    return [inputs] if isinstance(inputs, Call) else list(inputs.values())


def any_view(inputs: Inputs) -> Call:
    """Return any one of the inputs, for properties that all share: the number of samples and the device."""
    return all_views(inputs)[0]


def each_view(inputs: Inputs, change: Callable[[Call], Call]) -> Inputs:
    """Apply a function to the input of each model."""
    return change(inputs) if isinstance(inputs, Call) else {task: change(x) for task, x in inputs.items()}


@overload
def like(x: Call, module: nn.Module) -> Call: ...
@overload
def like(x: Inputs, module: nn.Module) -> Inputs: ...
def like(x: Inputs, module: nn.Module) -> Inputs:
    """Convert inputs for a network: to its device, and if they are floating-point, to its type."""
    parameter = next(module.parameters())
    return each_view(x, lambda one: one.to(parameter.device, parameter.dtype))


def bound(inputs: Inputs, networks: Mapping[str, nn.Module]) -> Inputs:
    """Write the inputs of networks in one way; see :meth:`~lightning_zipit._common.arguments.Arguments.bind`."""
    if isinstance(inputs, Call):
        return Arguments.of(next(iter(networks.values()))).bind(inputs)
    return {task: Arguments.of(networks[task]).bind(x) for task, x in inputs.items()}


def as_inputs(given: Any, tasks: Iterable[str]) -> Inputs:
    """Convert the result of ``get_input``.

    Args:
        given: a tensor, a tuple of positional arguments or a dict of keyword arguments for all models; or a dict with
            one of these for every task.
        tasks: the tasks.

    Returns:
        The inputs of these tasks.

    Raises:
        CalibrationError: if there is no tensor with a batch axis, or tasks are missing or have other batch sizes.
    """
    tasks = list(tasks)
    if not isinstance(given, Mapping) or not any(task in given for task in tasks):
        return _as_call(given, "")
    if missing := [task for task in tasks if task not in given]:
        raise CalibrationError(
            f"`get_input` returned inputs for {list(given)}, but not for {', '.join(map(repr, missing))}. Every model "
            "sees every sample: return a view of the sample for each task."
        )
    views = {task: _as_call(given[task], f" for task {task!r}") for task in tasks}
    if len({view.samples for view in views.values()}) > 1:
        counts = ", ".join(f"{view.samples} for {task!r}" for task, view in views.items())
        raise CalibrationError(
            f"`get_input` must return views of the same samples, but the batch sizes differ: {counts}."
        )
    return views


def _as_call(given: Any, of_task: str) -> Call:
    try:
        call = Call.of(given)
    except UnknownContainerError as error:
        raise CalibrationError(
            f"`get_input` must return a tensor, a tuple of positional arguments or a dict of keyword arguments, but"
            f"{of_task} {error}, which may hold tensors and does not say where."
        ) from error
    if not any(tensor.ndim for tensor in call.tensors):
        raise CalibrationError(
            f"`get_input` must return a tensor with a batch axis, or arguments with such a tensor, but{of_task} it "
            f"returned an object of type {type(given).__name__}{' without axes' * bool(call.tensors)}."
        )
    return call


def explain_views(tasks: Iterable[str]) -> str:
    """Explain, for an error message, how to give each model its own view of a sample."""
    first, *others = tasks
    views = ", ".join([f"{first!r}: batch[0]", *(f"{task!r}: batch[0].mean(1, keepdim=True)" for task in others)])
    return (
        "If the models take different inputs, pass a `get_input` that returns a view of every sample for each task, "
        f"such as get_input=lambda batch: {{{views}}} for RGB and grayscale images."
    )
