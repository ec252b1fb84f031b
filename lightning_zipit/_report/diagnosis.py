"""Diagnosis of a merge: what its measurements mean, and what to try."""

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
"""How far above chance a similarity must be, in standard deviations of a random matching."""
ALIKE = 0.9
"""Similarity from which features are so alike that any matching is good."""
NOISE = 0.5
"""Ratio of a matched similarity that may be noise."""
DEAD = 0.1
"""Ratio of a model's features of a space that may be constant."""
CROWDED = 1.5
"""Ratio of the losses of two models that is acceptable, unless they differ by less than LOST of the variance."""
LOST = 0.1
COLLAPSE = 0.5
"""Ratio of the similarity (above chance) of earlier spaces that later spaces must have."""
MOVED = 0.5
"""Standard deviations by which re-estimation may move the means of a batch norm."""
SHRUNK = 1 / 3
"""Lowest ratio, and inverse of the highest, by which re-estimation may change variances."""


@dataclass(frozen=True)
class Finding:
    """A problem that a merge may have.

    Attributes:
        kind: the kind of problem.
        message: what was measured, and what to try.
    """

    kind: Kind
    message: str

    def __str__(self) -> str:
        return self.message


def diagnose(spaces: Sequence[SpaceReport], models: Sequence[str], shifts: Mapping[str, NormShift]) -> list[Finding]:
    """Find what is likely to cost accuracy; see :meth:`MergeReport.diagnose`.

    Args:
        spaces: the matching of every space, in the order of the network.
        models: the names of the models.
        shifts: how far re-estimation moved each batch norm.
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
            f"({_listed([space.name for space in random])}): the similarity is {mean:.2f} on average, a random "
            f"matching's {chance:.2f}. Match features by activation: matcher=GreedyZip() or Permute().",
        )


def _is_random(space: SpaceReport) -> bool:
    """Whether a space is matched no better than at random; False if chance is not known."""
    return space.similarity < ALIKE and space.similarity < space.chance + DEVIATIONS * space.deviation


def noise_of(samples: int, features: int) -> float:
    """The highest correlation of a feature with n independent ones that noise gives: the median over draws.

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
            f"There is too little calibration data for {len(few)} of {len(spaces)} measured spaces "
            f"({_listed([space.name for space in few])}): `{worst.name}` has {worst.samples} samples for {features} "
            f"features, so that noise alone gives correlations of {noise_of(worst.samples, features):.2f}, and the "
            f"matched similarity is {worst.similarity:.2f}. Give more calibration data.",
        )


def _find_dead(spaces: Sequence[SpaceReport], models: Sequence[str]) -> Iterator[Finding]:
    for number, model in enumerate(models):
        dead = {space.name: (space.dead[number], space.size) for space in spaces if space.dead}
        dead = {name: (count, size) for name, (count, size) in dead.items() if count > DEAD * size}
        if dead:
            worst = max(dead, key=lambda name: dead[name][0] / dead[name][1])
            count, size = dead[worst]
            yield Finding(
                "dead",
                f"{count} of {size} features of model {model!r} in `{worst}` are constant on the calibration data, and "
                f"more than {DEAD:.0%} in {len(dead)} of {len(spaces)} spaces: they cannot be matched. "
                "Calibrate with data of every task. If they are constant there too, a width below 1 leaves them out.",
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
            f"The features of model {most!r} are crowded out: merging loses {losses[most]:.0%} of their variance, and "
            f"{losses[least]:.0%} of model {least!r}'s. Calibrate with data of every task, and give the features more "
            "room: width=1.2.",
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
            f"From `{spaces[depth].name}` on, the models have little in common: the matched similarity is "
            f"{_mean(similarities[1]):.2f} on average, and {_mean(similarities[0]):.2f} before. Share the network up "
            f'to there: stop_at="{stop_at}".',
        )


def _last_before(name: str, following: str) -> str:
    """The outermost module around one module that is not around the following one.

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
            f"{len(far)} of {len(shifts)} batch norms were far from the sources' before re-estimation "
            f"({_listed(list(far))}): their means moved by {moved:.2f} deviations on average, and their variances are "
            f"{ratio:.2f} of what they were. Layers give other features than the sources', or the calibration data is "
            'of another kind than the training data: refine="least_squares" fits the layers.',
        )


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"{shown}, …" if len(names) > most else shown


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
