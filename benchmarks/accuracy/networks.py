"""Source networks and their training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from cifar10 import ResNet20
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class VGG11(nn.Module):
    """VGG-11 with batch norm for 32 × 32 images: five stages, each with pooling at its end, and one linear layer."""

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = [int(base * width) for base in (64, 128, 256, 512, 512)]
        self.layer1 = self._stage(3, channels[0], 1)
        self.layer2 = self._stage(channels[0], channels[1], 1)
        self.layer3 = self._stage(channels[1], channels[2], 2)
        self.layer4 = self._stage(channels[2], channels[3], 2)
        self.layer5 = self._stage(channels[3], channels[4], 2)
        self.linear = nn.Linear(channels[4], num_classes)

    def _stage(self, inputs: int, outputs: int, depth: int) -> nn.Sequential:
        sizes = [inputs] + depth * [outputs]
        layers = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(sizes)
        ]
        return nn.Sequential(*layers, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.linear(x.flatten(1))


ARCHITECTURES: dict[str, Callable[[float, int], nn.Module]] = {"resnet20": ResNet20, "vgg11": VGG11}
STAGES: dict[str, dict[str, str | None]] = {
    "resnet20": {"20/20": None, "13/20": "layer2", "7/20": "layer1"},
    "vgg11": {"22/22": None, "7/22": "layer3.0"},
}
"""The cuts of each architecture: the paper's name of the cut → the trunk's last module."""
SCALE = 20.0
"""Factor from cosines to logits. CLIP learns such a factor, from 14 to 100."""


class Classifier(LightningModule):
    """A network for one task.

    Args:
        architecture: one of :data:`ARCHITECTURES`.
        width: multiplier of the numbers of channels.
        num_classes: number of classes of the task.
        embedding: size of the network's output if the logits are cosines with embeddings of the class names, as in the
            paper's experiments with CLIP; 0 if the network's outputs are the logits.
        rate: the highest learning rate.
        steps: total number of training steps.
    """

    embeddings: Tensor

    def __init__(
        self,
        architecture: str,
        width: float,
        num_classes: int,
        embedding: int = 0,
        rate: float = 0.1,
        steps: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = ARCHITECTURES[architecture](width, embedding or num_classes)
        self.register_buffer("embeddings", torch.zeros(num_classes, embedding))

    def logits(self, output: Tensor) -> Tensor:
        """Convert the network's output to the logits of the classes."""
        if not self.hparams["embedding"]:
            return output
        return SCALE * F.normalize(output, dim=-1) @ F.normalize(self.embeddings, dim=-1).T.to(output.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        rate, steps = self.hparams["rate"], self.hparams["steps"]
        optimizer = torch.optim.SGD(self.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
