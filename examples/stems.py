"""Merge two CNNs with different inputs: each keeps its own stem, and the middle is shared.

    python examples/stems.py

Model A learns the digits 0-4 of scikit-learn's handwritten digits, in one channel. Model B learns the digits 5-9 in
blue ink on white paper, in three channels. Only their first layers have different shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from comparison import Row, evaluate, print_table, quiet_trainer
from digits import CLASSES, LitDigits, load, of_task
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import Ensemble, ZipIt
from lightning_zipit.matchers import GreedyZip, Permute


class LitInk(LitDigits):
    """The same CNN for colour images."""

    def __init__(self, num_classes: int = 5, channels: int = 32) -> None:
        super().__init__(num_classes, channels)
        self.net.get_submodule("block1")[0] = nn.Conv2d(3, channels, 3, padding=1, bias=False)


def in_ink(images: Tensor) -> Tensor:
    """Convert white on black ``(batch, 1, height, width)`` to blue ink on white ``(batch, 3, height, width)``."""
    return torch.cat([-images, -images, 0.6 - 0.4 * images], 1)


def views(batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the input of each model for the same images."""
    return {"A": batch[0], "B": in_ink(batch[0])}


def train(task: str, seed: int, epochs: int) -> LitDigits:
    """Train a model on its view of the digits of one task."""
    seed_everything(seed, verbose=False)
    data = of_task(load(test=False), task)
    images, labels = data.tensors
    model = {"A": LitDigits, "B": LitInk}[task]()
    own = TensorDataset(views([images])[task], labels)
    quiet_trainer(max_epochs=epochs).fit(model, DataLoader(own, 64, shuffle=True))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()

    models = {task: train(task, 2 * arguments.seed + offset, arguments.epochs) for offset, task in enumerate(CLASSES)}
    calibration = [DataLoader(of_task(load(test=False), task), 64) for task in CLASSES]
    test = [(views(batch), batch[1]) for batch in DataLoader(load(test=True), 256)]
    merges: dict[str, dict[str, Any]] = {
        "permute": {"matcher": Permute(), "refine": "batch_norm"},
        "zip": {"matcher": GreedyZip(), "refine": "batch_norm"},
        "zip block2 and block3": {"matcher": GreedyZip(), "stop_at": "block3", "refine": "batch_norm"},
        "zip + least squares": {"matcher": GreedyZip(), "refine": "least_squares"},
    }
    rows, report = [], None
    for name, how in merges.items():
        merged = ZipIt(quiet_trainer()).merge(
            models, dataloaders=calibration, backbone="net", start_at="block2", get_input=views, **how
        )
        report = merged.report
        assert report is not None
        rows.append(Row(name, evaluate(merged, CLASSES, test), report.merged.flops))
    assert report is not None
    singles = []
    for task, model in models.items():
        own = [({task: inputs[task]}, labels) for inputs, labels in test]
        accuracy = evaluate(Ensemble({task: model}, "net").eval(), {task: CLASSES[task]}, own)
        singles.append(Row(f"model {task}", accuracy, report.sources[task].flops))
    everything = evaluate(Ensemble(models, "net").eval(), CLASSES, test)
    rows = [*singles, *rows, Row("ensemble", everything, report.ensemble.flops)]
    print_table("Handwritten digits: A (0-4) and B (5-9, in blue ink)", rows, list(CLASSES))
    print(f"Parameters: merged {report.merged.parameters}, ensemble {report.ensemble.parameters}")


if __name__ == "__main__":
    main()
