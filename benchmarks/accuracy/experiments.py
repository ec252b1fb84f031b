"""Experiments: groups of network pairs that differ only in seeds and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cifar10 import load_model


@dataclass(frozen=True)
class Task:
    """The task of one network.

    Attributes:
        data: the name of the data set.
        classes: labels of the data set, in the order of the network's outputs.
        seed: seed of the initialisation and of the order of the images.
        file: checkpoint of a trained network, as ``examples/cifar10.py`` reads it.
    """

    data: str
    classes: tuple[int, ...]
    seed: int = 0
    file: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.data}-{''.join(map(str, self.classes))}-s{self.seed}"


@dataclass(frozen=True)
class Pair:
    """Two or more networks to merge.

    Attributes:
        name: the name of the pair in its group.
        tasks: the task of each network, by the letter that names its head.
    """

    name: str
    tasks: dict[str, Task]


@dataclass(frozen=True)
class Group:
    """Pairs whose accuracies are averaged.

    Attributes:
        name: the name on the command line.
        title: the heading of its page.
        architecture: the architecture of all networks.
        width: the width of all networks.
        text: whether the heads are embeddings of the class names instead of logits trained by cross-entropy.
        pairs: the networks to merge.
        paper: the most similar setting of the paper.
    """

    name: str
    title: str
    architecture: str
    width: float
    text: bool
    pairs: tuple[Pair, ...]
    paper: str | None = None


def split_classes(sizes: Sequence[int], seed: int) -> Pair:
    """Assign the ten classes of CIFAR-10 at random to tasks of the given sizes."""
    order = np.random.RandomState(seed).permutation(10).tolist()
    ends = np.cumsum(sizes).tolist()
    parts = [tuple(sorted(order[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
    tasks = {chr(65 + i): Task("cifar10", part, 100 * seed + i) for i, part in enumerate(parts)}
    return Pair(f"seed {seed}", tasks)


def two_data_sets(seed: int) -> Pair:
    """Return a pair of all classes of CIFAR-10 and all classes of Fashion-MNIST."""
    everything = tuple(range(10))
    return Pair(
        f"seed {seed}",
        {"A": Task("cifar10", everything, 100 * seed), "B": Task("fashion", everything, 100 * seed + 1)},
    )


def make_groups(seeds: Sequence[int]) -> dict[str, Group]:
    """Return all groups by name, with a pair for each seed."""
    halves = tuple(split_classes((5, 5), seed) for seed in seeds)
    quarters = tuple(split_classes((3, 3, 2, 2), seed) for seed in seeds)
    mixed = tuple(two_data_sets(seed) for seed in seeds)
    groups = []
    for text, kind, heads in ((False, "ce", "cross-entropy heads"), (True, "text", "text-embedding heads")):
        for width in (1, 2, 4):
            title = f"CIFAR-10 5+5, ResNet-20×{width}, {heads}"
            groups.append(Group(f"resnet20x{width}-{kind}", title, "resnet20", width, text, halves, kind))
        title = f"CIFAR-10 5+5, VGG-11, {heads}"
        groups.append(Group(f"vgg11-{kind}", title, "vgg11", 1, text, halves, None if text else "vgg"))
    title = "CIFAR-10 3+3+2+2, ResNet-20×1, cross-entropy heads"
    groups.append(Group("four-tasks", title, "resnet20", 1, False, quarters))
    title = "CIFAR-10 and Fashion-MNIST, ResNet-20×1, cross-entropy heads"
    groups.append(Group("two-data-sets", title, "resnet20", 1, False, mixed))
    return {group.name: group for group in groups}


def ready_group(files: Sequence[Path]) -> Group:
    """Return a group of one pair: trained ResNet-20s for CIFAR-10 from checkpoints."""
    models = [load_model(file) for file in files]
    tasks = {chr(65 + i): Task("cifar10", tuple(classes), file=files[i]) for i, (_, classes) in enumerate(models)}
    width = models[0][0].hparams["width"]
    title = f"CIFAR-10, ResNet-20×{width:g} from checkpoints, cross-entropy heads"
    return Group("ready", title, "resnet20", width, False, (Pair("+".join(file.stem for file in files), tasks),), "ce")
