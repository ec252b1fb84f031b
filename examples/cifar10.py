"""Merge two ResNet-20s that were trained on disjoint halves of CIFAR-10.

    python examples/cifar10.py --data DIR --checkpoints A.pt B.pt

DIR holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. A checkpoint is a dict with ``classes`` (the CIFAR-10 labels
of the head's outputs), ``width`` and ``state_dict``. Calibration uses the first 1500 images of a fixed permutation of
the training images. The test uses the first 5000 images of a fixed permutation of the test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comparison import compare, plot, print_table
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from lightning_zipit.matchers import CCA, Agglomerative, Average, DualSpace, GreedyZip, KMeans, Permute, WeightMatching

MEAN = torch.tensor([125.307, 122.961, 113.8575]).reshape(3, 1, 1) / 255
DEVIATION = torch.tensor([51.5865, 50.847, 51.255]).reshape(3, 1, 1) / 255


METHODS = {
    "average": {"matcher": Average(), "refine": "batch_norm"},
    "permute": {"matcher": Permute(), "refine": "batch_norm"},
    "zip": {"matcher": GreedyZip(), "refine": "batch_norm"},
    "permute + least squares": {"matcher": Permute(), "refine": "least_squares"},
    "zip + least squares": {"matcher": GreedyZip(), "refine": "least_squares"},
}
OTHERS = {
    "zip(0.3, 0.125)": {"matcher": GreedyZip(alpha=0.3, beta=0.125), "refine": "batch_norm"},
    "zip, absolute": {"matcher": GreedyZip(), "similarity": "absolute", "refine": "batch_norm"},
    "zip, cosine": {"matcher": GreedyZip(), "similarity": "cosine", "refine": "batch_norm"},
    "zip, covariance": {"matcher": GreedyZip(), "similarity": "covariance", "refine": "batch_norm"},
    "weights": {"matcher": WeightMatching(), "refine": "batch_norm"},
    "dual space": {"matcher": DualSpace(), "refine": "batch_norm"},
    "dual space, zip": {"matcher": DualSpace(matcher=GreedyZip()), "refine": "batch_norm"},
    "k-means": {"matcher": KMeans(), "refine": "batch_norm"},
    "agglomerative": {"matcher": Agglomerative(), "refine": "batch_norm"},
    "cca": {"matcher": CCA(), "refine": "batch_norm"},
    "average + least squares": {"matcher": Average(), "refine": "least_squares"},
    "weights + least squares": {"matcher": WeightMatching(), "refine": "least_squares"},
    "dual space + least squares": {"matcher": DualSpace(), "refine": "least_squares"},
    "dual space, zip + least squares": {"matcher": DualSpace(matcher=GreedyZip()), "refine": "least_squares"},
    "k-means + least squares": {"matcher": KMeans(), "refine": "least_squares"},
    "agglomerative + least squares": {"matcher": Agglomerative(), "refine": "least_squares"},
    "cca + least squares": {"matcher": CCA(), "refine": "least_squares"},
}


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of the ZipIt paper: three stages of three basic blocks."""

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = [int(base * width) for base in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.layer1 = self._stage(channels[0], channels[0], 1)
        self.layer2 = self._stage(channels[0], channels[1], 2)
        self.layer3 = self._stage(channels[1], channels[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[2], num_classes)

    def _stage(self, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1), BasicBlock(outputs, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


class LitResNet20(LightningModule):
    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = ResNet20(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def load_model(path: Path) -> tuple[LitResNet20, list[int]]:
    """Load a trained module, and the CIFAR-10 labels of its outputs."""
    content = torch.load(path, weights_only=True)
    model = LitResNet20(content["width"], len(content["classes"]))
    model.net.load_state_dict(content["state_dict"])
    return model.eval(), list(content["classes"])


def load_images(folder: Path, count: int) -> TensorDataset:
    """Load the first images of a fixed permutation, normalised, with their labels."""
    files = ImageFolder(str(folder))
    chosen = np.random.RandomState(0).permutation(len(files))[:count]
    images, labels = zip(*(files[index] for index in chosen), strict=True)
    pixels = torch.stack([pil_to_tensor(image) for image in images]).float() / 255
    return TensorDataset((pixels - MEAN) / DEVIATION, torch.tensor(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="two or more trained networks")
    parser.add_argument("--stop-at", nargs="+", default=["none", "layer2", "layer1"], help="the trunk's last module")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *OTHERS], default=list(METHODS))
    parser.add_argument(
        "--widths", nargs="+", type=float, default=[1.0], help="ratios of the trunk's width to one network's"
    )
    parser.add_argument("--flops", nargs="*", type=float, default=[], help="budgets, as ratios to one network's FLOPs")
    parser.add_argument("--calibration-images", type=int, default=1500)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--plot", type=Path, help="write joint accuracy over cost to this image file")
    arguments = parser.parse_args()

    tasks = [path.stem for path in arguments.checkpoints]
    loaded = [load_model(path) for path in arguments.checkpoints]
    models = {task: model for task, (model, _) in zip(tasks, loaded, strict=True)}
    classes = {task: labels for task, (_, labels) in zip(tasks, loaded, strict=True)}
    calibration = load_images(arguments.data / "train", arguments.calibration_images)
    test = load_images(arguments.data / "test", arguments.test_images)
    merges = {
        f"{name}, {stop_at or 'all layers'}{f', width {width:g}' * (width != 1)}": (METHODS | OTHERS)[name]
        | {"stop_at": stop_at, "width": width}
        for stop_at in (None if name == "none" else name for name in arguments.stop_at)
        for name in arguments.methods
        for width in arguments.widths
    }
    merges |= {
        f"{name}, auto, width for {budget:g} × FLOPs": (METHODS | OTHERS)[name]
        | {"stop_at": "auto", "width": "auto", "flops": budget}
        for name in arguments.methods
        for budget in arguments.flops
    }
    # One loader for both tasks: the calibration images contain all classes.
    rows = compare(models, classes, merges, DataLoader(calibration, 100), list(DataLoader(test, 500)), backbone="net")
    title = "CIFAR-10: two ResNet-20s, merged without training"
    print_table(title, rows, tasks)
    if arguments.plot:
        plot(title, rows, arguments.plot)


if __name__ == "__main__":
    main()
