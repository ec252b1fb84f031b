"""Merge two networks that were fine-tuned from one checkpoint: by index, by activation, and by their weight changes.

    python benchmarks/finetuned.py --data DIR --checkpoint A.pt

The checkpoint (see ``examples/cifar10.py``) is fine-tuned twice, on the first and on the last five classes of CIFAR-10,
each time with a new last layer. ``--cache`` keeps both networks. They are then merged by several methods.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar10 import LitResNet20, load_images, load_model
from comparison import compare, print_table

from lightning_zipit.matchers import Average, GreedyZip, Permute
from lightning_zipit.task_vectors import Dare, TaskArithmetic, Ties

TASKS = {"first": [0, 1, 2, 3, 4], "last": [5, 6, 7, 8, 9]}


def fine_tune(base: LitResNet20, data: TensorDataset, classes: list[int], epochs: int, rate: float) -> LitResNet20:
    """Fine-tune on the images of some classes, with a new last layer, flips, and a decaying learning rate."""
    torch.manual_seed(classes[0])
    model = copy.deepcopy(base).train()
    model.net.linear = nn.Linear(model.net.linear.in_features, len(classes))
    images, labels = data.tensors
    chosen = torch.isin(labels, torch.tensor(classes))
    own = TensorDataset(images[chosen], torch.searchsorted(torch.tensor(classes), labels[chosen]))
    loader = DataLoader(own, 100, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint to fine-tune")
    parser.add_argument("--cache", type=Path, default=Path("finetuned.pt"))
    parser.add_argument("--images", type=int, default=20_000, help="training images of all classes together")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.05, help="the highest learning rate")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    base, _ = load_model(arguments.checkpoint)
    if arguments.cache.exists():
        models = {}
        for task, states in torch.load(arguments.cache, weights_only=True).items():
            models[task] = LitResNet20(base.hparams["width"], len(TASKS[task])).eval()
            models[task].load_state_dict(states)
    else:
        data = load_images(arguments.data / "train", arguments.images)
        models = {
            task: fine_tune(base, data, classes, arguments.epochs, arguments.rate) for task, classes in TASKS.items()
        }
        torch.save({task: model.state_dict() for task, model in models.items()}, arguments.cache)
    calibration = load_images(arguments.data / "train", 1500)
    test = load_images(arguments.data / "test", 5000)
    merges: dict[str, dict[str, Any]] = {
        f"{name}{' + least squares' * (refine == 'least_squares')}": {"matcher": matcher, "refine": refine}
        for refine in ("batch_norm", "least_squares")
        for name, matcher in {"average": Average(), "permute": Permute(), "zip": GreedyZip()}.items()
    }
    changes = {"task arithmetic": TaskArithmetic(), "TIES": Ties(), "DARE": Dare()}
    for refine in ("batch_norm", "least_squares"):
        for name, combine in changes.items():
            how = {"base": base, "combine": combine, "refine": refine}
            merges[f"{name}{' + least squares' * (refine == 'least_squares')}"] = how
    rows = compare(models, TASKS, merges, DataLoader(calibration, 100), list(DataLoader(test, 500)), backbone="net")
    print_table("CIFAR-10: two ResNet-20s that were fine-tuned from one", rows, list(models))


if __name__ == "__main__":
    main()
