"""Merging of plain networks, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zipit._phases.prepare import make_sources
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.pipeline import Pipeline
from lightning_zipit.settings import MergeSettings


def merge_backbones(
    backbones: Mapping[str, nn.Module],
    batches: Sequence[Iterable[Any]] | Iterable[Any],
    settings: MergeSettings | None = None,
    base: nn.Module | None = None,
) -> MergedBackbone:
    """Merge plain networks, without a Trainer.

    Args:
        backbones: the source networks by task, on one device. They are not changed.
        batches: the inputs: a list with one iterable per task, or one iterable for all tasks. Each iterable is read
            several times. An input is a tensor, a tuple of positional arguments or a dict of keyword arguments for all
            networks, or a dict with one of these for each task. A list of tuples is read as one iterable per task.
        settings: the options of the merge. By default, all layers but the last one are merged.
        base: the network from which all sources were trained, for ``settings.combine``.

    Returns:
        The merged networks.

    Raises:
        ConfigurationError: if the networks cannot be merged.
        CalibrationError: if the data cannot be used.

    Example:
        >>> def network():
        ...     return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> merged = merge_backbones({"a": network(), "b": network()}, [torch.randn(16, 1, 8, 8)])
        >>> merged.heads["b"](*merged.trunk(torch.randn(5, 1, 8, 8))).shape
        torch.Size([5, 2])
    """
    settings = settings or MergeSettings()
    pipeline = Pipeline(make_sources(backbones, settings, base), settings)
    per_task = isinstance(batches, (list, tuple)) and batches and not isinstance(batches[0], (Tensor, Mapping))
    loaders: list[Iterable[Any]] = list(batches) if per_task else [batches]
    if per_task and len(loaders) != len(backbones):
        raise ConfigurationError(
            f"`batches` lists {len(loaders)} iterables for {len(backbones)} tasks. Give one iterable for each task, "
            "or a single iterable (not in a list) for all tasks."
        )
    push(pipeline, loaders)
    return pipeline.finish()


def push(pipeline: Pipeline, loaders: Sequence[Iterable[Any]], passes: int | None = None) -> None:
    """Push all batches into a pipeline, pass by pass.

    Args:
        pipeline: the pipeline. The networks run on the device of the sources.
        loaders: the batches of each task in the order of the tasks, or one iterable for all tasks.
        passes: the number of passes; by default all.
    """
    tasks = pipeline.sources.tasks
    networks = {task: working_copy(network) for task, network in pipeline.sources.networks.items()}
    with torch.no_grad():
        for number in range(pipeline.passes if passes is None else passes):
            pipeline.begin(number, networks)
            for loader, batches in enumerate(loaders):
                for x in batches:
                    pipeline.add(x, tasks if len(loaders) == 1 else [tasks[loader]], loader)
