"""The examples: the method's order of merit on real data."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

pytestmark = pytest.mark.nightly


def joint_accuracies(*command):
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("│ ").split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return {cells[0].strip(): float(cells[1]) for cells in rows}


def test_zip_beats_permute_beats_average_on_digits(tmp_path):
    joint = joint_accuracies("examples/digits.py", "--plot", tmp_path / "digits.png")
    assert joint["ensemble"] > joint["zip"] > joint["permute"] > joint["weight average"]
    assert joint["zip"] > max(joint["model A"], joint["model B"])
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_models_with_different_inputs_merge_behind_their_stems():
    joint = joint_accuracies("examples/stems.py")
    assert joint["zip"] > joint["permute"] > max(joint["model A"], joint["model B"])
    assert joint["zip + least squares"] > joint["ensemble"] - 3


def test_the_command_line_as_its_readme_says(tmp_path):
    folder = shutil.copytree(ROOT / "examples" / "cli", tmp_path / "cli")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    block = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    shown = [run(*command.split()[1:]) for command in block.splitlines()]
    accuracies = {task: float(value) for task, value in re.findall(r"(\w+)/accuracy.*?(0\.\d+|1\.0)", shown[-1])}
    assert set(accuracies) == {"low", "high"} and min(accuracies.values()) > 0.85
    notebook = (
        "from lightning_zipit import MultiHeadModule as M; print(M.load_from_checkpoint('merged.ckpt'{}).sources)"
    )
    assert "LitDigits" in run("-c", notebook.format(", trust=['main']"))
    assert "LitDigits" in run("-c", "import main;" + notebook.format(""))


def test_least_squares_beat_zip_beats_permute_on_cifar10(tmp_path):
    archive, checkpoints = SHARED / "data" / "cifar10-images.tar.xz", SHARED / "checkpoints"
    if not (archive.exists() and checkpoints.exists()):
        pytest.skip("CIFAR-10 and the pair of trained networks are not beside this checkout")

    def some(member, path):
        """The first hundred images of each class: writing all sixty thousand takes longer than the test."""
        return tarfile.data_filter(member, path) if member.isdir() or "/00" in member.name else None

    with tarfile.open(archive) as images:
        images.extractall(tmp_path, filter=some)
    joint = joint_accuracies(
        *("examples/cifar10.py", "--data", tmp_path, "--stop-at", "none", "--methods", "permute", "zip"),
        "zip + least squares",
        *("--checkpoints", checkpoints / "devA.pt", checkpoints / "devB.pt"),
        *("--calibration-images", "300", "--test-images", "600"),
    )
    assert joint["zip, all layers"] > joint["permute, all layers"]
    assert joint["zip + least squares, all layers"] > joint["zip, all layers"] + 5
