"""Merged checkpoints of sources whose layers are made late, and modules of other packages."""

import sys
from types import ModuleType

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import MultiHeadModule, ZipIt
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.matchers import Average

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


class Late(LightningModule):
    """Makes its layers in ``configure_model``."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, self.hparams.classes))


class Lazy(LightningModule):
    """Lazy layers get their sizes in the first forward."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, classes))

    def configure_model(self):
        pass


class InSetup(Late):
    """Makes its layers in ``setup``, with what only the Trainer knows."""

    def setup(self, stage):
        Late.configure_model(self)

    def configure_model(self):
        pass


def merge_and_save(kind, path):
    models = {"a": kind(3), "b": kind(4)}
    for model in models.values():
        model.configure_model()
        model.setup("fit")
        model.net(X)
    run = trainer()
    merged = ZipIt(run).merge(models, DataLoader(X, 4), backbone="net", matcher=Average(), refine=None)
    run.save_checkpoint(path)
    return models, merged


@pytest.mark.parametrize("kind", [Late, Lazy])
def test_layers_that_are_made_late_are_read_back(kind, tmp_path):
    _, merged = merge_and_save(kind, tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert all(torch.equal(loaded(X)[task], merged(X)[task]) for task in "ab")


def test_layers_that_only_setup_can_make_need_models(tmp_path):
    models, merged = merge_and_save(InSetup, tmp_path / "merged.ckpt")
    with pytest.raises(CheckpointError, match=r"Task 'a'.*models=.*must have its layers"):
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models=models)
    assert all(torch.equal(loaded(X)[task], merged(X)[task]) for task in "ab")


class Centred(nn.Sequential):
    """Computes with what no checkpoint holds."""

    def __init__(self, act=nn.ReLU):
        super().__init__(nn.Linear(6, 5), act(), nn.Linear(5, 3))
        self.temperature = 1.0
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x):
        return super().forward(x - self.mean) / self.temperature


class Incomplete(LightningModule):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.save_hyperparameters()
        self.net = Centred(act)


def with_class():
    return Incomplete(nn.Tanh)


def with_attribute():
    model = Incomplete()
    model.net.temperature = 4.0
    return model


def with_buffer():
    model = Incomplete()
    model.net.mean.fill_(2.0)
    return model


@pytest.mark.parametrize("make", [with_class, with_attribute, with_buffer])
def test_a_module_that_would_compute_something_else_is_not_read(make, tmp_path):
    models, runner = {"a": make(), "b": make()}, trainer()
    merged = ZipIt(runner).merge(models, DataLoader(X, 4), backbone="net", matcher=Average(), refine=None)
    runner.save_checkpoint(tmp_path / "merged.ckpt")
    with pytest.raises(CheckpointError, match=r"merged.ckpt does not compute the same.*models="):
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models=models)
    assert all(torch.equal(loaded(X)[task], merged(X)[task]) for task in "ab")
    assert MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", strict=False).tasks == ["a", "b"]


def test_a_module_of_the_other_package_is_told_what_to_import(monkeypatch):
    other = ModuleType("other_lightning")
    monkeypatch.setitem(sys.modules, "other_lightning", other)
    base = type("LightningModule", (nn.Module,), {"__module__": "other_lightning"})
    model = type("Lit", (base,), {})()
    with pytest.raises(ConfigurationError, match=r"Task 'a'.*`other_lightning`.*Import `lightning.pytorch`"):
        ZipIt(trainer()).merge({"a": model, "b": model}, DataLoader(X, 4))
