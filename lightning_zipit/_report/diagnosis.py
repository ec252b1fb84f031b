"""Diagnosis of a merge: find problems in its measurements, and suggest remedies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from lightning_zipit._matching.measure import SpaceReport
from lightning_zipit.refine.refinement import NormShift

Kind = Literal["chance", "samples", "dead", "crowded", "collapse", "norms"]

DEVIATIONS = 2.0
"""Required distance of a similarity from chance, in standard deviations of a random matching."""
SIMILAR = 0.9
"""Similarity from which features are so similar that any matching is good."""
NOISE = 0.5
"""Highest acceptable ratio of noise to matched similarity."""
DEAD = 0.1
"""Highest acceptable ratio of constant features of a model in a space."""
CROWDED = 1.5
"""Highest acceptable ratio of the losses of two models. Differences below LOST are always acceptable."""
LOST = 0.1
"""Acceptable difference of the losses of two models, as a ratio of the variance."""
COLLAPSE = 0.5
"""Lowest acceptable ratio of the similarity (above chance) of later spaces to that of earlier spaces."""
MOVED = 0.5
"""Highest acceptable change of the means of a batch norm by re-estimation, in standard deviations."""
SHRUNK = 1 / 3
"""Lowest acceptable ratio of new to old variances by re-estimation. The highest is its inverse."""


@dataclass(frozen=True)
class Finding:
    """A possible problem of a merge.

    Attributes:
        kind: the kind of problem.
        message: the measurement, and a suggestion.
    """

    kind: Kind
    message: str

    def __str__(self) -> str:
        return self.message


def diagnose(spaces: Sequence[SpaceReport], models: Sequence[str], shifts: Mapping[str, NormShift]) -> list[Finding]:
    """Find likely causes of low accuracy; see :meth:`MergeReport.diagnose`.

    Args:
        spaces: the measurements of every space, in the order of the network.
        models: the names of the models.
        shifts: the change of each batch norm by re-estimation.
    """
    measured = [space for space in spaces if not math.isnan(space.similarity)]
    return [
        *_find_chance(measured),
        *_find_few_samples(measured, len(models)),
        *_find_dead(spaces, models),
        *_find_crowded(measured, models),
        *_find_collapse(measured),
        *_find_far_norms(shifts),
    ]


def _find_chance(spaces: Sequence[SpaceReport]) -> Iterator[Finding]:
    random = [space for space in spaces if _is_random(space)]
    if random:
        mean, chance = _mean([space.similarity for space in random]), _mean([space.chance for space in random])
        yield Finding(
            "chance",
            f"{len(random)} of {len(spaces)} measured spaces are matched no better than at random "
            f"({_listed([space.name for space in random])}): their mean similarity is {mean:.2f}, and that of a random "
            f"matching is {chance:.2f}. Match features by activation: matcher=GreedyZip() or Permute().",
        )


def _is_random(space: SpaceReport) -> bool:
    """Whether a space is matched no better than at random; False if the similarity at random is unknown."""
    return space.similarity < SIMILAR and space.similarity < space.chance + DEVIATIONS * space.deviation


def noise_of(samples: int, features: int) -> float:
    """Compute the highest correlation of a feature with n independent features that is due to noise (median).

    Example:
        >>> round(noise_of(samples=100, features=128), 2)
        0.25
    """
    return min(1.0, NormalDist().inv_cdf(0.5 ** (1 / features)) / math.sqrt(samples))


def _find_few_samples(spaces: Sequence[SpaceReport], num_models: int) -> Iterator[Finding]:
    few = [
        space
        for space in spaces
        if space.samples
        and (
            space.samples < num_models * space.size
            or (not _is_random(space) and noise_of(space.samples, num_models * space.size) > NOISE * space.similarity)
        )
    ]
    if few:
        worst = min(few, key=lambda space: space.samples / space.size)
        features = num_models * worst.size
        yield Finding(
            "samples",
            f"{len(few)} of {len(spaces)} measured spaces have too little calibration data "
            f"({_listed([space.name for space in few])}): `{worst.name}` has {worst.samples} samples for {features} "
            f"features. Noise causes correlations of {noise_of(worst.samples, features):.2f}, and the matched "
            f"similarity is {worst.similarity:.2f}. Use more calibration data.",
        )


def _find_dead(spaces: Sequence[SpaceReport], models: Sequence[str]) -> Iterator[Finding]:
    for index, model in enumerate(models):
        dead = {space.name: (space.dead[index], space.size) for space in spaces if space.dead}
        dead = {name: (count, size) for name, (count, size) in dead.items() if count > DEAD * size}
        if dead:
            worst = max(dead, key=lambda name: dead[name][0] / dead[name][1])
            count, size = dead[worst]
            yield Finding(
                "dead",
                f"{count} of {size} features of model {model!r} in `{worst}` are constant on the calibration data, so "
                f"they cannot be matched. In {len(dead)} of {len(spaces)} spaces, more than {DEAD:.0%} of the features "
                "are constant. Calibrate with data of every task. If the features are still constant, a width below 1 "
                "removes them.",
            )


def _find_crowded(spaces: Sequence[SpaceReport], models: Sequence[str]) -> Iterator[Finding]:
    known = [space.losses for space in spaces if len(space.losses) == len(models) > 1]
    if not known:
        return
    losses = dict(zip(models, map(_mean, zip(*known, strict=True)), strict=True))
    most, least = max(losses, key=losses.__getitem__), min(losses, key=losses.__getitem__)
    if losses[most] > CROWDED * losses[least] and losses[most] > losses[least] + LOST:
        yield Finding(
            "crowded",
            f"The features of model {most!r} are crowded out: merging loses {losses[most]:.0%} of their variance, but "
            f"only {losses[least]:.0%} of the variance of model {least!r}. Calibrate with data of every task, and "
            "increase the width: width=1.2.",
        )


def _find_collapse(spaces: Sequence[SpaceReport]) -> Iterator[Finding]:
    above = [space.similarity - (0.0 if math.isnan(space.chance) else space.chance) for space in spaces]
    drops = {depth: _mean(above[:depth]) - _mean(above[depth:]) for depth in range(1, len(above))}
    if not drops:
        return
    depth = max(drops, key=drops.__getitem__)
    before, after = above[:depth], above[depth:]
    if _mean(after) < COLLAPSE * _mean(before) and max(after) < min(before):
        stop_at = _last_before(spaces[depth - 1].name, spaces[depth].name)
        similarities = [[space.similarity for space in part] for part in (spaces[:depth], spaces[depth:])]
        yield Finding(
            "collapse",
            f"From `{spaces[depth].name}` on, the models have little in common: the mean matched similarity is "
            f"{_mean(similarities[1]):.2f}, and {_mean(similarities[0]):.2f} before it. Merge only the layers before "
            f'it: stop_at="{stop_at}".',
        )


def _last_before(name: str, following: str) -> str:
    """Return the outermost module that contains a module but not the following module.

    Example:
        >>> _last_before("layer2.2.conv1", "layer3.0.conv1")
        'layer2'
    """
    words, others = name.split("."), following.split(".")
    common = 0
    while common < min(len(words), len(others)) - 1 and words[common] == others[common]:
        common += 1
    return ".".join(words[: common + 1])


def _find_far_norms(shifts: Mapping[str, NormShift]) -> Iterator[Finding]:
    far = {
        name: shift for name, shift in shifts.items() if shift.mean > MOVED or not SHRUNK < shift.variance < 1 / SHRUNK
    }
    if far:
        moved = _mean([shift.mean for shift in far.values()])
        ratio = _mean([shift.variance for shift in far.values()])
        yield Finding(
            "norms",
            f"Re-estimation changed the statistics of {len(far)} of {len(shifts)} batch norms strongly "
            f"({_listed(list(far))}): their means moved by {moved:.2f} standard deviations on average, and their "
            f"variances are {ratio:.2f} times the old ones. The merged layers compute other features than the sources, "
            "or the calibration data differs from the training data. Fit the layers to the sources: "
            'refine="least_squares".',
        )


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"{shown}, …" if len(names) > most else shown


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
