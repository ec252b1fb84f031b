"""Merge pairs by all matchers and refinements, and measure the accuracy."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import evaluate, quiet_trainer
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import Ensemble, MergeSettings, ZipIt
from lightning_zipit._calibration.fingerprint import fingerprint
from lightning_zipit._merging.cost import measure_cost
from lightning_zipit.matchers import (
    CCA,
    Agglomerative,
    Average,
    CycleConsistent,
    DualSpace,
    GreedyZip,
    KMeans,
    Matcher,
    Optimal,
    Permute,
    WeightMatching,
)

from .data import Batches, Images, Split
from .experiments import Group, Pair
from .networks import STAGES, Classifier
from .results import Results, Row

MATCHERS: dict[str, list[Matcher]] = {
    "average": [Average()],
    "permute": [Permute()],
    "zip": [GreedyZip(0.1, 1.0), GreedyZip(1.0, 1.0), GreedyZip(0.3, 0.125), GreedyZip(0.5, 1.0)],
    "optimal": [Optimal()],
    "k-means": [KMeans()],
    "agglomerative": [Agglomerative()],
    "weights": [WeightMatching()],
    "cca": [CCA(1.0), CCA(0.1), CCA(10.0)],
    "dual space": [DualSpace(0.3), DualSpace(0.5), DualSpace(0.7)],
    "dual space, zip": [DualSpace(tau, GreedyZip()) for tau in (0.3, 0.5, 0.7)],
    "cycle-consistent": [CycleConsistent()],
}
"""Candidate settings of each matcher, by its name in the tables."""
REFINEMENTS: dict[str, str | None] = {name: name for name in ("batch_norm", "least_squares", "repair")} | {"none": None}
ENSEMBLE = "ensemble"


def settings_of(name: str, count: int, most: int | None = None) -> list[Matcher]:
    """Return at most ``most`` settings of a matcher that apply to ``count`` models."""
    if (name == "optimal" and count > 2) or (name == "cycle-consistent" and count == 2):
        return []  # optimal supports two models; for two models, cycle-consistent equals permute
    return MATCHERS[name][:most]


@dataclass(frozen=True)
class Ways:
    """The merges to run: names of matchers, refinements and stages, and the number of settings of each matcher."""

    matchers: Sequence[str]
    refinements: Sequence[str]
    stages: Sequence[str]
    settings: int | None = None

    def of(self, group: Group, count: int) -> Iterator[tuple[str, str, str, Matcher]]:
        """Yield stage, refinement, and name and setting of the matcher for each merge of ``count`` models."""
        for stage in STAGES[group.architecture]:
            for refine in self.refinements:
                for name in self.matchers:
                    for matcher in settings_of(name, count, self.settings):
                        if stage in self.stages:
                            yield stage, refine, name, matcher


class Bench:
    """Merges and evaluates one pair.

    Args:
        group: the group of the pair.
        pair: the networks to merge.
        models: the trained networks by task.
        splits: images by data set.
        cache: a folder for statistics.
    """

    def __init__(
        self, group: Group, pair: Pair, models: Mapping[str, Classifier], splits: Mapping[str, Split], cache: Path
    ) -> None:
        self.group, self.pair, self.models = group, pair, models
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.offsets, end = {}, 0
        for name in dict.fromkeys(task.data for task in pair.tasks.values()):
            self.offsets[name], end = end, end + len(splits[name].classes)
        self.classes = {
            letter: [self.offsets[task.data] + label for label in task.classes] for letter, task in pair.tasks.items()
        }
        self.splits = splits
        prints = "".join(map(fingerprint, models.values()))
        self.digest = hashlib.blake2b(prints.encode(), digest_size=6).hexdigest()
        self.cache = cache
        self._loaded: dict[str, Images] = {}

    def images(self, part: str) -> Images:
        """Return the images of all classes of all tasks, with global labels."""
        if part not in self._loaded:
            found = [getattr(self.splits[name], part) for name in self.offsets]
            labels = torch.cat(
                [images.labels + offset for images, offset in zip(found, self.offsets.values(), strict=True)]
            )
            everything = Images(torch.cat([images.pixels for images in found]), labels)
            known = torch.tensor([label for labels in self.classes.values() for label in labels])
            self._loaded[part] = everything[torch.isin(labels, known)]
        return self._loaded[part]

    def run(self, ways: Ways, results: Results) -> Iterator[Row]:
        """Run every merge without a row in ``results``; yield its row."""
        ensemble = (self.group.name, self.pair.name, self.digest, "", ENSEMBLE, "", "")
        if ensemble not in results.rows:
            yield self._row(ensemble, lambda: Ensemble(self.models, "net").eval())
        for stage, refine, name, matcher in ways.of(self.group, len(self.models)):
            setting = repr(matcher) if len(MATCHERS[name]) > 1 else ""
            key = (self.group.name, self.pair.name, self.digest, stage, name, setting, refine)
            if key not in results.rows:
                yield self._row(key, lambda: self._merge(stage, refine, matcher))  # noqa: B023 (called at once)

    def _merge(self, stage: str, refine: str, matcher: Matcher) -> LightningModule:
        how = MergeSettings(STAGES[self.group.architecture][stage], matcher, REFINEMENTS[refine])
        measured = "before" if how.before_activations else "behind"  # the activation functions
        statistics = self.cache / f"{self.digest}-{stage.replace('/', 'of')}-{measured}.safetensors"
        statistics.parent.mkdir(parents=True, exist_ok=True)
        images, labels = Batches(self.images("calibration"))[slice(None)]
        return ZipIt(quiet_trainer(accelerator="auto", devices=1)).merge(
            self.models,
            DataLoader(TensorDataset(images, labels), 100),  # one loader: the images contain the classes of all tasks
            backbone="net",
            stop_at=how.stop_at,
            matcher=how.matcher,
            refine=how.refine,
            statistics=statistics,
        )

    def _row(self, key: tuple[str, ...], make: Any) -> Row:
        start = time.monotonic()
        network = make()
        cost = measure_cost(network.cpu(), torch.zeros(1, 3, 32, 32))
        network = Logits(network.to(self.device, memory_format=torch.channels_last), self.models)
        has_settings = bool(key[5])
        held = self._evaluate(network, "held_out") if has_settings else dict.fromkeys(("joint", "mean"), math.nan)
        tested = self._evaluate(network, "test")
        tasks = " ".join(f"{task}={tested[task]:.1f}" for task in self.classes)
        accuracies = [round(value, 3) for value in (held["joint"], held["mean"], tested["joint"], tested["mean"])]
        return Row(*key, *accuracies, tasks, cost.flops, cost.parameters, round(time.monotonic() - start, 1))

    def _evaluate(self, network: Any, part: str) -> dict[str, float]:
        batches: Iterable[tuple[Tensor, Tensor]] = (
            (images.to(self.device), labels) for images, labels in Batches(self.images(part)).loader(500)
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            return evaluate(network, self.classes, batches)


class Logits:
    """A network that returns the logits of its heads on the CPU."""

    def __init__(self, network: LightningModule, models: Mapping[str, Classifier]) -> None:
        self.network, self.models = network, models

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.network(images)
        return {task: self.models[task].logits(output.float().cpu()) for task, output in outputs.items()}
