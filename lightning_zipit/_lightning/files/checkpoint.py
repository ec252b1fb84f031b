"""Checkpoints: read without running any code, and the record in them of how a merged module is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_zipit._common.text import printable
from lightning_zipit._common.views import Inputs, describe_sample, zeros_like_sample
from lightning_zipit.errors import CheckpointError, ZipItError

CHECKPOINT_KEY = "lightning_zipit"
FORMAT = 1


def find_record(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a merged module is made, if a checkpoint holds one."""
    record = checkpoint.get(CHECKPOINT_KEY)
    return record if isinstance(record, dict) else None


@contextmanager
def naming_file(where: str, what: str) -> Iterator[None]:
    """Inside, whatever the content of a file causes is a CheckpointError that names the file.

    Args:
        where: the file.
        what: what is wrong with it, where an error does not say.

    Raises:
        CheckpointError: instead of any error that is not of this package.
    """
    try:
        yield
    except ZipItError:
        raise
    except Exception as error:
        raise CheckpointError(f"{where} {what}: {type(error).__name__}: {error}") from error


@contextmanager
def reading_record(checkpoint: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The record of how a merged module is made.

    Args:
        checkpoint: the content of a checkpoint.
        where: the file, for errors.

    Raises:
        CheckpointError: if there is none, or if it is damaged.
    """
    record = find_record(checkpoint)
    if record is None or record.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a checkpoint of a merged module (format {FORMAT}).")
    with naming_file(where, "is damaged, or its source classes have changed since it was written"):
        yield record


def find_weights(checkpoint: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, or of a file that holds nothing else.

    Raises:
        CheckpointError: if there are none.
    """
    if "state_dict" in checkpoint:
        return checkpoint["state_dict"]
    if not checkpoint or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise CheckpointError(
            f"{where} is neither a checkpoint of Lightning, as `trainer.save_checkpoint` writes it, nor a state_dict: "
            f"it holds {', '.join(map(repr, list(checkpoint)[:5])) or 'nothing'}."
        )
    return checkpoint


def write_example(example: Inputs | None) -> dict[str, Any]:
    """Shape and type of a sample, or of each task's, in lists and strings."""
    if example is None:
        return {"input_shape": None, "input_dtype": None}
    if isinstance(example, Tensor):
        dtype, shape = describe_sample(example)
        return {"input_shape": list(shape), "input_dtype": dtype}
    known = {task: describe_sample(x) for task, x in example.items()}
    return {
        "input_shape": {task: list(shape) for task, (_, shape) in known.items()},
        "input_dtype": {task: dtype for task, (dtype, _) in known.items()},
    }


def read_example(record: Mapping[str, Any]) -> Inputs | None:
    """Zeros of the shape and type of one sample, or of each task's, as a checkpoint describes them."""
    shape, dtype = record["input_shape"], record.get("input_dtype") or "float32"
    if shape is None:
        return None
    if isinstance(shape, dict):
        return {task: zeros_like_sample((dtype[task], own)) for task, own in shape.items()}
    return zeros_like_sample((dtype, shape))


def read_barriers(barriers: Mapping[str, str]) -> dict[str, str]:
    """Nodes that cannot be merged, and why, as a file holds them; control characters become spaces."""
    return {str(node): printable(str(reason), " ") for node, reason in barriers.items()}


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """A checkpoint's content.

    Args:
        path: the file; a ``.safetensors`` file holds weights alone.
        map_location: where tensors go; see :func:`torch.load`.
        weights_only: read tensors and primitives only. Without it, code that the file holds is run.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything else.
    """
    try:
        if isinstance(path, (str, Path)) and Path(path).suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint at {path}.") from None
    except Exception as error:
        # torch says first, and at length, how to read a pickle nevertheless
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or repr(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors and primitives: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a checkpoint.")
    return content
