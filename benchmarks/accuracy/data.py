"""Image data sets in memory, with fixed splits."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import DEVIATION, MEAN
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@dataclass(frozen=True)
class Images:
    """Images as stored on disk, and their labels.

    Attributes:
        pixels: uint8 ``(n, 3, 32, 32)``.
        labels: int64 ``(n,)``.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor | slice) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])

    def of(self, classes: Sequence[int]) -> Images:
        """Return the images of some classes. A label is the index of its class in ``classes``."""
        place = torch.full((1 + max(*classes, int(self.labels.max())),), -1)
        place[list(classes)] = torch.arange(len(classes))
        own = self[place[self.labels] >= 0]
        return Images(own.pixels, place[own.labels])


@dataclass(frozen=True)
class Split:
    """The images of one data set by their use.

    Attributes:
        classes: the names of the labels.
        train: training images of the sources; they include ``calibration``.
        calibration: the first images of a fixed permutation of the training images; labels are not used.
        held_out: images to choose settings on; no network is trained or calibrated on them.
        test: the first images of a fixed permutation of the test images.
    """

    classes: tuple[str, ...]
    train: Images
    calibration: Images
    held_out: Images
    test: Images

    @classmethod
    def of(cls, classes: Sequence[str], train: Images, test: Images, counts: tuple[int, int, int]) -> Split:
        """Split by fixed permutations; ``counts`` are the calibration, held-out and test images."""
        calibration, held_out, tested = counts
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(train)))
        chosen = torch.from_numpy(np.random.RandomState(0).permutation(len(test)))[:tested]
        aside = slice(calibration, calibration + held_out)
        kept = torch.cat([order[:calibration], order[aside.stop :]])
        return cls(tuple(classes), train[kept], train[order[:calibration]], train[order[aside]], test[chosen])


class Batches(Dataset):
    """Normalised batches of images, by indices; ``augment`` flips and shifts each image at random."""

    def __init__(self, images: Images, augment: bool = False) -> None:
        self.images = images
        self.augment = augment

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        pixels, labels = self.images.pixels[indices], self.images.labels[indices]
        if self.augment:
            pixels = shifted(flipped(pixels))
        x = (pixels.float() / 255 - MEAN) / DEVIATION
        return x.contiguous(memory_format=torch.channels_last), labels

    def loader(self, batch_size: int, seed: int | None = None) -> DataLoader:
        """Return a loader in order. With a seed, shuffle and drop the last incomplete batch."""
        order: RandomSampler | SequentialSampler = SequentialSampler(self.images.labels)
        if seed is not None:
            order = RandomSampler(self.images.labels, generator=torch.Generator().manual_seed(seed))
        return DataLoader(self, sampler=BatchSampler(order, batch_size, drop_last=seed is not None), batch_size=None)


def flipped(pixels: Tensor) -> Tensor:
    """Mirror half of the images at random."""
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)


def shifted(pixels: Tensor, most: int = 4) -> Tensor:
    """Shift each image at random by up to ``most`` pixels in both axes, and pad it with black."""
    n, _, height, width = pixels.shape
    padded = F.pad(pixels, (most,) * 4).permute(0, 2, 3, 1)  # (n, height, width, channels)
    rows = torch.randint(0, 2 * most + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * most + 1, (n, 1)) + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_folder(folder: Path, cache: Path) -> tuple[tuple[str, ...], Images]:
    """Load the classes and images of a folder with ``CLASS/*.jpg``; ``cache`` keeps the decoded images."""
    files = ImageFolder(str(folder))
    key = hashlib.blake2b(f"{folder.resolve()} {len(files)}".encode(), digest_size=6).hexdigest()
    kept = cache / f"images-{key}.pt"
    if not kept.exists():
        pixels = torch.stack([pil_to_tensor(image) for image, _ in files])
        save({"pixels": pixels, "labels": torch.tensor(files.targets)}, kept)
    return tuple(files.classes), Images(**torch.load(kept, weights_only=True))


def load_fashion(folder: Path, part: str) -> Images:
    """Load Fashion-MNIST (``part`` "train" or "t10k") from idx files as 32 × 32 images with three equal channels."""
    grey = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    pixels = F.pad(torch.from_numpy(grey), (2,) * 4)[:, None].expand(-1, 3, -1, -1).contiguous()
    return Images(pixels, torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz")).long())


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file: two zeros, the type, the number of axes, their sizes as big-endian int32, the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes. Download it again, or give another folder (--fashion)."
        )
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def save(content: object, path: Path) -> None:
    """Save with ``torch.save``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_suffix(".part")
    torch.save(content, partly)
    partly.replace(path)
