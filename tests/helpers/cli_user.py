"""What a user of the command line brings: a LightningModule, a data module and a ``main.py`` of two lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import ZipItCLI


class LitNet(LightningModule):
    """Two convolutions with batch norm.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        self.net.add_module("stem", nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU()))
        self.net.add_module("body", nn.Sequential(nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
        self.net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class UnrecordedNet(LitNet):
    """The same, whose checkpoints do not say how wide it is."""

    def save_hyperparameters(self, *args, **kwargs):
        pass


class SizedNet(LitNet):
    """The same, of a width that has to be given."""

    def __init__(self, width: int):
        super().__init__(width)


class TypedNet(LitNet):
    """The same, with an argument that is an object."""

    def __init__(self, activation: nn.Module, width: int = 4):
        super().__init__(width)
        self.save_hyperparameters()
        self.net.stem[2] = activation


class ScoredNet(LitNet):
    """The same network in another class, with a test of its own."""

    def test_step(self, batch, batch_idx):
        self.log("score", self(batch[0]).mean())


class Data(LightningDataModule):
    """Noise.

    Args:
        batch_size: how many samples make a batch.
    """

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(24, 1, 8, 8, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=self.batch_size, shuffle=True)


class TestedData(Data):
    """Noise to test two tasks with."""

    __test__ = False

    def test_dataloader(self):
        return [self.train_dataloader() for _ in range(2)]

    predict_dataloader = val_dataloader = test_dataloader


class TrainedData(Data):
    """Noise to train two tasks on."""

    def train_dataloader(self):
        return {task: super(TrainedData, self).train_dataloader() for task in ("cats", "dogs")}


class OneLoader(Data):
    """Noise to test one task with."""

    test_dataloader = Data.train_dataloader


if __name__ == "__main__":
    ZipItCLI(LitNet, Data)
