"""Processes without a process group that divide a sweep among them (`share=`)."""

import csv

from helpers.ddp import loaders, models
from helpers.nets import images, trainer
from helpers.processes import run

from lightning_zipit import ZipIt
from lightning_zipit._phases.calibrate import Gathering


def sweep_share(part):
    """One of several processes that sweep together; says how often it calibrates."""
    add = Gathering.add

    def counted(*arguments):
        print("calibrated")
        add(*arguments)

    Gathering.add = counted
    result = ZipIt(trainer()).sweep(
        models(),
        loaders(1),
        val_dataloaders=[images(16), images(16)],
        backbone="net",
        metric="val_acc",
        alpha=[0.1, 0.2, 0.3, 0.4],
        refine=None,
        results="shared.csv",
        share=part,
    )
    print("complete" if not result.missing else "not yet")


def test_processes_that_share_a_sweep_gather_statistics_once_and_write_one_file(tmp_path):
    processes = run(sweep_share, [("1/2",), ("2/2",)], tmp_path)
    assert [process.code for process in processes] == [0, 0], processes
    printed = "".join(process.printed for process in processes)
    batches = sum(len(loader) for loader in loaders(1))
    assert printed.count("calibrated") == batches and "complete" in printed
    with open(tmp_path / "shared.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["matcher"] for row in rows) == ["", *(f"GreedyZip(alpha=0.{n}, beta=1.0)" for n in (1, 2, 3, 4))]
    assert not any(row["error"] for row in rows)
    assert sorted(path.name for path in tmp_path.glob("*shared*")) == ["shared.csv", "shared.safetensors"]
