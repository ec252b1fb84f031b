"""Two real gloo processes, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, sys, torch
from helpers.nets import Lit, settle, trainer
from torch.utils.data import DataLoader
from lightning_zipit import ZipIt
devices, out = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
models = {"a": Lit(5), "b": Lit(7)}
for model in models.values():
    settle(model.net, torch.randn(16, 3, 16, 16))
# Batches of 8 in one process are those of two processes with 4 each, up to the odd sample at the end.
data = [DataLoader(torch.randn(count, 3, 16, 16), 8 // devices) for count in (53, 48)]
run = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto")
merged = ZipIt(run).merge(models, dataloaders=data, backbone="net", stop_at="layer1.0")
rank = os.environ.get("LOCAL_RANK", "0")
spaces = [vars(space) for space in merged.report.spaces]
torch.save({"state": merged.state_dict(), "spaces": spaces}, f"{out}/{devices}-{rank}.pt")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "main.py").write_text(SCRIPT)
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root.parent}"}
    for devices in (1, 2):
        command = [sys.executable, str(folder / "main.py"), str(devices), str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


def test_both_ranks_have_the_same_network(results):
    _, first, second = results
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())


def test_two_processes_merge_as_one_does(results):
    one, two, _ = results
    assert [space["across"] for space in one["spaces"]] == [space["across"] for space in two["spaces"]]
    for name, tensor in one["state"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, two["state"][name], atol=1e-6), name


def test_statistics_of_batch_norm_are_averaged_over_the_batches_of_both(results):
    one, two, _ = results
    batches = {name: int(tensor) for name, tensor in two["state"].items() if "num_batches" in name}
    assert set(batches.values()) == {14, 12, 14 + 12}  # head a, head b, trunk; 27 and 26 samples make seven batches
    for name, tensor in one["state"].items():
        if name.endswith("running_mean"):
            assert torch.allclose(tensor, two["state"][name], atol=0.1), name
