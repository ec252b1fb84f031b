"""A LightningCLI project: a model, a data module, and a command line with ``merge``.

python main.py fit --config fit.yaml --data.task low
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_zipit import ZipItCLI

TASKS = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}


class LitDigits(LightningModule):
    """A small CNN with batch norm.

    Args:
        num_classes: number of digits.
        channels: width of the first two layers; the others have twice as many.
        lr: learning rate.
    """

    def __init__(self, num_classes: int, channels: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        for index, (inputs, outputs, stride) in enumerate(
            [(1, channels, 1), (channels, channels, 1), (channels, 2 * channels, 2), (2 * channels, 2 * channels, 1)], 1
        ):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.net.add_module(f"block{index}", nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()))
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
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=1e-2)


class Digits(LightningDataModule):
    """Handwritten digits of scikit-learn, 8×8 pixels. Every third one is a test image.

    Args:
        task: "low" for the digits 0-4, "high" for 5-9; both tasks by default, with a test loader for each.
        batch_size: images per batch.
    """

    def __init__(self, task: str | None = None, batch_size: int = 64) -> None:
        super().__init__()
        self.tasks = list(TASKS) if task is None else [task]
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        self.labels = torch.tensor(digits.target)

    def select(self, tasks: list[str], test: bool) -> TensorDataset:
        """Select the images of some tasks; the labels of each task start at 0."""
        classes = torch.tensor([digit for task in tasks for digit in TASKS[task]])
        chosen = torch.isin(self.labels, classes) & ((torch.arange(len(self.labels)) % 3 == 0) == test)
        return TensorDataset(self.images[chosen], self.labels[chosen] % 5)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.select(self.tasks, test=False), self.batch_size, shuffle=True)

    def calibration_dataloader(self) -> list[DataLoader]:
        """Return the calibration data of ``merge``, one loader per task; labels are not used."""
        return [DataLoader(self.select([task], test=False), self.batch_size) for task in self.tasks]

    def test_dataloader(self) -> list[DataLoader]:
        return [DataLoader(self.select([task], test=True), self.batch_size) for task in self.tasks]


if __name__ == "__main__":
    ZipItCLI(LitDigits, Digits, save_config_kwargs={"overwrite": True})
