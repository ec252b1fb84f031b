"""What evaluates and trains a merged module gives its networks what the sources' steps give them."""

import copy

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_zipit import Distillation, Ensemble, ZipIt
from lightning_zipit import functional as F
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

G = torch.Generator().manual_seed(3)
PIXELS, LABELS = torch.randint(0, 256, (32, 6), generator=G).float(), torch.randint(0, 3, (32,), generator=G)
DATA = DataLoader(TensorDataset(torch.arange(32), PIXELS, LABELS), 8)


class Normalising(LightningModule):
    """Gets an index, pixels and labels, and normalises the pixels on the device and in its step."""

    def __init__(self, scale=255.0, bias=0.5):
        super().__init__()
        self.scale, self.bias = scale, bias
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def on_after_batch_transfer(self, batch, dataloader_idx):
        index, pixels, labels = batch
        return {"index": index, "pixels": pixels / self.scale, "label": labels}

    def validation_step(self, batch, batch_idx):
        out = self.net(batch["pixels"] - self.bias)
        self.accuracy(out, batch["label"])
        self.log("acc", self.accuracy)


class Whole(Normalising):
    """Its forward is the backbone."""

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("acc", self.accuracy(self(batch["pixels"] - self.bias), batch["label"]))


class Twice(Normalising):
    def validation_step(self, batch, batch_idx):
        self.net(batch["pixels"])
        super().validation_step(batch, batch_idx)


@pytest.fixture(scope="module", params=[Normalising, Whole])
def merge_of_twins(request):
    torch.manual_seed(0)
    source = request.param().eval()
    models = {"a": source, "b": copy.deepcopy(source)}
    with torch.no_grad():
        models["b"].net[2].weight *= 3
    backbone = "" if request.param is Whole else "net"
    merged = ZipIt(trainer()).merge(models, DATA, backbone=backbone, matcher=Average(), refine=None)
    return models, merged, Ensemble(models, backbone)


def expected_outputs(models):
    x = PIXELS / 255 - 0.5
    with torch.no_grad():
        return {task: model.net(x) for task, model in models.items()}


def test_temperatures_are_fitted_on_the_outputs_of_the_steps(merge_of_twins):
    models, *made = merge_of_twins
    expected = F.fit_temperatures(expected_outputs(models))
    for module in made:
        assert module.fit_temperatures(DATA) == pytest.approx(expected, rel=1e-4)
        assert module.fit_temperatures({"b": DATA}) == pytest.approx(expected, rel=1e-4)
        assert not any(each.update_called for each in module.modules() if isinstance(each, MulticlassAccuracy))


def test_the_joint_accuracy_of_a_sweep_is_that_of_the_steps(merge_of_twins, tmp_path):
    models, merged, _ = merge_of_twins
    classes = {"a": [0, 1, 2], "b": [3, 4, 5]}
    result = ZipIt(trainer()).sweep(
        models,
        DATA,
        val_dataloaders=[DATA, DATA],
        backbone=merged.backbone,
        classes=classes,
        matcher=Average(),
        refine=None,
        results=tmp_path / "sweep.csv",
    )
    outputs = expected_outputs(models)
    probabilities = torch.cat([outputs[task].softmax(1) for task in "ab"], 1)
    right = [(probabilities.argmax(1) == torch.tensor(classes[task])[LABELS]).float().mean().item() for task in "ab"]
    assert result.ensemble.metrics["joint"] == pytest.approx(sum(right) / 2)
    assert result.rows[0].metrics["joint"] == pytest.approx(sum(right) / 2)
    own = [(outputs[task].argmax(1) == LABELS).float().mean().item() for task in "ab"]
    assert result.rows[0].metrics["mean"] == pytest.approx(sum(own) / 2)


@pytest.mark.parametrize("loaders", [DATA, [DATA, DATA], {"b": DATA}])
def test_a_merge_that_is_its_sources_has_no_distance_in_their_steps(loaders):
    torch.manual_seed(0)
    source = Normalising(bias=0.0).eval()
    source.net[0].weight.data *= 100
    models = {"a": source, "b": copy.deepcopy(source)}
    merged = ZipIt(trainer()).merge(models, DATA, backbone="net", matcher=Average(), refine=None)
    seen = []
    merged.trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    run = trainer(max_epochs=1)
    run.fit(Distillation(merged, models, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)), loaders)
    assert run.callback_metrics["distance"] < 1e-6
    assert torch.equal(seen[0], PIXELS[:8] / 255)


def test_several_calls_count_for_temperatures_and_not_for_the_joint_accuracy(tmp_path):
    torch.manual_seed(0)
    source = Twice().eval()
    models = {"a": source, "b": copy.deepcopy(source)}
    with torch.no_grad():
        models["b"].net[2].weight *= 3
        outputs = {task: torch.cat([m.net(PIXELS / 255), m.net(PIXELS / 255 - 0.5)]) for task, m in models.items()}
    assert Ensemble(models, "net").fit_temperatures(DATA) == pytest.approx(F.fit_temperatures(outputs), rel=1e-4)
    with pytest.raises(ConfigurationError, match=r"calls its backbone 2 times for a batch. Pass `get_input`"):
        ZipIt(trainer()).sweep(
            models,
            DATA,
            val_dataloaders=[DATA, DATA],
            backbone="net",
            classes={"a": [0, 1, 2], "b": [3, 4, 5]},
            results=tmp_path / "sweep.csv",
        )
