"""Real gloo processes, started as a user starts them."""

import csv
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.nets import images, settled_pair, trainer
from helpers.processes import run as run_processes
from torch.utils.data import DataLoader

from lightning_zipit import CalibrationStatistics, JointAccuracy, MultiHeadModule, ZipIt
from lightning_zipit._phases.calibrate import Gathering
from lightning_zipit.refine import LeastSquares

ROOT = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT.parent}", "OMP_NUM_THREADS": "1"}

COMMON = """
import os, sys, torch
from test_ddp import CLASSES, classified, loaders, merge, models
from helpers.nets import trainer
torch.set_num_threads(1)
out, rank = sys.argv[1], os.environ.get("LOCAL_RANK", "0")
"""

DDP = (
    COMMON
    + """
from lightning_zipit import ZipIt
from lightning_zipit.errors import CalibrationError
def run(**arguments):
    return trainer(devices=2, strategy="ddp", **arguments)
merged = merge(run(), 2, f"{out}/two.safetensors")
spaces = [vars(space) for space in merged.report.spaces]
torch.save({"state": merged.state_dict(), "spaces": spaces}, f"{out}/2-{rank}.pt")
from lightning_zipit.refine import LeastSquares
fitted = merge(run(), 2, refine=LeastSquares(positions=9))
torch.save(fitted.state_dict(), f"{out}/fitted-{rank}.pt")
torch.save(merge(run(), 2, start_at="bn1").state_dict(), f"{out}/stems-{rank}.pt")
merge(run(precision="64-true"), 2, f"{out}/two-64.safetensors")
again = merge(run(), 2, f"{out}/two.safetensors")
assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in merged.state_dict().items())
from helpers.nets import images
swept = ZipIt(run()).sweep(
    models(), loaders(2), val_dataloaders=[images(16), images(16)], backbone="net", metric="val_acc",
    classes={"a": range(5), "b": range(5, 12)}, refine=[None, "batch_norm"], results=f"{out}/swept.csv",
)
torch.save([(row.metrics, row.flops) for row in (swept.ensemble, *swept.rows)], f"{out}/swept-{rank}.pt")
from lightning_zipit import JointAccuracy
accuracy = JointAccuracy(CLASSES)
accuracy.update(*classified(int(rank)))
torch.save(accuracy.compute(), f"{out}/accuracy-{rank}.pt")
import optuna
from lightning_zipit import Range
searched = ZipIt(run()).sweep(
    models(), loaders(2), val_dataloaders=[images(16), images(16)], backbone="net", metric="val_acc", refine=None,
    alpha=Range(0, 1), trials=3, study=optuna.create_study(directions=["maximize", "minimize"]),
    results=f"{out}/searched.csv", statistics=f"{out}/swept.safetensors",
)
torch.save([(repr(row.settings.matcher), row.metrics) for row in searched.rows], f"{out}/searched-{rank}.pt")
from torch.utils.data import DistributedSampler, DataLoader
data = loaders(2)
def padded(loader):
    return DataLoader(loader.dataset, 4, sampler=DistributedSampler(loader.dataset, 2, int(rank), shuffle=False))
for given in (data, list(map(padded, data))):
    try:
        ZipIt(run(use_distributed_sampler=False)).merge(models(), given, backbone="net")
    except CalibrationError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
limited = ZipIt(run(limit_predict_batches=2)).merge(models(), data, backbone="net")
class Stream:
    def __iter__(self):
        yield from [torch.randn(4, 3, 16, 16)] * (rank == "0")
try:
    ZipIt(run()).merge(models(), Stream(), backbone="net")
except CalibrationError as error:
    print(f"rank {rank}: {error}", file=sys.stderr)
class TurnsBad:
    def __init__(self, loader):
        self.dataset, self.passes = loader.dataset, 0
    def __iter__(self):
        self.passes += 1
        for x in self.dataset[int(rank)::2].split(4):
            yield x * float("nan") if self.passes > 1 and rank == "1" else x
for refine in ("batch_norm", "least_squares"):
    try:
        ZipIt(run()).merge(models(), [TurnsBad(loader) for loader in data], backbone="net", refine=refine)
    except CalibrationError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_zipit.errors import ConfigurationError
tested = [images(), images(seed=1)]
def results(run):
    return [float(result[f"{task}/test_acc"]) for task, result in zip("ab", run.test(merged, tested, verbose=False))]
expected = results(trainer())
assert results(run()) == expected
def sharded():
    return trainer(devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
try:
    ZipIt(sharded()).merge(models(), tested, backbone="net")
except ConfigurationError as error:
    print(error, file=sys.stderr)
merged.on_test_epoch_start = lambda: print(*{type(each).__name__ for each in merged.parameters()}, file=sys.stderr)
assert results(sharded()) == expected
"""
)

CLI = """
import torch
from helpers.nets import Lit, images
from lightning.pytorch import LightningDataModule
from lightning_zipit import ZipItCLI
class Noise(LightningDataModule):
    def train_dataloader(self):
        return images(53, batch_size=4)
    def test_dataloader(self):
        return [images(), images(seed=1)]
if __name__ == "__main__":
    torch.set_num_threads(1)
    ZipItCLI(Lit, Noise)
"""


def models():
    return settled_pair(16)


CLASSES = {"a": [0, 3, 5], "b": [4, 1]}


def classified(rank):
    """Logits and labels of a process: of 7 samples in the first, 4 in the second."""
    generator = torch.Generator().manual_seed(rank)
    logits = {task: torch.randn(7 - 3 * rank, len(own), generator=generator) for task, own in CLASSES.items()}
    return logits, torch.randint(6, (7 - 3 * rank,), generator=generator)


def loaders(devices):
    """Batches of 8 in one process are those of two processes with 4 each, up to the odd sample at the end."""
    generator = torch.Generator().manual_seed(0)
    return [DataLoader(torch.randn(count, 3, 16, 16, generator=generator), 8 // devices) for count in (53, 48)]


def merge(run, devices, statistics=None, refine="batch_norm", **how):
    how |= {"backbone": "net", "stop_at": "layer1.0", "refine": refine, "statistics": statistics}
    return ZipIt(run).merge(models(), loaders(devices), **how)


def start(folder, script, *arguments, **environment):
    (folder / "main.py").write_text(script)
    command = [*arguments, str(folder / "main.py"), str(folder)]
    result = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def one(folder):
    merge(trainer(precision="64-true"), 1, folder / "one-64.safetensors")
    return merge(trainer(), 1, folder / "one.safetensors")


@pytest.fixture(scope="module")
def two(folder):
    messages = start(folder, DDP, sys.executable).stderr
    return *(torch.load(folder / f"2-{rank}.pt", weights_only=True) for rank in (0, 1)), messages


def test_both_ranks_have_the_same_network(two):
    first, second, _ = two
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    assert first["spaces"] == second["spaces"]


def test_two_processes_merge_as_one_does(one, two):
    first, *_ = two
    assert [space.across for space in one.report.spaces] == [space["across"] for space in first["spaces"]]
    for name, tensor in one.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, first["state"][name], atol=1e-6), name


# Single precision rounds products of that many samples by up to 2e-6.
@pytest.mark.parametrize(("name", "tolerance"), [("{}-64", 1e-12), ("{}", 5e-6)])
def test_two_processes_gather_the_statistics_of_one(folder, one, two, name, tolerance):
    first, second = (
        CalibrationStatistics.load(folder / f"{name.format(count)}.safetensors").statistics for count in ("one", "two")
    )
    assert first.keys() == second.keys()
    for tap in first:
        mine, other = first[tap].moments(), second[tap].moments()
        assert mine.count == other.count
        scale = mine.covariance.abs().max()
        assert (mine.covariance - other.covariance).abs().max() <= tolerance * scale


def test_statistics_of_batch_norm_are_those_of_all_samples_of_both(one, two):
    first, *_ = two
    batches = {name: int(tensor) for name, tensor in first["state"].items() if "num_batches" in name}
    assert set(batches.values()) == {14, 12, 14 + 12}  # head a, head b, trunk; 27 and 26 samples make seven batches
    for name, tensor in one.state_dict().items():
        if name.endswith("running_mean"):  # behind the first norm, what is normalised by itself are other batches
            tolerance = 1e-5 if name.endswith("trunk.bn1.running_mean") else 0.1
            assert torch.allclose(tensor, first["state"][name], atol=tolerance), name


def test_two_processes_merge_behind_stems_as_one_does(folder, two):
    alone = merge(trainer(), 1, start_at="bn1").state_dict()
    first, second = (torch.load(folder / f"stems-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(name.startswith("stems.b.") for name in alone) and alone.keys() == first.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, first[name], atol=1e-6), name


def test_two_processes_fit_layers_as_one_does(folder, two):
    fitted = merge(trainer(), 1, refine=LeastSquares(positions=9)).state_dict()
    first, second = (torch.load(folder / f"fitted-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(torch.allclose(tensor, first[name], rtol=1e-5, atol=1e-6) for name, tensor in fitted.items())


def test_two_processes_sweep_as_one_does(folder, two):
    first, second = (torch.load(folder / f"swept-{rank}.pt", weights_only=True) for rank in (0, 1))
    with open(folder / "swept.csv", newline="") as file:
        written = [(int(row["total_flops"]), float(row["joint"])) for row in csv.DictReader(file)]
    assert first == second and written == [(flops, metrics["joint"]) for metrics, flops in first]
    alone = ZipIt(trainer()).sweep(
        models(),
        loaders(1),
        val_dataloaders=[images(16), images(16)],
        backbone="net",
        metric="val_acc",
        classes={"a": range(5), "b": range(5, 12)},
        refine=None,
        results=folder / "alone.csv",
    )
    (row,) = alone.rows
    assert first[1] == (pytest.approx(row.metrics), row.flops)


def test_the_joint_accuracy_of_two_processes_is_that_of_all_samples(folder, two):
    alone, (first, second) = JointAccuracy(CLASSES), (torch.load(folder / f"accuracy-{rank}.pt") for rank in (0, 1))
    alone.update(*classified(0))
    alone.update(*classified(1))
    assert first == second == alone.compute()


def test_two_processes_search_as_one(folder, two):
    first, second = (torch.load(folder / f"searched-{rank}.pt", weights_only=True) for rank in (0, 1))
    with open(folder / "searched.csv", newline="") as file:
        written = [row["matcher"] for row in csv.DictReader(file)]
    assert first == second and written == ["", *(matcher for matcher, _ in first)] and len(first) == 3


def share(part):
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


def test_processes_that_share_a_sweep_gather_statistics_once_and_write_one_file(folder):
    processes = run_processes(share, [("1/2",), ("2/2",)], folder)
    assert [process.code for process in processes] == [0, 0], processes
    printed = "".join(process.printed for process in processes)
    batches = sum(len(loader) for loader in loaders(1))
    assert printed.count("calibrated") == batches and "complete" in printed
    with open(folder / "shared.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["matcher"] for row in rows) == ["", *(f"GreedyZip(alpha=0.{n}, beta=1.0)" for n in (1, 2, 3, 4))]
    assert not any(row["error"] for row in rows)
    assert sorted(path.name for path in folder.glob("*shared*")) == ["shared.csv", "shared.safetensors"]


def test_samples_that_are_counted_twice_or_not_at_all_are_an_error_on_every_rank(two):
    *_, messages = two
    for rank in (0, 1):
        assert (
            f"rank {rank}: The processes have seen 106 samples of calibration loader 0, whose data set has 53"
            in messages
        )
        assert (
            f"rank {rank}: The processes have seen 54 samples of calibration loader 0, whose data set has 53"
            in messages
        )
        assert f"rank {rank}: A process has seen no calibration batch" in messages


def test_data_that_turns_bad_on_one_rank_is_an_error_on_every_rank(two):
    *_, messages = two
    for rank in (0, 1):
        assert f"rank {rank}: NaN or Inf in what reaches batch norm `trunk.bn1`" in messages
        assert f"rank {rank}: NaN or Inf at `trunk.conv1` in what the source of task 'a'" in messages


def test_processes_that_are_spawned_hand_the_merged_module_over(folder, two):
    run = trainer(devices=2, strategy="ddp_spawn")
    merge(run, 2)
    run.save_checkpoint(folder / "spawned.ckpt", weights_only=True)
    spawned = MultiHeadModule.load_from_checkpoint(folder / "spawned.ckpt")
    assert all(torch.equal(tensor, spawned.state_dict()[name]) for name, tensor in two[0]["state"].items())
    assert spawned.report.spaces


@pytest.mark.nightly
def test_processes_that_are_spawned_test_a_merged_module(one):
    results = trainer(devices=2, strategy="ddp_spawn").test(one, [images(), images(seed=1)], verbose=False)
    assert [sorted(result) for result in results] == [["a/test_acc", "a/test_loss"], ["b/test_acc", "b/test_loss"]]


def test_sharding_strategies_test_a_merged_module_but_do_not_merge(two):
    *_, messages = two
    assert "ModelParallelStrategy shards parameters" in messages
    assert "DTensor" in messages


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "main.py").write_text(CLI)
    run = trainer()
    for task, model in models().items():
        run.strategy.connect(model)
        run.save_checkpoint(tmp_path / f"{task}.ckpt", weights_only=True)
    return tmp_path


OPTIONS = (
    *("merge", "--checkpoints.a=a.ckpt", "--checkpoints.b=b.ckpt", "--backbone=net", "--trainer.accelerator=cpu"),
    *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_progress_bar=false"),
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_torchrun_starts_a_merge_on_the_command_line(sources):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "main.py", *OPTIONS]
    result = subprocess.run(
        [*command, "--test", "--statistics=s.safetensors"],
        env=ENVIRONMENT,
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved the merged module") == 1 and "b/test_acc" in result.stdout
    assert list(MultiHeadModule.load_from_checkpoint(sources / "merged.ckpt", models=models()).heads) == ["a", "b"]
    assert sorted(path.name for path in sources.iterdir()) == [
        "a.ckpt",
        "b.ckpt",
        "main.py",
        "merged.ckpt",
        "s.safetensors",
    ]


def main():
    """The user's own command line."""
    sys.argv = ["main.py", *OPTIONS]
    runpy.run_path("main.py", run_name="__main__")


def test_slurm_starts_a_merge_on_the_command_line(sources):
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "merge",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    ranks = [slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    processes = run_processes(main, [(), ()], sources, ranks)
    assert [process.code for process in processes] == [0, 0], processes
    assert ["Saved the merged module" in process.printed for process in processes] == [True, False]
