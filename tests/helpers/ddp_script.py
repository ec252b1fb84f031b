"""Started by Lightning on two ranks: merges, sweeps and tests, whose results each rank saves in a folder.

The arguments are the folder, and ``more`` for what nightly tests look at.
"""

import os
import sys

import optuna
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from helpers.ddp import CLASSES, classified, loaders, merge, models
from helpers.nets import images, trainer
from lightning_zipit import JointAccuracy, Range, ZipIt
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.refine import LeastSquares

OUT, RANK = sys.argv[1], int(os.environ.get("LOCAL_RANK", "0"))


def run(**arguments):
    return trainer(devices=2, strategy="ddp", **arguments)


def save(content, name):
    torch.save(content, f"{OUT}/{name}-{RANK}.pt")


def print_error(error):
    print(f"rank {RANK}: {error}", file=sys.stderr)


def save_merges():
    merged = merge(run(), 2, f"{OUT}/two.safetensors")
    save({"state": merged.state_dict(), "spaces": [vars(space) for space in merged.report.spaces]}, "2")
    save(merge(run(), 2, refine=LeastSquares(positions=9)).state_dict(), "fitted")


def save_more_merges():
    save(merge(run(), 2, start_at="bn1").state_dict(), "stems")
    merge(run(precision="64-true"), 2, f"{OUT}/two-64.safetensors")
    merged = merge(run(), 2, f"{OUT}/two.safetensors")
    again = merge(run(), 2, f"{OUT}/two.safetensors")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in merged.state_dict().items())
    return merged


def sweep(**settings):
    validation = [images(16), images(16)]
    return ZipIt(run()).sweep(
        models(), loaders(2), val_dataloaders=validation, backbone="net", metric="val_acc", **settings
    )


def save_sweep():
    classes = {"a": range(5), "b": range(5, 12)}
    swept = sweep(classes=classes, refine=[None, "batch_norm"], results=f"{OUT}/swept.csv")
    save([(row.metrics, row.flops) for row in (swept.ensemble, *swept.rows)], "swept")


def save_search():
    searched = sweep(
        refine=None,
        alpha=Range(0, 1),
        trials=3,
        study=optuna.create_study(directions=["maximize", "minimize"]),
        results=f"{OUT}/searched.csv",
        statistics=f"{OUT}/searched.safetensors",
    )
    save([(repr(row.settings.matcher), row.metrics) for row in searched.rows], "searched")


def save_joint_accuracy():
    accuracy = JointAccuracy(CLASSES)
    accuracy.update(*classified(RANK))
    save(accuracy.compute(), "accuracy")


class Stream:
    """Has batches on rank 0 only."""

    def __iter__(self):
        yield from [torch.randn(4, 3, 16, 16)] * (RANK == 0)


class TurnsBad:
    """Has NaN on rank 1 from the second pass on."""

    def __init__(self, loader):
        self.dataset, self.passes = loader.dataset, 0

    def __iter__(self):
        self.passes += 1
        for x in self.dataset[RANK::2].split(4):
            yield x * float("nan") if self.passes > 1 and RANK == 1 else x


def pad(loader):
    sampler = DistributedSampler(loader.dataset, 2, RANK, shuffle=False)
    return DataLoader(loader.dataset, 4, sampler=sampler)


def print_errors_of_data():
    """Samples that are counted twice, and processes without a batch, are errors on every rank."""
    data = loaders(2)
    unsharded = run(use_distributed_sampler=False)
    print_errors((unsharded, data, None), (unsharded, list(map(pad, data)), None), (run(), Stream(), None))


def print_errors_of_later_data():
    data = loaders(2)
    print_errors(*((run(), list(map(TurnsBad, data)), refine) for refine in ("batch_norm", "least_squares")))
    ZipIt(run(limit_predict_batches=2)).merge(models(), data, backbone="net")


def print_errors(*merges):
    for chosen, given, refine in merges:
        try:
            ZipIt(chosen).merge(models(), given, backbone="net", refine=refine)
        except CalibrationError as error:
            print_error(error)


def run_sharding_strategies(merged):
    tested = [images(), images(seed=1)]

    def results(chosen):
        found = chosen.test(merged, tested, verbose=False)
        return [float(result[f"{task}/test_acc"]) for task, result in zip("ab", found, strict=True)]

    def sharded():
        return trainer(devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))

    expected = results(trainer())
    assert results(run()) == expected
    try:
        ZipIt(sharded()).merge(models(), tested, backbone="net")
    except ConfigurationError as error:
        print_error(error)
    merged.on_test_epoch_start = lambda: print(*{type(each).__name__ for each in merged.parameters()}, file=sys.stderr)
    assert results(sharded()) == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["more"]:
        run_sharding_strategies(save_more_merges())
        save_sweep()
        save_search()
        print_errors_of_later_data()
    else:
        save_merges()
        save_joint_accuracy()
        print_errors_of_data()
