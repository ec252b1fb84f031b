"""Descriptions of samples for files: the arguments of a network without the content of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import Structure
from lightning_zipit._common.views import Inputs

Description: TypeAlias = "dict[str, Any]"
"""A nested value of dicts, lists, numbers and strings, as JSON has them."""

DTYPES = {str(known).removeprefix("torch."): known for known in vars(torch).values() if isinstance(known, torch.dtype)}
"""The tensor types by name."""


def describe_sample(example: Call) -> Description | None:
    """Describe one sample of a batch by its structure, and by shape, type and largest value of its tensors.

    Returns:
        The description; ``None`` if the arguments hold other types than tuples, lists, dicts and plain values.
    """
    blank = example.blank()
    tensors = iter(
        {
            "tensor": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "batched": chosen,
            "value": tensor.flatten()[0].item() if tensor.numel() and not tensor.is_complex() else 0,
        }
        for tensor, chosen in zip(blank.tensors, blank.batched, strict=True)
    )
    try:
        return _describe(example.structure, tensors)
    except TypeError:
        return None


def _describe(structure: Structure, tensors: Any) -> Description:
    if structure.kind is torch.Tensor:
        return next(tensors)
    if structure.kind in (tuple, list):
        return {structure.kind.__name__: [_describe(part, tensors) for part in structure.parts]}
    if structure.kind is dict and all(isinstance(key, str) for key in structure.context):
        parts = zip(structure.context, structure.parts, strict=True)
        return {"dict": {key: _describe(part, tensors) for key, part in parts}}
    if structure.kind in (type(None), bool, int, float, str):
        return {"plain": structure.context}
    raise TypeError(f"{structure.kind} cannot be described")


def sample_of(description: Mapping[str, Any]) -> Call:
    """Make one sample, ``(1, …)``, of its description.

    Raises:
        ValueError: if the description is damaged.
    """
    batched: list[bool] = []
    args, kwargs = _restore(description, batched)
    made = Call.of_arguments(args, kwargs)
    return Call(made.tensors, made.structure, tuple(batched))


def _restore(described: Mapping[str, Any], batched: list[bool]) -> Any:
    if "tensor" in described:
        if described["tensor"] not in DTYPES:
            raise ValueError(f"{described['tensor']!r} is not a tensor type")
        batched.append(bool(described["batched"]))
        shape = [int(size) for size in described["shape"]]
        return torch.full((), described["value"], dtype=DTYPES[described["tensor"]]).expand(shape).clone()
    if "dict" in described:
        return {str(key): _restore(part, batched) for key, part in described["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in described:
            return kind(_restore(part, batched) for part in described[kind.__name__])
    if "plain" in described and isinstance(described["plain"], (type(None), bool, int, float, str)):
        return described["plain"]
    raise ValueError("the description of a sample is damaged")


def describe_inputs(example: Inputs) -> Description | None:
    """Describe one sample of the inputs of all models; ``None`` if a sample cannot be described."""
    if isinstance(example, Call):
        return describe_sample(example)
    views = {task: describe_sample(view) for task, view in example.items()}
    return None if None in views.values() else {"by_task": views}


def inputs_of(description: Description) -> Inputs:
    """Make one sample of the inputs of all models of its description.

    Raises:
        ValueError: if the description is damaged.
    """
    if "by_task" in description:
        return {str(task): sample_of(view) for task, view in description["by_task"].items()}
    return sample_of(description)
