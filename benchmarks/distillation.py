"""Train a merged network towards its sources' outputs on the calibration images, and test it after some epochs.

    python benchmarks/distillation.py --data DIR --checkpoints A.pt B.pt --epochs 1 3 10

The merge is "zip + least squares" of ``examples/cifar10.py``. Labels are only used in the test. This is training.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar10 import load_images, load_model

from lightning_zipit import Distillation, JointAccuracy, MultiHeadModule, ZipIt


class Test(Callback):
    """Prints the accuracies of the merged module after some epochs.

    Args:
        classes: the labels of each task's outputs.
        loader: the test images.
        epochs: the numbers of epochs after which to test; 0 is before the training.
    """

    def __init__(self, classes: dict[str, list[int]], loader: DataLoader, epochs: list[int]) -> None:
        self.classes, self.loader, self.epochs = classes, loader, epochs
        self.start = time.perf_counter()

    @torch.no_grad()
    def test(self, merged: MultiHeadModule, epochs: int) -> None:
        metric = JointAccuracy(self.classes)
        merged.eval()
        for images, labels in self.loader:
            metric.update(merged(images), labels)
        found = {name: f"{100 * value.item():.1f}" for name, value in metric.compute().items()}
        print(f"epochs {epochs}: {found}, {time.perf_counter() - self.start:.0f} s", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distillation)
        if trainer.current_epoch + 1 in self.epochs:
            self.test(pl_module.merged, trainer.current_epoch + 1)
            pl_module.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="two or more trained networks")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3, 10], help="test after these numbers of epochs")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of AdamW")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(0, verbose=False)
    loaded = {path.stem: load_model(path) for path in arguments.checkpoints}
    models = {task: model for task, (model, _) in loaded.items()}
    images = load_images(arguments.data / "train", arguments.images)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    merged = ZipIt(Trainer(**options)).merge(models, DataLoader(images, 100), backbone="net")
    test = Test(
        {task: classes for task, (_, classes) in loaded.items()},
        DataLoader(load_images(arguments.data / "test", arguments.test_images), 500),
        arguments.epochs,
    )
    test.test(merged, 0)
    training = Trainer(**options, enable_checkpointing=False, max_epochs=max(arguments.epochs), callbacks=[test])
    module = Distillation(merged, models, optimizer=lambda parameters: torch.optim.AdamW(parameters, arguments.rate))
    training.fit(module, DataLoader(images, 50, shuffle=True))


if __name__ == "__main__":
    main()
