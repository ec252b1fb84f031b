"""Models, data and merges that one process and two processes have in common."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from helpers.nets import settled_pair
from lightning_zipit import ZipIt

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}


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


def start(script, folder, *arguments):
    """Run a script of this folder with a working folder as its argument, as a user starts it."""
    command = [sys.executable, str(TESTS / "helpers" / script), str(folder), *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result
