"""Safe reading of checkpoints, and the record of a merged module in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_zipit._common.calls import Call
from lightning_zipit._common.samples import describe_inputs, inputs_of, sample_of
from lightning_zipit._common.views import Inputs
from lightning_zipit.errors import CheckpointError, ZipItError

CHECKPOINT_KEY = "lightning_zipit"
FORMAT = 1


def find_record(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of a merged module in a checkpoint; ``None`` if the checkpoint is not merged."""
    record = checkpoint.get(CHECKPOINT_KEY)
    return record if isinstance(record, dict) else None


@contextmanager
def naming_file(where: str, what: str) -> Iterator[None]:
    """Context manager that turns errors of other packages into a CheckpointError with the name of the file.

    Args:
        where: the file.
        what: a predicate that describes the problem, such as "is damaged".

    Raises:
        CheckpointError: instead of any error of another package.
    """
    try:
        yield
    except ZipItError:
        raise
    except Exception as error:
        raise CheckpointError(f"{where} {what}: {type(error).__name__}: {error}") from error


@contextmanager
def reading_record(checkpoint: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Context manager that yields the record of a merged module, and turns errors of its content into CheckpointError.

    Args:
        checkpoint: the content of a checkpoint.
        where: the file, for error messages.

    Raises:
        CheckpointError: if the checkpoint has no such record, or the record is damaged.
    """
    record = find_record(checkpoint)
    if record is None or record.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} is not a checkpoint of a merged module (format {FORMAT}). Give a file that "
            "trainer.save_checkpoint wrote after a merge."
        )
    with naming_file(where, "is damaged, or its source classes have changed since it was written"):
        yield record


def ask_for_module(task: str, what: str = "a module of that class") -> str:
    """Explain how to give a source module that a file does not describe, in Python and on the command line."""
    return (
        f"Pass models={{{task!r}: <{what}>, …}} to `MultiHeadModule.load_from_checkpoint`. On the command line, give "
        f"--models.{task}=CLASS_PATH, or --models.{task}='{{class_path: CLASS_PATH, init_args: {{NAME: VALUE}}}}'."
    )


def write_example(example: Inputs | None) -> dict[str, Any]:
    """Describe a sample, or each task's sample, by lists, dicts, numbers and strings."""
    return {"inputs": None if example is None else describe_inputs(example)}


def read_example(record: Mapping[str, Any]) -> Inputs | None:
    """Make one sample, or each task's sample, from its description in a checkpoint."""
    if "inputs" in record:
        return None if record["inputs"] is None else inputs_of(record["inputs"])
    shape, dtype = record["input_shape"], record.get("input_dtype") or "float32"  # files of version 0.1
    if shape is None:
        return None
    if isinstance(shape, dict):
        return {task: _one_tensor(dtype[task], own) for task, own in shape.items()}
    return _one_tensor(dtype, shape)


def _one_tensor(dtype: str, shape: Sequence[int]) -> Call:
    return sample_of(
        {"tuple": [{"tuple": [{"tensor": dtype, "shape": [1, *shape], "batched": True, "value": 0}]}, {"dict": {}}]}
    )


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """Read the content of a checkpoint.

    Args:
        path: the file. A ``.safetensors`` file holds only weights.
        map_location: the device of the tensors; see :func:`torch.load`.
        weights_only: read only tensors and primitives. ``False`` unpickles the file, which runs code in it.

    Raises:
        CheckpointError: if the file is missing, is damaged, or holds anything else.
    """
    try:
        if isinstance(path, (str, Path)) and Path(path).suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise CheckpointError(f"The checkpoint file {path} does not exist.") from None
    except Exception as error:
        # torch's message starts with long instructions for unpickling the file
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or repr(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors and primitives: {reason}") from error
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__} instead of a dict.")
    return content
