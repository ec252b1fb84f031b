"""Training towards the sources' outputs."""

import copy

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import Distillation, MultiHeadModule, ZipIt
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
DATA = DataLoader(X, 16)


class Lit(LightningModule):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, classes))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    models = {"a": Lit(3), "b": Lit(4)}
    return models, ZipIt(trainer()).merge(models, DATA, backbone="net")


def distance(merged, models):
    with torch.no_grad():
        found = merged.eval()(X)
        return [(found[task] - model.net(X)).square().mean().item() for task, model in models.items()]


@pytest.mark.parametrize("loaders", [DATA, [DATA, DATA], {"a": DATA, "b": DATA}])
def test_the_merged_network_comes_nearer_to_every_source(pair, loaders, tmp_path):
    models, merged = pair[0], copy.deepcopy(pair[1])
    before = distance(merged, models)
    runner = trainer(max_epochs=10)
    runner.fit(Distillation(merged, models, optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2)), loaders)
    after = distance(merged, models)
    assert all(new < 0.5 * old for new, old in zip(after, before, strict=True))
    assert {"a/distance", "b/distance", "distance"} <= set(runner.callback_metrics)
    runner.save_checkpoint(tmp_path / "distilled.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "distilled.ckpt")
    assert distance(loaded, models) == after
    resumed = trainer(max_epochs=11)
    resumed.fit(Distillation(loaded, models), DATA, ckpt_path=tmp_path / "distilled.ckpt", weights_only=True)
    assert resumed.current_epoch == 11


def test_a_network_that_is_its_sources_stays(pair):
    model = Lit()
    models = {"a": model, "b": copy.deepcopy(model)}
    merged = ZipIt(trainer()).merge(models, DATA, backbone="net", matcher=Average(), refine=None)
    runner = trainer(max_epochs=1)
    runner.fit(Distillation(merged, models, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)), DATA)
    assert runner.callback_metrics["distance"] < 1e-6


def test_models_of_other_tasks_are_refused(pair):
    with pytest.raises(ConfigurationError, match=r"`models` has the tasks \['task_0'\]"):
        Distillation(pair[1], [Lit()])
