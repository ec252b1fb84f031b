"""Train two small CNNs on different digits from different seeds, and merge them without training.

    python examples/digits.py

Model A learns the digits 0-4 and model B the digits 5-9 of scikit-learn's handwritten digits (8×8 pixels). The merged
network classifies all ten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import compare, plot, print_table, quiet_trainer
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_zipit.matchers import Average, GreedyZip, Permute

CLASSES = {"A": [0, 1, 2, 3, 4], "B": [5, 6, 7, 8, 9]}


class LitDigits(LightningModule):
    """A small CNN with batch norm."""

    def __init__(self, num_classes: int = 5, channels: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        for index, (inputs, outputs, stride) in enumerate(
            [(1, channels, 1), (channels, channels, 1), (channels, 2 * channels, 2), (2 * channels, 2 * channels, 1)], 1
        ):
            block = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )
            self.net.add_module(f"block{index}", block)
        self.net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.net.add_module("classifier", nn.Linear(2 * channels, num_classes))
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)


def load(test: bool) -> TensorDataset:
    """Load the test images (every third) or the training images (all others), with pixels from -1 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    chosen = (torch.arange(len(labels)) % 3 == 0) == test
    return TensorDataset(images[chosen], labels[chosen])


def of_task(data: TensorDataset, task: str) -> TensorDataset:
    """Select the images of one task's digits, labelled 0 to 4."""
    images, labels = data.tensors
    own = torch.isin(labels, torch.tensor(CLASSES[task]))
    return TensorDataset(images[own], labels[own] - CLASSES[task][0])


def train(task: str, seed: int, epochs: int) -> LitDigits:
    """Train a model on the digits of one task."""
    seed_everything(seed, verbose=False)
    model = LitDigits()
    data = of_task(load(test=False), task)
    quiet_trainer(max_epochs=epochs).fit(model, DataLoader(data, 64, shuffle=True))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="write joint accuracy over cost to this image file")
    arguments = parser.parse_args()

    models = {task: train(task, 2 * arguments.seed + offset, arguments.epochs) for offset, task in enumerate(CLASSES)}
    calibration = [DataLoader(of_task(load(test=False), task), 64) for task in CLASSES]
    merges = {
        "weight average": {"matcher": Average(), "refine": "batch_norm"},
        "permute": {"matcher": Permute(), "refine": "batch_norm"},
        "zip": {"matcher": GreedyZip(), "refine": "batch_norm"},
        "zip up to block2": {"matcher": GreedyZip(), "stop_at": "block2", "refine": "batch_norm"},
        "zip + least squares": {"matcher": GreedyZip(), "refine": "least_squares"},
    }
    rows = compare(models, CLASSES, merges, calibration, list(DataLoader(load(test=True), 256)), backbone="net")
    title = "Handwritten digits: A (0-4) and B (5-9)"
    print_table(title, rows, list(CLASSES))
    if arguments.plot:
        plot(title, rows, arguments.plot)


if __name__ == "__main__":
    main()
