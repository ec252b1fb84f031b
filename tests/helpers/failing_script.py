"""A user's script whose second rank fails in the calibration data: merge, sweep or predict under a strategy."""

import os
import sys

import torch

from helpers.failing import Loader, UserError, models
from helpers.nets import images, trainer
from lightning_zipit import ZipIt, ZipItCallback, ZipItModule


class OneSided(Loader):
    """Fails on rank 1."""

    def __iter__(self):
        self.rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.fails_in = "calibration" if self.rank == 1 else None
        return super().__iter__()


def fail(case, strategy):
    loader, settings = OneSided(0, None, 2, UserError("in the loader")), {"refine": None, "verify": False}
    if case == "predict":
        run = trainer(devices=2, strategy=strategy, callbacks=[ZipItCallback(**settings)])
        run.predict(ZipItModule(models(), "net", loader), return_predictions=False)
    elif case == "merge":
        ZipIt(trainer(devices=2, strategy=strategy)).merge(models(), loader, backbone="net", **settings)
    else:
        settings |= {"val_dataloaders": [images(32, 8), images(32, 8)], "metric": "acc"}
        ZipIt(trainer(devices=2, strategy=strategy)).sweep(models(), loader, backbone="net", **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        fail(*sys.argv[1:])
    except UserError:
        print(f"rank {os.environ.get('LOCAL_RANK', '0')} raised UserError", file=sys.stderr, flush=True)
        raise
