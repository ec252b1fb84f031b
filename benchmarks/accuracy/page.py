"""Tables and plots of ``docs/results/accuracy/``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_zipit.plots import plot_tradeoff

from .experiments import Group
from .merging import ENSEMBLE, MATCHERS, REFINEMENTS
from .networks import STAGES
from .results import Mean, Row, average, by_way, choose

PAPER: dict[str, tuple[str, dict[tuple[str, str], tuple[float, float]]]] = {
    "text": (
        "ResNet-20×4, CLIP heads",
        {
            (ENSEMBLE, ""): (87.4, 96.6),
            ("average", "20/20"): (43.0, 60.8),
            ("weights", "20/20"): (46.2, 79.8),
            ("permute", "20/20"): (58.4, 87.4),
            ("zip", "20/20"): (79.1, 92.1),
            ("zip", "13/20"): (83.8, 94.6),
        },
    ),
    "ce": (
        "ResNet-20×16, cross-entropy",
        {
            (ENSEMBLE, ""): (80.0, 94.1),
            ("permute", "20/20"): (45.4, 80.4),
            ("zip", "20/20"): (66.0, 87.4),
            ("zip", "13/20"): (73.4, 90.5),
            ("zip", "7/20"): (75.5, 91.7),
        },
    ),
    "vgg": (
        "VGG-11, cross-entropy",
        {
            (ENSEMBLE, ""): (66.6, 88.6),
            ("permute", "22/22"): (25.4, 47.8),
            ("zip", "22/22"): (33.2, 56.5),
            ("zip", "7/22"): (44.5, 65.5),
        },
    ),
}
"""Joint accuracy and task average in the paper (ZipIt!, arXiv 2305.03053, CIFAR-10 5+5), by matcher and stage.

"weights" is the paper's Git Re-Basin."""


def order(row: Mean) -> tuple[int, int]:
    """Return the sort key of a row: the ensemble first, then by refinement and matcher."""
    if row.matcher == ENSEMBLE:
        return (-1, 0)
    return (list(REFINEMENTS).index(row.refine), list(MATCHERS).index(row.matcher))


def as_pages(rows: Sequence[Row], groups: Mapping[str, Group]) -> dict[str, str]:
    """Return the text of each page: one for each group that has rows, and one that compares two refinements."""
    chosen = choose(rows)
    tried = {way: len(settings) for way, settings in by_way(rows).items()}
    pages = {
        name: group_table(group, [rows for rows in chosen if rows[0].group == name], tried)
        for name, group in groups.items()
        if any(rows[0].group == name for rows in chosen)
    }
    if fitted_and_not(chosen):
        pages["least-squares"] = comparison_table(chosen, groups)
    return pages


def group_table(group: Group, chosen: Sequence[Sequence[Row]], tried: Mapping[tuple[str, ...], int]) -> str:
    """Return a table with a row for each matcher and refinement and a column for each stage."""
    means = [average(rows) for rows in chosen]
    stages = [stage for stage in STAGES[group.architecture] if any(row.stage == stage for row in means)]
    flops = {row.stage: f"{row.flops / 1e6:.0f} MFLOPs" for row in means}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in sorted(means, key=order):
        cells.setdefault((row.matcher, row.refine), {})[row.stage] = as_cell(row, max(row.pairs for row in means))
    columns = [f"{stage} ({flops[stage]})" for stage in stages]
    lines = [
        f"# {group.title}",
        "",
        describe_pairs(chosen),
        "",
        "| | `refine` | " + " | ".join(columns) + " |",
        "| --- | --- |" + " --: |" * len(stages),
    ]
    source, figures = PAPER[group.paper] if group.paper else ("", {})
    for (matcher, refine), by_stage in cells.items():
        if matcher == ENSEMBLE:
            whole = f"{by_stage['']} ({flops['']})"
            lines.append(f"| ensemble | | {whole} |" + " |" * (len(stages) - 1))
        else:
            shown = " | ".join(by_stage.get(stage, "") for stage in stages)
            lines.append(f"| {matcher} | {refine} | {shown} |")
        places = [""] if matcher == ENSEMBLE else stages
        paper = [figures.get((matcher, stage)) for stage in places]
        if any(paper) and refine in ("", "batch_norm"):
            shown = " | ".join(f"*{pair[0]:.1f} / {pair[1]:.1f}*" if pair else "" for pair in paper)
            lines.append(f"| *{matcher}, the paper's {source}* | | {shown} |" + " |" * (len(stages) - len(places)))
    if settings := describe_settings(sorted(means, key=order), tried):
        lines += ["", " ".join(settings)]
    return "\n".join(lines)


def describe_pairs(chosen: Sequence[Sequence[Row]]) -> str:
    """Return the accuracies of the source networks of each pair."""
    ensembles = next(rows for rows in chosen if rows[0].matcher == ENSEMBLE)
    accuracies = [f"{row.pair} ({row.tasks.replace(' ', ', ')})" for row in ensembles]
    few = any(len(rows) < len(ensembles) for rows in chosen)
    note = " A number in brackets is the number of pairs of a cell." if few else ""
    return f"Accuracy of each network on its own classes: {'; '.join(accuracies)}.{note}"


def describe_settings(means: Sequence[Mean], tried: Mapping[tuple[str, ...], int]) -> list[str]:
    """Return the settings of the matchers: the chosen ones with their merges, then the ones that were not tuned."""
    chosen: dict[tuple[str, str, str, int], list[str]] = {}
    untuned: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in means if row.setting):
        count = tried[row.group, row.stage, row.matcher, row.refine]
        setting = row.setting.replace(", rounds=20, seed=0", "")
        if count > 1:
            chosen.setdefault((row.matcher, row.refine, setting, count), []).append(row.stage)
        elif row.refine not in untuned.setdefault((row.matcher, setting), []):
            untuned[row.matcher, setting].append(row.refine)
    sentences = {
        "Settings, each the best of the tried ones on held-out training images": [
            f"{matcher} with {refine}, {', '.join(stages)}: `{setting}` of {count}"
            for (matcher, refine, setting, count), stages in chosen.items()
        ],
        "Not tuned": [
            f"{matcher} with {', '.join(refinements)}: `{setting}`"
            for (matcher, setting), refinements in untuned.items()
        ],
    }
    return [f"{begin}: {'; '.join(parts)}." for begin, parts in sentences.items() if parts]


def as_cell(row: Mean, pairs: int) -> str:
    """Return the accuracies, with the number of pairs if it is lower than that of the group."""
    fewer = f" [{row.pairs}]" if row.pairs < pairs else ""
    if row.pairs == 1:
        return f"{row.joint:.1f} / {row.mean:.1f}{fewer}"
    return f"{row.joint:.1f} ± {row.joint_std:.1f} / {row.mean:.1f} ± {row.mean_std:.1f}{fewer}"


def fitted_and_not(chosen: Sequence[Sequence[Row]]) -> list[tuple[Row, Row]]:
    """Return pairs of the same merge with batch_norm and with least_squares, each with its chosen setting."""
    found = {(*row.key[:5], row.refine): row for rows in chosen for row in rows}
    return [
        (row, found[(*key[:5], "least_squares")])
        for key, row in found.items()
        if key[5] == "batch_norm" and (*key[:5], "least_squares") in found
    ]


def comparison_table(chosen: Sequence[Sequence[Row]], groups: Mapping[str, Group]) -> str:
    """Return a table of the gain of least squares over batch norm, for each group and stage."""
    pairs = fitted_and_not(chosen)
    lines = [
        "# `least_squares` against `batch_norm`",
        "",
        "Points of joint accuracy / task average that `least_squares` gains over `batch_norm` in the same merge. Rows "
        "cover all matchers and pairs, each with its chosen setting.",
        "",
        "| | stage | merges | mean | least | most | better in joint / task average |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for name, group in groups.items():
        for stage in STAGES[group.architecture]:
            gains = [
                (fitted.joint - plain.joint, fitted.mean - plain.mean)
                for plain, fitted in pairs
                if plain.group == name and plain.stage == stage
            ]
            if gains:
                shown = [
                    " / ".join(f"{function(values):+.1f}" for values in zip(*gains, strict=True))
                    for function in (statistics.fmean, min, max)
                ]
                better = " / ".join(str(sum(gain > 0 for gain in values)) for values in zip(*gains, strict=True))
                lines.append(f"| {group.title} | {stage} | {len(gains)} | {' | '.join(shown)} | {better} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], groups: Mapping[str, Group], folder: Path) -> list[Path]:
    """Plot joint accuracy over cost for each group, and the gain of least squares; return the files."""
    import matplotlib.pyplot as plt

    chosen = choose(rows)
    paths = []
    for name, group in groups.items():
        means = [average(rows) for rows in chosen if rows[0].group == name]
        shown = [
            row
            for row in sorted(means, key=order)
            if row.matcher in ("average", "permute", "zip") and row.refine in ("batch_norm", "least_squares")
            if row.pairs == max(mean.pairs for mean in means)  # means over different pairs are not comparable
        ]
        if not shown:
            continue
        points = [
            (row.matcher + " + least squares" * (row.refine == "least_squares"), row.flops, row.joint) for row in shown
        ]
        references = {row.matcher: (row.flops, row.joint) for row in means if row.matcher == ENSEMBLE}
        figure, axes = plot_tradeoff(points, references)
        for row in shown:
            if row.pairs > 1:
                axes.errorbar(row.flops / 1e6, row.joint, row.joint_std, color="tab:gray", linewidth=0.8, capsize=2)
        axes.set(title=group.title, ylabel="joint accuracy in %")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    if pairs := fitted_and_not(chosen):
        figure, axes = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
        for matcher in dict.fromkeys(plain.matcher for plain, _ in pairs):
            own = [(plain.joint, fitted.joint) for plain, fitted in pairs if plain.matcher == matcher]
            axes.scatter(*zip(*own, strict=True), s=22, alpha=0.75, label=matcher)
        low, high = min(min(axes.get_xlim()), min(axes.get_ylim())), max(max(axes.get_xlim()), max(axes.get_ylim()))
        axes.plot([low, high], [low, high], color="tab:gray", linestyle=":", linewidth=1)
        axes.set(title="joint accuracy in %, one point a merged network", xlabel="batch_norm", ylabel="least_squares")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
        paths.append(folder / "least-squares.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths
