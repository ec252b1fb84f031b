"""Commands of ``lightning-zipit`` that need no Trainer: ``inspect`` and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_zipit._common.files import find_output_problem, replacing
from lightning_zipit._common.views import view_of
from lightning_zipit._lightning.export import export_merged
from lightning_zipit._lightning.files.checkpoint import (
    find_record,
    read_checkpoint,
    read_example,
    reading_record,
)
from lightning_zipit._lightning.files.descriptions import make_given, make_sources
from lightning_zipit._lightning.files.loading import load_source
from lightning_zipit._lightning.files.names import find_class, find_object
from lightning_zipit._lightning.files.trust import Trust, Trusted
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.sources import get_backbone
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import MergeGraph, trace
from lightning_zipit.graph.notes import read_barriers


def inspect(
    model: str | None = None,
    arguments: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    backbone: str = "",
    stop_at: str | None = None,
    input_shape: list[int] | None = None,
    svg: str | None = None,
    weights_only: bool = True,
    start_at: str | None = None,
    trust: list[str] | str | None = None,
    models: dict[str, Any] | None = None,
) -> None:
    """Print which parameter axes of a network must be merged together: for each axis, its feature space.

    Args:
        model: the network's class or function, by dotted name, such as my_project.LitNet or
            torchvision.models.resnet18.
        arguments: arguments of the model, such as --arguments.width=5. A checkpoint holds its own arguments.
        ckpt_path: a trained checkpoint of the model, or a merged checkpoint.
        backbone: dotted name of the part of the model to merge. By default, the whole forward is merged.
        stop_at: dotted name, inside the backbone, of the last module that the tasks would share.
        input_shape: shape of one sample, such as [3, 224, 224]. It is needed if no fitting shape can be guessed.
        svg: an SVG file for a drawing of the network, with its feature spaces in colour.
        weights_only: read only tensors and primitives from the checkpoint. false unpickles the checkpoint, which runs
            code in it: use it only for files that you trust.
        start_at: dotted name, inside the backbone, of the first module that the tasks would share.
        trust: modules or classes, by dotted name, that the checkpoint may refer to, such as my_project.
        models: the class path of the source module of a task, or a dict with class_path and init_args, if a merged
            checkpoint does not describe it (--models.TASK=CLASS_PATH).

    Raises:
        ConfigurationError: if no model is given, or the model has no such backbone.
        CheckpointError: if the checkpoint cannot be read, or refers to something that is not allowed.
        TraceError: if the backbone cannot be traced.
    """
    if svg and (problem := find_output_problem(svg)):
        raise ConfigurationError(problem.replace("`output`", "`svg`"))
    allowed = Trust.of(trust, _named(model))
    graph = _trace_merged(ckpt_path, weights_only, allowed, make_given(models)) if ckpt_path else None
    if graph is None:
        network = _find_model(model, arguments or {}, ckpt_path, weights_only, trust)
        example = torch.zeros(1, *input_shape) if input_shape else None
        graph = trace(get_backbone(network, backbone), stop_at, example_input=example, start_at=start_at)
    print(graph)
    if svg:
        with replacing(Path(svg)) as file:
            file.write_text(graph.to_svg(), encoding="utf-8")
        print(f"Drew the network in {svg}")


def _named(model: str | None) -> Any:
    return find_object(model) if model else None


def _find_model(
    model: str | None, arguments: Mapping[str, Any], ckpt_path: str | None, weights_only: bool, trust: Trusted | None
) -> nn.Module:
    if ckpt_path is not None and not arguments:
        return load_source(ckpt_path, find_class(model) if model else None, weights_only=weights_only, trust=trust)
    if model is None:
        raise ConfigurationError("No network was given. Give --model or --ckpt_path.")
    try:
        network = find_object(model)(**arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"{model} cannot be called: {error}. Give its arguments as --arguments.NAME=VALUE."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigurationError(
            f"{model} returns a {type(network).__name__}, not an nn.Module. Give the name of a module class, or of a "
            "function that returns a module."
        )
    return network


def _trace_merged(
    ckpt_path: str, weights_only: bool, trust: Trust, given: Mapping[str, LightningModule]
) -> MergeGraph | None:
    """Trace the first source of a merged checkpoint; return ``None`` if the checkpoint is not merged."""
    checkpoint = read_checkpoint(ckpt_path, "cpu", weights_only)
    if find_record(checkpoint) is None:
        return None
    with reading_record(checkpoint, ckpt_path) as record:
        task, source = next(iter(make_sources(record["sources"], trust, ckpt_path, given).items()))
        example = read_example(record)
        return trace(
            get_backbone(source, record["backbone"]),
            record["stop_at"],
            example_input=None if example is None else view_of(example, task),
            merge_heads=record["merge_heads"],
            barriers=read_barriers(record["barriers"]),
            start_at=record.get("start_at"),
        )


def export(
    ckpt_path: str,
    output: str,
    batch_size: int | None = None,
    model: str | None = None,
    trust: list[str] | str | None = None,
    models: dict[str, Any] | None = None,
) -> None:
    """Export a merged checkpoint to a file that runs without this package: ONNX, or torch.export's .pt2.

    The outputs have the names of the tasks. If tasks have stems, each task has its own input: input.TASK in ONNX, an
    item of a dict in .pt2.

    Args:
        ckpt_path: a merged checkpoint.
        output: the file to write. Its suffix, .onnx or .pt2, sets the format. ONNX needs
            pip install 'lightning-zipit[onnx]'.
        batch_size: the fixed batch size of the file. By default, the file accepts any batch size.
        model: the class of the source models, by dotted name. It is needed for classes of your own, because a
            checkpoint cannot import them.
        trust: modules or classes, by dotted name, that the checkpoint may refer to, such as my_project.
        models: the class path of the source module of a task, or a dict with class_path and init_args, if a merged
            checkpoint does not describe it (--models.TASK=CLASS_PATH).

    Raises:
        ConfigurationError: if the format is unknown, packages are missing, or the network cannot be exported.
        CheckpointError: if the checkpoint cannot be read, is not merged, or refers to something that is not allowed.
    """
    checkpoint = read_checkpoint(ckpt_path, "cpu")
    merged = MultiHeadModule.restore(checkpoint, ckpt_path, Trust.of(trust, _named(model)), make_given(models))
    names = export_merged(merged, output, batch_size)
    print(f"Saved {output} with the outputs {', '.join(names)}")
