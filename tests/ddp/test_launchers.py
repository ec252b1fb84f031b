"""Ranks that are started by torchrun, by SLURM."""

import runpy
import subprocess
import sys

import pytest
from helpers.ddp import ENVIRONMENT, models
from helpers.nets import trainer
from helpers.processes import free_ports, run

from lightning_zipit import MultiHeadModule

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


@pytest.mark.nightly
def test_slurm_starts_a_merge_on_the_command_line(sources):
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "merge",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
    }
    ranks = [slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    processes = run(main, [(), ()], sources, ranks)
    assert [process.code for process in processes] == [0, 0], processes
    assert ["Saved the merged module" in process.printed for process in processes] == [True, False]
