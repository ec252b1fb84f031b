"""Trained source networks, cached in files."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar10 import load_model
from comparison import quiet_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from .data import Batches, Split, save
from .experiments import Group, Task
from .networks import Classifier

log = logging.getLogger("accuracy")


@dataclass(frozen=True)
class Training:
    """Training settings: ``rate`` is the highest learning rate of the one cycle."""

    epochs: int
    batch_size: int = 64
    rate: float = 0.1


class Sources:
    """Loads the network of a task, or trains it.

    Args:
        splits: images by data set.
        cache: folder of the checkpoints for these settings and images.
        training: settings for missing networks.
        embeddings: embeddings ``(classes, size)`` of the class names by data set, for text-embedding heads.
    """

    def __init__(
        self, splits: dict[str, Split], cache: Path, training: Training, embeddings: dict[str, torch.Tensor]
    ) -> None:
        self.splits = splits
        self.cache = cache
        self.training = training
        self.embeddings = embeddings

    def path(self, group: Group, task: Task) -> Path:
        heads = "text" if group.text else "ce"
        return self.cache / f"{group.architecture}x{group.width:g}-{heads}-{task.name}.pt"

    def get(self, group: Group, task: Task) -> Classifier:
        """Return the trained network of a task, in eval mode."""
        if task.file is not None:
            ready, _ = load_model(task.file)
            model = Classifier(group.architecture, group.width, len(task.classes))
            model.net.load_state_dict(ready.net.state_dict())
            return model.eval().requires_grad_(False)
        path = self.path(group, task)
        if not path.exists():
            self._train(group, task, path)
        content = torch.load(path, weights_only=True)
        model = Classifier(**content["arguments"])
        model.load_state_dict(content["state_dict"])
        return model.eval().requires_grad_(False)

    def _train(self, group: Group, task: Task, path: Path) -> None:
        """Train a network. An interrupted training resumes after its last complete epoch."""
        images = self.splits[task.data].train.of(task.classes)
        seed_everything(task.seed, verbose=False)
        loader = Batches(images, augment=True).loader(min(self.training.batch_size, len(images)), task.seed)
        arguments = {
            "architecture": group.architecture,
            "width": group.width,
            "num_classes": len(task.classes),
            "embedding": self.embeddings[task.data].shape[1] if group.text else 0,
            "rate": self.training.rate,
            "steps": self.training.epochs * len(loader),
        }
        model = Classifier(**arguments).to(memory_format=torch.channels_last)
        if group.text:
            model.embeddings.copy_(self.embeddings[task.data][list(task.classes)])
        unfinished = ModelCheckpoint(path.parent, f"{path.stem}-unfinished", enable_version_counter=False)
        trainer = quiet_trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed",
            max_epochs=self.training.epochs,
            enable_checkpointing=True,
            callbacks=[unfinished],
        )
        kept = path.with_name(f"{path.stem}-unfinished.ckpt")
        start = time.monotonic()
        trainer.fit(model, loader, ckpt_path=kept if kept.exists() else None, weights_only=True)
        model.cpu()
        save({"arguments": arguments, "state_dict": model.state_dict()}, path)
        kept.unlink(missing_ok=True)
        log.info("trained %s in %.0f s", path.stem, time.monotonic() - start)
