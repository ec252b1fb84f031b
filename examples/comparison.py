"""Comparison of merge methods: the table and the plot of the examples."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_zipit import Ensemble, JointAccuracy, ZipIt
from lightning_zipit.plots import plot_tradeoff


@dataclass(frozen=True)
class Row:
    """One network: its accuracies in percent ("joint", one per task, "mean") and its FLOPs for one sample."""

    name: str
    accuracy: dict[str, float]
    flops: int


def quiet_trainer(**arguments: Any) -> Trainer:
    """Return a CPU Trainer without output and files."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | arguments))


def evaluate(
    network: LightningModule, classes: Mapping[str, Sequence[int]], batches: Iterable[tuple[Any, Tensor]]
) -> dict[str, float]:
    """Compute joint and per-task accuracy in percent, on batches with global labels."""
    metric = JointAccuracy(classes)
    with torch.no_grad():
        for images, labels in batches:
            metric.update(network(images), labels)
    return {name: 100 * value.item() for name, value in metric.compute().items()}


def compare(
    models: Mapping[str, LightningModule],
    classes: Mapping[str, Sequence[int]],
    merges: Mapping[str, Mapping[str, Any]],
    calibration: Any,
    test: Iterable[tuple[Tensor, Tensor]],
    backbone: str,
) -> list[Row]:
    """Evaluate every source model, every merge, and the ensemble.

    Args:
        models: the trained modules by task.
        classes: the global labels of each task's outputs.
        merges: keyword arguments of :meth:`lightning_zipit.ZipIt.merge` (matcher, stop_at, refine, …) by row name.
        calibration: the dataloaders of the merge.
        test: test batches with global labels.
        backbone: the merged part of the modules.

    Returns:
        The rows of the source models, the merges and the ensemble.
    """
    rows = []
    merge_names = track(merges, description="merging and testing", transient=True)
    for task, model in models.items():
        single = Ensemble({task: model}, backbone).eval()
        rows.append(Row(f"model {task}", evaluate(single, {task: classes[task]}, test), 0))
    report = None
    for name in merge_names:
        merged = ZipIt(quiet_trainer()).merge(models, dataloaders=calibration, backbone=backbone, **merges[name])
        report = merged.report
        assert report is not None
        rows.append(Row(name, evaluate(merged, classes, test), report.merged.flops))
    ensemble = Ensemble(models, backbone).eval()
    assert report is not None
    rows.append(Row("ensemble", evaluate(ensemble, classes, test), report.ensemble.flops))
    singles = list(report.sources.values())
    return [Row(row.name, row.accuracy, singles[i].flops) if i < len(models) else row for i, row in enumerate(rows)]


def print_table(title: str, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Print the rows as a table: accuracies in percent, FLOPs for one sample."""
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    for heading in ("joint", *tasks, "mean", "MFLOPs"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row.accuracy[name]:.1f}" if name in row.accuracy else "–" for name in ("joint", *tasks, "mean")]
        table.add_row(row.name, *cells, f"{row.flops / 1e6:.2f}")
    Console(width=110).print(table)


def plot(title: str, rows: Sequence[Row], path: Path) -> None:
    """Plot joint accuracy over cost, a point for each network. Lines connect networks that differ only in width."""
    from matplotlib.pyplot import close

    references = {row.name: (row.flops, row.accuracy["joint"]) for row in rows if row.name == "ensemble"}
    merged = [row for row in rows if not row.name.startswith(("model", "ensemble"))]
    points = [(row.name.partition(", width")[0], row.flops, row.accuracy["joint"]) for row in merged]
    figure, axes = plot_tradeoff(points, references)
    axes.set(title=title, ylabel="joint accuracy in %")
    figure.savefig(path, dpi=120)
    close(figure)
