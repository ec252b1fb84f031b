"""The phase *merge*: build trunk, heads and stems from the sources and the matching of every feature space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_zipit._common.sources import Sources
from lightning_zipit._common.views import Inputs, like, view_of
from lightning_zipit._matching.maps import FeatureMap
from lightning_zipit._matching.weights import common_start
from lightning_zipit._merging.cost import Cost, measure_cost
from lightning_zipit._merging.rebuild import build_merged, build_stems
from lightning_zipit._phases.match import Matching
from lightning_zipit._report.report import MergeReport
from lightning_zipit.graph.remember import signature
from lightning_zipit.graph.rigid import rigid_note
from lightning_zipit.graph.spaces import handed_over
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine.task_norms import give_norms, set_affine
from lightning_zipit.settings import MergeSettings
from lightning_zipit.task_vectors import combine_into


@dataclass(frozen=True)
class Merged:
    """The merged networks before refinement.

    Attributes:
        trunk: the shared part.
        heads: the last part of each task's network, by task.
        maps: the map of each feature space, with the models' weights.
        stems: the first part of each task's network, by task; empty without ``start_at``.
    """

    trunk: nn.Module
    heads: dict[str, nn.Module]
    maps: Mapping[str, FeatureMap]
    stems: dict[str, nn.Module] = field(default_factory=dict)


def merge(sources: Sources, matching: Matching, settings: MergeSettings) -> Merged:
    """Merge the weights of the sources.

    Args:
        sources: the source networks.
        matching: the matching of every feature space.
        settings: the options of the merge.

    Returns:
        New networks, on the device and of the type of the sources. The running statistics of batch norm are merged.
    """
    with torch.inference_mode(False), torch.no_grad():
        maps = {name: one.space_map.with_weights(sources.weights) for name, one in matching.spaces.items()}
        graphs, networks = [matching.graphs[task] for task in sources.tasks], list(sources.networks.values())
        trunk, built = build_merged(graphs, networks, maps, sources.weights, list(sources.numbers.values()))
        heads: dict[str, nn.Module] = dict(zip(sources.tasks, built, strict=True))
        stems: dict[str, nn.Module] = dict(zip(sources.tasks, build_stems(graphs, maps), strict=False))
        if settings.combine is not None and sources.base is not None:
            combine_into(trunk, list(sources.leads.values()), sources.base, settings.combine)
        if settings.norms_per_task:
            give_norms(trunk, heads)
            set_affine(trunk, sources.networks, graphs[0].axes, maps, sources.numbers)
    return Merged(trunk, heads, maps, stems)


def with_report(
    merged: Merged,
    matching: Matching,
    sources: Sources,
    settings: MergeSettings,
    example: Inputs,
    notes: tuple[str, ...],
) -> MergedBackbone:
    """Compose the result of a merge: its networks, and a report of the matching and the costs.

    Args:
        merged: the merged networks.
        matching: the matching of every feature space.
        sources: the source networks.
        settings: the options of the merge.
        example: an input of one sample, or one such input per task.
        notes: notes of earlier phases for the report.
    """
    graph = matching.graph
    x = like(example, sources.first)
    with torch.inference_mode(False), torch.no_grad():
        report = MergeReport(
            tuple(matching.spaces[name].report for name in graph.spaces),
            _costs(sources, x),
            measure_cost(AllHeads(merged.trunk, merged.heads, merged.stems), x),
            graph.notes + notes + _notes(merged, matching, sources, settings),
            models=sources.models,
        )
    widths = {name: one.width for name, one in merged.maps.items() if one.width != graph.spaces[name].size}
    return MergedBackbone(merged.trunk, merged.heads, report, example, matching.graphs, widths, merged.stems)


def _costs(sources: Sources, x: Inputs) -> dict[str, Cost]:
    """Measure the cost of each source. Networks of one architecture are measured once."""
    measured: dict[Any, Cost] = {}
    costs = {}
    for task, network in sources.networks.items():
        view = view_of(x, task)
        kind = signature(network, view)
        if kind not in measured:
            measured[kind] = measure_cost(network, view)
        costs[task] = measured[kind]
    return costs


def _notes(merged: Merged, matching: Matching, sources: Sources, settings: MergeSettings) -> tuple[str, ...]:
    """Write notes for the report."""
    graph, matcher = matching.graph, settings.matcher
    notes: list[str] = []
    if sources.weights is not None:
        counts = ", ".join(f"{name} {one:g}" for name, one in zip(sources.models, sources.weights, strict=True))
        notes.append(f"Matched features were averaged with the weights of the models: {counts}.")
    if settings.stop_at == "auto":
        notes.append(f"The trunk ends at {f'`{graph.stop_at}`' if graph.stop_at else 'the last layer'}.")
    if matcher.dense or any(one.mixes for one in merged.maps.values()):
        notes += rigid_note(graph)
    if settings.norms_per_task:
        notes.append(
            "Batch norm is per task. The trunk therefore runs once for each task, and the merged FLOPs include all "
            "runs."
        )
    if graph.stem_nodes:
        notes.append(
            "Each task has a stem. Stem and trunk therefore run once for each task, and the merged FLOPs include all "
            "runs."
        )
        if matcher.any_width:
            names = ", ".join(f"`{name}`" for name in sorted(handed_over(graph)))
            notes.append(f"Matched one to one, because their features are outputs of the stems: {names}.")
    if not matcher.by_index:
        notes += common_start(graph, list(sources.leads.values()), merged.maps)
    return tuple(notes)
