"""Plots of a merge with matplotlib: ``pip install 'lightning-zipit[plots]'``.

Every function draws into ``ax``, or into a new figure. It returns the figure and its axes, like ``plot`` of
torchmetrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_zipit._report.report import MergeReport
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.functional.checks import check_matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"across": "tab:blue", "within": "tab:orange", "alone": "lightgray"}
MODELS = ("tab:purple", "tab:green", "tab:red", "tab:olive", "tab:cyan", "tab:brown")


def plot_similarity(
    similarity: Tensor, labels: Tensor, tasks: Sequence[str], ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the similarity of a space, with its features sorted by cluster.

    Clusters are blocks on the diagonal: first clusters across models, then clusters within a model, then single
    features. In each part, the most similar cluster comes first. The strip on the left shows the model of each feature.

    Args:
        similarity: ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the merged feature of each source feature.
        tasks: the names of the N models.
        ax: the axes to draw into; by default a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ConfigurationError: if matplotlib is not installed.
        ValueError: if the shape of ``similarity`` or ``labels`` does not fit N models.
    """
    check_matching(similarity, len(tasks))
    if labels.shape != similarity.shape[:1]:
        raise ValueError(
            f"`labels` must have shape ({len(similarity)},), one label per feature, got {tuple(labels.shape)}."
        )
    fig, ax = _axes(ax, (6.4, 5.4))
    similarity, labels = similarity.detach().cpu(), labels.cpu()
    order, bounds = cluster_order(similarity, labels, len(tasks))
    size, limit = len(labels), float(similarity.abs().max())
    image = ax.imshow(
        similarity[order][:, order].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    fig.colorbar(image, ax=ax, label="similarity", shrink=0.8)
    model = order // (size // len(tasks))
    for index, task in enumerate(tasks):
        rows = torch.nonzero(model == index).flatten().tolist()
        colour = MODELS[index % len(MODELS)]
        ax.barh(rows, 0.03 * size, 1.0, left=-0.5 - 0.04 * size, color=colour, label=task)
    ax.set_xlim(-0.5 - 0.04 * size, size - 0.5)
    ax.set_ylim(size - 0.5, -0.5)
    middles = {}
    for kind, (start, end) in bounds.items():
        if start:
            ax.axhline(start - 0.5, color="black", linewidth=0.6)
            ax.axvline(start - 0.5, color="black", linewidth=0.6)
        if end > start:
            middles[f"{kind}\n({end - start})"] = (start + end - 1) / 2
    ax.set_yticks([*middles.values()], [*middles])
    ax.set_xticks([])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(tasks), frameon=False)
    ax.set_title("similarity, features sorted by cluster")
    return fig, ax


def cluster_order(similarity: Tensor, labels: Tensor, num_models: int) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Sort features by the kind of their cluster (across models, within a model, alone) and by similarity.

    Args:
        similarity: ``(N·C, N·C)``.
        labels: int64 ``(N·C,)``, the cluster of each feature.
        num_models: N.

    Returns:
        The sorted features, int64 ``(N·C,)``; and the start and end position of each kind of cluster.

    Example:
        >>> similarity = torch.eye(4)
        >>> similarity[1, 2] = similarity[2, 1] = 0.9
        >>> cluster_order(similarity, torch.tensor([0, 1, 1, 2]), num_models=2)
        (tensor([1, 2, 0, 3]), {'across': (0, 2), 'within': (2, 2), 'alone': (2, 4)})
    """
    model = torch.arange(len(labels)) // (len(labels) // num_models)
    kinds: dict[str, list[tuple[int, float, list[int]]]] = {kind: [] for kind in KINDS}
    for cluster in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == cluster).flatten()
        alike = similarity[members][:, members]
        models = model[members].unique()
        kind = "alone" if len(members) < 2 else "across" if len(models) > 1 else "within"
        owner = int(models[0]) if len(models) == 1 else -1
        kinds[kind].append((owner, -float(alike.mean()), members.tolist()))
    order: list[int] = []
    bounds = {}
    for kind, clusters in kinds.items():
        start = len(order)
        order += [feature for *_, members in sorted(clusters) for feature in members]
        bounds[kind] = (start, len(order))
    return torch.tensor(order), bounds


def plot_clusters(report: MergeReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the kinds of clusters of each space: across models, within a model, or a single feature.

    Args:
        report: the report of a merge.
        ax: the axes to draw into; by default a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    fig, ax = _axes(ax, _size_for(report))
    bottom = [0.0] * len(report.spaces)
    for kind, colour in KINDS.items():
        ratios = [getattr(space, kind) / space.width for space in report.spaces]
        ax.bar(range(len(ratios)), ratios, bottom=bottom, color=colour, label=kind, width=0.85)
        bottom = [low + ratio for low, ratio in zip(bottom, ratios, strict=True)]
    ax.set_ylabel("ratio of merged features")
    ax.set_ylim(0, 1)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(KINDS), frameon=False)
    _name_spaces(ax, report)
    return fig, ax


def plot_depth(report: MergeReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the matched similarity of each space over depth: mean, lowest, and mean of a random matching.

    Args:
        report: the report of a merge.
        ax: the axes to draw into; by default a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    fig, ax = _axes(ax, _size_for(report))
    depth = range(len(report.spaces))
    mean, lowest, chance = (
        [getattr(space, name) for space in report.spaces] for name in ("similarity", "lowest", "chance")
    )
    ax.fill_between(depth, lowest, mean, color="tab:blue", alpha=0.12, linewidth=0)
    ax.plot(depth, mean, marker="o", color="tab:blue", label="mean")
    ax.plot(depth, lowest, marker="v", markersize=5, linewidth=1, color="tab:blue", alpha=0.6, label="lowest")
    ax.plot(depth, chance, linestyle="--", color="tab:gray", label="mean, matched at random")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("matched similarity")
    ax.set_ylim(top=1.02)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    _name_spaces(ax, report)
    return fig, ax


def plot_tradeoff(
    rows: Iterable[tuple[str, float, float]],
    references: Mapping[str, tuple[float, float]] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plot accuracy over FLOPs.

    Args:
        rows: name, FLOPs and accuracy of each merged network. A line connects networks of the same name.
        references: FLOPs and accuracy by name for comparison, such as the sources and the ensemble.
        ax: the axes to draw into; by default a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    fig, ax = _axes(ax, (6.4, 4.2))
    series: dict[str, list[tuple[float, float]]] = {}
    for name, flops, accuracy in rows:
        series.setdefault(name, []).append((flops / 1e6, accuracy))
    for name, points in series.items():
        ax.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    points_at: dict[tuple[float, float], list[str]] = {}
    for name, (flops, accuracy) in (references or {}).items():
        points_at.setdefault((flops / 1e6, accuracy), []).append(name)
    for (x, y), names in points_at.items():
        ax.axhline(y, color="tab:gray", linestyle=":", linewidth=0.8, zorder=0)
        ax.scatter(x, y, marker="D", s=30, color="black", zorder=3)
        ax.annotate(", ".join(names), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
    ax.set(xlabel="MFLOPs for one sample", ylabel="accuracy")
    ax.margins(x=0.2, y=0.1)
    ax.grid(alpha=0.3)
    if series:
        ax.legend(loc="best", fontsize=9)
    return fig, ax


def plot_agreement(agreement: Tensor, targets: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the correlation of the features of a source with those of the merged network.

    Args:
        agreement: ``(C, W)``, from :func:`~lightning_zipit.functional.agreement`.
        targets: int64 ``(C,)``, the merged feature of each source feature; by default the merged feature with the
            highest correlation.
        ax: the axes to draw into; by default a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    fig, ax = _axes(ax, (5.6, 4.8))
    agreement = agreement.detach().cpu()
    title = "source and matched feature" if targets is not None else "source and most similar feature"
    targets = agreement.argmax(1) if targets is None else targets.cpu()
    own = agreement.gather(1, targets[:, None])[:, 0]
    order = torch.argsort(own, descending=True, stable=True)
    taken = list(dict.fromkeys(targets[order].tolist()))  # columns in the order of the rows that match them
    columns = torch.tensor(taken + [column for column in range(agreement.shape[1]) if column not in set(taken)])
    rank = {column: position for position, column in enumerate(taken)}
    rows = torch.tensor(sorted(order.tolist(), key=lambda row: rank[int(targets[row])]))
    image = ax.imshow(agreement[rows][:, columns].numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    fig.colorbar(image, ax=ax, label="correlation", shrink=0.8)
    ax.set(xlabel="features of the merged network", ylabel="features of the source", xticks=[], yticks=[])
    ax.set_title(f"{title}: mean {float(own.mean()):.2f}")
    return fig, ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    try:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "Plots need matplotlib, which is not installed: pip install 'lightning-zipit[plots]'."
        ) from error
    if ax is None:
        fig, ax = plt.subplots(figsize=size, layout="constrained")
        return fig, ax
    assert isinstance(ax.figure, Figure)
    return ax.figure, ax


def _size_for(report: MergeReport) -> tuple[float, float]:
    return min(16.0, max(5.0, 1.5 + 0.35 * len(report.spaces))), 4.2


def _name_spaces(ax: Axes, report: MergeReport) -> None:
    """Label the x-axis with at most 40 names of spaces."""
    step = math.ceil(len(report.spaces) / 40)
    named = range(0, len(report.spaces), step)
    ax.set_xticks(named, [report.spaces[index].name for index in named], rotation=90, fontsize=8)
    ax.set_xlim(-0.6, len(report.spaces) - 0.4)
