"""Export of merged modules to ONNX and torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from lightning_zipit._common.calls import Call
from lightning_zipit._common.files import find_output_problem, replacing_with_companions
from lightning_zipit._common.views import Inputs, each_view, like
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.paths import AllHeads

ONNX_PACKAGES = ("onnx", "onnxscript")


class Network(AllHeads):
    """Stems, trunk and heads as a plain module: from one input, or a dict of inputs by task, to a dict of all outputs.

    Args:
        merged: the merged module. Its parts are shared, not copied.
    """

    def __init__(self, merged: MultiHeadModule) -> None:
        super().__init__(merged.trunk, merged.heads, merged.stems, merged.arguments)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the outputs by name: the task, or ``task.key`` if a head has several outputs."""
        outputs = super().forward(*args, **kwargs)
        return {name: output for task, each in outputs.items() for name, output in _by_name(task, each)}


def _by_name(name: str, output: Any) -> list[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        return [(name, output)]
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return [named for key, item in items if item is not None for named in _by_name(f"{name}.{key}", item)]


def export_merged(merged: MultiHeadModule, output: str | Path, batch_size: int | None = None) -> list[str]:
    """Export a merged module to a file that runs without this package.

    A module with stems has one input per task: a dict by task (``.pt2``), or inputs named ``input.TASK`` (``.onnx``).

    Args:
        merged: the merged module.
        output: the file to write: ``.pt2`` for :func:`torch.export.load`, or ``.onnx`` for ONNX runtimes. If the
            weights of an ``.onnx`` file take more than 1.5 GiB, they are saved in ``{output}.data`` in the same folder.
        batch_size: the fixed batch size of the file. By default, the file accepts any batch size.

    Returns:
        The names of the outputs, which are the tasks: keys of a dict (``.pt2``), or names in the graph (``.onnx``).

    Raises:
        ConfigurationError: if the format is unknown, packages are missing, or the network cannot be exported.
    """
    output = Path(output)
    if problem := find_output_problem(output) or _find_format_problem(output):
        raise ConfigurationError(problem)
    example = merged.example
    if example is None:
        raise ConfigurationError(
            "The merged module does not know the shape of its input. Pass an `example_input` to MultiHeadModule."
        )
    network = Network(merged).eval()
    if len(merged.stems) and isinstance(example, Call):
        example = dict.fromkeys(merged.tasks, example)
    x = each_view(like(example, network), lambda one: one.repeated(batch_size or 2))
    with torch.no_grad():
        names = list(network(x))
    args, kwargs = x.arguments if isinstance(x, Call) else (({task: _only_tensor(one) for task, one in x.items()},), {})
    open_axes = None if batch_size else _open_axes(x)
    try:
        program = torch.export.export(network, args, kwargs, dynamic_shapes=open_axes)
    except Exception as error:  # torch.export has no error class of its own
        hint = "" if batch_size else " A fixed batch size may help: batch_size=1 (--batch_size=1)."
        raise ConfigurationError(
            f"torch.export cannot export the merged network.{hint} Its error is: {error}"
        ) from error
    with replacing_with_companions(output) as file:
        if output.suffix == ".pt2":
            torch.export.save(program, file)
        else:
            onnx = torch.onnx.export(
                program,
                input_names=_input_names(x),
                output_names=names,
                dynamo=True,
                verbose=False,
            )
            assert onnx is not None
            onnx.save(file)
    return names


def _only_tensor(x: Call) -> Tensor:
    (tensor,) = x.tensors
    return tensor


def _open_axes(x: Inputs) -> Any:
    """Leave the number of samples open, for each input of a network."""
    if not isinstance(x, Call):
        return {"args": ({task: {0: torch.export.Dim(f"batch_{number}")} for number, task in enumerate(x)},)}
    batch = torch.export.Dim("batch")
    args, kwargs = x.structure.unflatten([{0: batch} if chosen else None for chosen in x.batched])
    return {**({"args": tuple(args)} if args else {}), **({"kwargs": kwargs} if kwargs else {})}


def _input_names(x: Inputs) -> list[str]:
    if not isinstance(x, Call):
        return [f"input.{task}" for task in x]
    return ["input"] if len(x.tensors) == 1 else [f"input_{number}" for number in range(len(x.tensors))]


def _find_format_problem(output: Path) -> str | None:
    if output.suffix not in (".onnx", ".pt2"):
        return f"The suffix of `output` sets the format, and must be .onnx or .pt2, got {output}."
    missing = [name for name in ONNX_PACKAGES if output.suffix == ".onnx" and not RequirementCache(name)]
    if missing:
        return (
            f"The format ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: pip install 'lightning-zipit[onnx]'."
        )
    return None
