"""When things go wrong: nothing is lost, nothing is left behind, nothing is executed."""

import copy
import errno
import io
import os
import pickle
import random
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.nets import Lit, LitWhole, images, trainer
from lightning.pytorch import LightningDataModule
from test_statistics_file import Payload, damage
from torch.utils.data import DataLoader, Dataset

from lightning_zipit import MultiHeadModule, ZipIt, ZipItTrainer
from lightning_zipit.errors import CalibrationError, CheckpointError, ZipItError


class Failing(Dataset):
    """Noise, until something happens."""

    def __init__(self, error, at=20):
        self.error, self.at = error, at

    def __len__(self):
        return 48

    def __getitem__(self, index):
        if index == self.at:
            if isinstance(self.error, BaseException):
                raise self.error
            return self.error
        return torch.randn(3, 16, 16)


@contextmanager
def left_as_they_were(models, run):
    """Weights, modes, hooks and methods of the models, and the Trainer's callbacks."""

    def look():
        modules = [module for model in models.values() for module in model.modules()]
        return (
            [(id(module), module.training, sorted(module.__dict__)) for module in modules],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
            list(run.callbacks),
            [getattr(DataLoader, name) for name in ("__init__", "__setattr__", "__delattr__")],  # Lightning wraps them
        )

    weights, before = [copy.deepcopy(model.state_dict()) for model in models.values()], look()
    yield
    assert look() == before
    for model, old in zip(models.values(), weights, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError("unreadable"), OSError),
        (KeyboardInterrupt(), (KeyboardInterrupt, SystemExit)),
        (torch.full((3, 16, 16), float("nan")), CalibrationError),
        (torch.randn(4, 16, 16), RuntimeError),
        ("no tensor", CalibrationError),
    ],
    ids=["unreadable", "Ctrl-C", "NaN", "shape", "type"],
)
@pytest.mark.parametrize("at", [0, 47])
def test_a_failure_while_calibrating_leaves_everything_as_it_was(error, raised, at):
    models, run = {"a": Lit(5), "b": Lit(7)}, trainer()
    data = DataLoader(Failing(error, at), 1 if isinstance(error, (str, torch.Tensor)) else 8)
    with left_as_they_were(models, run), pytest.raises(raised):
        ZipIt(run).merge(models, data, backbone="net")
    assert ZipIt(run).merge(models, images(), backbone="net").report


def test_a_matcher_that_fails_leaves_everything_as_it_was():
    from lightning_zipit.matchers import Matcher

    class Broken(Matcher):
        def __call__(self, similarity, num_models):
            raise ZeroDivisionError("in the user's matcher")

    models, run = {"a": Lit(5), "b": Lit(7)}, trainer()
    with left_as_they_were(models, run), pytest.raises(ZeroDivisionError):
        ZipIt(run).merge(models, images(), backbone="net", matcher=Broken())


class Noise(LightningDataModule):
    def train_dataloader(self):
        return images()


@contextmanager
def full_disk(size):
    """Files cannot grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["output", "statistics"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path, what):
    run = trainer(accelerator="cpu")
    for task in "ab":
        run.strategy.connect(Lit(5))
        run.save_checkpoint(tmp_path / f"{task}.ckpt")
    files = {"output": tmp_path / "merged.ckpt", "statistics": tmp_path / "statistics.safetensors"}
    files["output"].write_bytes(b"an older merge")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {name: str(files[name]) for name in {"output", what}}
    checkpoints = {task: str(tmp_path / f"{task}.ckpt") for task in "ab"}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with full_disk(20_000), pytest.raises(Exception) as caught:
        ZipItTrainer(**quiet).merge(Lit, Noise(), checkpoints=checkpoints, backbone="net", **arguments)
    assert os.strerror(errno.EFBIG) in str(caught.value) or "write" in str(caught.value).lower()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / "merged.ckpt"
    torch.manual_seed(0)
    run = trainer()
    ZipIt(run).merge({"a": LitWhole(3), "b": LitWhole(4)}, images())
    run.save_checkpoint(path, weights_only=True)
    return path


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_damaged_bytes_give_our_own_errors_alone(checkpoint, times):
    content, chance = checkpoint.read_bytes(), random.Random(0)
    outcomes = [outcome(damage(content, chance)) for _ in range(times)]
    assert outcomes.count("refused") > times / 2


@pytest.mark.parametrize("times", [30, pytest.param(300, marks=pytest.mark.nightly)])
def test_a_damaged_record_gives_our_own_errors_alone(checkpoint, times):
    content, chance = torch.load(checkpoint, weights_only=True), random.Random(0)
    content = {name: content[name] for name in ("state_dict", "lightning_zipit")}
    wrong = [None, 0, -1, 2**40, 1.5, "", "os:system", "os.system", [], {}, [1], {"a": 1}, True, torch.zeros(2), [-3]]
    outcomes = []
    for _ in range(times):
        changed = copy.deepcopy(content)
        *parents, name = chance.choice([place for place in places(changed) if place])
        holder = changed
        for parent in parents:
            holder = holder[parent]
        if chance.random() < 0.3:
            del holder[name]
        else:
            holder[name] = chance.choice(wrong)
        buffer = io.BytesIO()
        torch.save(changed, buffer)
        outcomes.append(outcome(buffer.getvalue()))
    assert outcomes.count("refused") > times / 3


def outcome(content):
    try:
        MultiHeadModule.load_from_checkpoint(io.BytesIO(content))
    except ZipItError:
        return "refused"
    return "read"


def places(value, here=()):
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*here, name))


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, checkpoint):
    target = tmp_path / "executed"
    content = torch.load(checkpoint, weights_only=True)
    content["lightning_zipit"]["report"] = Payload(target)
    torch.save(content, tmp_path / "payload.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Payload(target)))
    for name in ("payload.ckpt", "pickle.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            MultiHeadModule.load_from_checkpoint(tmp_path / name)
    assert not target.exists()


KILLED = """
import os, sys, torch
from helpers.nets import Lit, trainer
from torch.utils.data import DataLoader, Dataset
from lightning_zipit import ZipIt

class Noise(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if index == 41 and os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid(), 9)
        return torch.randn(3, 16, 16)

run = trainer(devices=2, strategy="ddp")
ZipIt(run).merge({"a": Lit(5), "b": Lit(7)}, DataLoader(Noise(), 4), backbone="net", statistics=sys.argv[1])
"""


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    (tmp_path / "main.py").write_text(KILLED)
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root.parent}"}
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "statistics.safetensors")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["main.py"]
