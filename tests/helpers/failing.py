"""Merges and sweeps in which one rank fails: each case is a function of the rank and an empty folder."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule

from helpers.nets import LitSplit, images, settle, trainer
from lightning_zipit import ZipIt, ZipItCallback, ZipItModule
from lightning_zipit._common import ending
from lightning_zipit._common.collectives import decide, exchange
from lightning_zipit.matchers import Average, GreedyZip
from lightning_zipit.task_vectors import TaskArithmetic

PASSES = {"calibration": 0, "refinement": 1}


class UserError(Exception):
    """An error of the user's own code."""


class AwkwardError(Exception):
    """An error that cannot be made from what an exception keeps, and holds what cannot be pickled."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class UserLit(LitSplit):
    """A source whose validation may fail."""

    fails = False

    def validation_step(self, batch, batch_idx):
        if self.fails and batch_idx == 1:
            raise UserError("in validation_step")
        super().validation_step(batch, batch_idx)
        if self.trainer.is_global_zero:
            self.log("of_rank_zero", 2.5, rank_zero_only=True)


@dataclass
class Loader:
    """Three batches of a rank, for every pass; one may fail, or hold NaN."""

    rank: int
    fails_in: str | None = None
    fails_at: int = 0
    error: Exception | None = None
    passes: int = -1

    def __iter__(self):
        self.passes += 1
        generator = torch.Generator().manual_seed(self.rank)
        for number in range(3):
            x = torch.randn(8, 3, 8, 8, generator=generator)
            if self.fails_in and self.passes == PASSES[self.fails_in] and number == self.fails_at:
                if self.error is not None:
                    raise self.error
                x = x * float("nan")
            yield x


def models(fails=False):
    torch.manual_seed(0)
    sources = {"a": UserLit(num_classes=5), "b": UserLit(num_classes=7)}
    for model in sources.values():
        settle(model.net, torch.randn(16, 3, 8, 8))
        model.fails = fails
    return sources


def run(**arguments):
    return trainer(devices=2, strategy="ddp", **arguments)


def merge(loader, callbacks=None, **settings):
    settings = {"backbone": "net", "refine": "batch_norm", "verify": False} | settings
    return ZipIt(run(callbacks=callbacks)).merge(models(), loader, **settings)


def sweep(rank, folder, loader=None, fails=False, val_dataloaders=None, **settings):
    return ZipIt(run()).sweep(
        models(fails),
        loader or Loader(rank),
        val_dataloaders=val_dataloaders or [images(64, 8), images(64, 8)],
        **{"backbone": "net", "metric": "acc", "refine": None, "verify": False, "alpha": 0.1} | settings,
        results=folder / "sweep.csv",
    )


# Merges


def prepare(rank, folder):
    merge(Loader(rank), stop_at="nowhere" if rank == 1 else None)


def setup(rank, folder):
    class Data(LightningDataModule):
        def setup(self, stage):
            if rank == 1:
                raise UserError("in setup")

        def calibration_dataloader(self):
            return Loader(rank)

    merge(None, datamodule=Data())


def first_batch(rank, folder):
    merge(Loader(rank, "calibration" if rank == 1 else None))


def get_input(rank, folder):
    def find(batch):
        if rank == 1:
            raise UserError("in get_input")
        return batch

    merge(Loader(rank), get_input=find)


def later_batch(rank, folder):
    merge(Loader(rank, "calibration" if rank == 1 else None, 2, UserError("in the loader")))


def later_batch_of_rank_0(rank, folder):
    merge(Loader(rank, "calibration" if rank == 0 else None, 2, UserError("in the loader")))


def matching(rank, folder):
    class Failing(GreedyZip):
        def __call__(self, similarity, num_models, width=None):
            if rank == 1:
                raise UserError("in the matcher")
            return super().__call__(similarity, num_models, width)

    merge(Loader(rank), matcher=Failing())


def merging(rank, folder):
    class Failing(TaskArithmetic):
        def __call__(self, vectors):
            if rank == 1:
                raise UserError("in the combination")
            return super().__call__(vectors)

    merge(Loader(rank), base=models()["a"], combine=Failing(), matcher=Average())


def first_refinement_batch(rank, folder):
    merge(Loader(rank, "refinement" if rank == 1 else None, 0, UserError("in the loader")))


def later_refinement_batch(rank, folder):
    merge(Loader(rank, "refinement" if rank == 1 else None, 2, UserError("in the loader")))


def end_of_refinement(rank, folder):
    merge(Loader(rank, "refinement" if rank == 1 else None), refine="least_squares")


def after_refinement(rank, folder):
    class Failing(Callback):
        def on_predict_end(self, trainer, pl_module):
            if rank == 1:
                raise UserError("in a callback")

    merge(Loader(rank), callbacks=[Failing()])


def statistics_file(rank, folder):
    loader = Loader(rank, "calibration" if rank == 1 else None, 2, UserError("in the loader"))
    merge(loader, statistics=folder / "statistics.safetensors")


def error_that_cannot_be_pickled(rank, folder):
    merge(Loader(rank, "calibration" if rank == 1 else None, 2, AwkwardError("awkward", lambda: None)))


def predict(rank, folder):
    loader = Loader(rank, "calibration" if rank == 1 else None, 2, UserError("in the loader"))
    module = ZipItModule(models(), "net", loader)
    run(callbacks=[ZipItCallback(refine=None, verify=False)]).predict(module, return_predictions=False)


def all_ranks(rank, folder):
    """An error that all ranks have leaves the process group as it is."""
    for _ in range(2):
        try:
            merge(Loader(rank, "calibration", 2, UserError("in the loader")))
        except UserError:
            assert dist.is_initialized()
    merge(Loader(rank))
    raise UserError("caught before")


# Sweeps


def sweep_merge(rank, folder):
    sweep(rank, folder, Loader(rank, "calibration" if rank == 1 else None, 2, UserError("in the loader")))


def sweep_refinement(rank, folder):
    loader = Loader(rank, "refinement" if rank == 1 else None, 0, UserError("in the loader"))
    sweep(rank, folder, loader, refine="batch_norm")


def sweep_validation_step(rank, folder):
    sweep(rank, folder, fails=rank == 1)


def sweep_validation_step_of_rank_0(rank, folder):
    sweep(rank, folder, fails=rank == 0)


def sweep_validation_loader(rank, folder):
    class Failing(list):
        def __iter__(self):
            yield self[0]
            if rank == 1:
                raise UserError("in the validation loader")
            yield self[1]

    batches = Failing(images(32, 8))
    sweep(rank, folder, val_dataloaders=[batches, batches])


def sweep_all_ranks(rank, folder):
    """An error that all ranks have is the error of its row; the sweep goes on."""

    class Failing(Average):
        def __call__(self, similarity, num_models):
            raise UserError("in the matcher")

    result = sweep(rank, folder, matcher=[Failing(), Average()], alpha=None)
    raise UserError("; ".join(row.error or "ok" for row in result.rows))


def sweep_metric_of_rank_0(rank, folder):
    result = sweep(rank, folder, metric="of_rank_zero", alpha=None)
    raise UserError(str(result.rows[0].metrics["of_rank_zero"]))


# Exchanges


def join(rank):
    run().strategy.setup_environment()
    return rank


def exchange_errors(rank, folder):
    def fail():
        if join(rank) == 1:
            raise AwkwardError("awkward", lambda: None)

    join(rank)
    exchange(fail)


def exchange_error_of_a_local_class(rank, folder):
    class LocalError(Exception):
        pass

    def fail():
        if rank == 1:
            raise LocalError("local")

    join(rank)
    exchange(fail)


def exchange_errors_of_both(rank, folder):
    def fail():
        raise UserError(f"of rank {rank}")

    join(rank)
    exchange(fail)


def exchange_result_that_cannot_be_pickled(rank, folder):
    join(rank)
    exchange(lambda: (lambda: None) if rank == 1 else 0)


def exchange_results(rank, folder):
    join(rank)
    raise UserError(str(exchange(lambda: rank * 10)))


def decide_on_rank_0(rank, folder):
    join(rank)
    raise UserError(str(decide(lambda: f"by rank {rank}")))


def decide_with_an_error(rank, folder):
    def fail():
        raise UserError(f"of rank {rank}")

    join(rank)
    decide(fail)


def run_cases(rank, names, ports):
    """Run cases one after the other, and print how each has ended."""
    torch.set_num_threads(1)
    ending.GRACE = 0.5
    for name, port in zip(names, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        folder, start = Path(name), time.monotonic()
        folder.mkdir(exist_ok=True)
        try:
            globals()[name](rank, folder)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        else:
            text = "no error"
        initialized = dist.is_initialized()
        if initialized:
            dist.destroy_process_group()
        left = sorted(str(path.name) for path in folder.iterdir())
        seconds = round(time.monotonic() - start, 1)
        print(json.dumps({"name": name, "error": text, "left": left, "seconds": seconds}), flush=True)
