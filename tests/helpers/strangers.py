"""A user's project whose checkpoints are handed to strangers, and what these write into them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from helpers.nets import images

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
INSTANTIATE = "lightning.pytorch.cli.instantiate_module"


class Part(nn.Module):
    """A network of the user's that an argument may name."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class Lit(LightningModule):
    """A module of the user's whose arguments say little of what they are."""

    def __init__(self, net: nn.Module | None = None, extra=None, act: Callable | None = None, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(net or Part(width), nn.Conv2d(width, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.extra, self.act = extra, act

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self(batch[0]).mean())

    def training_step(self, batch, batch_idx):
        return self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    test_step = validation_step


class Data(LightningDataModule):
    def train_dataloader(self):
        return images(count=16, size=8)

    def val_dataloader(self):
        return [images(count=8, size=8) for _ in range(2)]

    test_dataloader = predict_dataloader = val_dataloader


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def spec(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}
