"""Every hook of a source runs in the merged module as in the source's own Trainer."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_zipit import MultiHeadModule, ZipIt
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

G = torch.Generator().manual_seed(3)
X, Y = torch.randn(16, 6, generator=G), torch.randint(0, 3, (16,), generator=G)
DATA = DataLoader(TensorDataset(X, Y), 8)


def merge(models, backbone="net"):
    options = {"matcher": Average(), "refine": None}
    return ZipIt(trainer()).merge(models, DataLoader(X, 8), backbone=backbone, **options)


class Lit(LightningModule):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Recording(Lit):
    """Overrides all hooks of Lightning that are called ``on_*``, and what surrounds them."""

    def __init__(self):
        super().__init__()
        self.events = []


def _recorded(name):
    def hook(self, *args, **named):
        shapes = [tuple(arg[0].shape) for arg in args if isinstance(arg, (list, tuple))]
        self.events.append((name, self.trainer is not None, len(args) + len(named), shapes))
        return getattr(super(Recording, self), name)(*args, **named)

    return hook


for _kind in (ModelHooks, DataHooks):
    for _name, _hook in vars(_kind).items():
        if inspect.isfunction(_hook) and (_name.startswith("on_") or _name in ("setup", "teardown", "prepare_data")):
            setattr(Recording, _name, _recorded(_name))


def run(verb, module, data, **options):
    method = getattr(trainer(**options), verb)
    method(module, data) if verb in ("fit", "predict") else method(module, data, verbose=False)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_every_hook_runs_as_in_the_sources_own_trainer(verb):
    options = {"max_epochs": 1} if verb == "fit" else {}
    alone = Recording()
    run(verb, alone, DATA, **options)
    merged = merge({"a": Recording(), "b": Recording()})
    run(verb, merged, {"a": DATA, "b": DATA}, **options)
    assert len(alone.events) > 10
    for source in merged.sources.values():
        assert source.events == alone.events


def test_a_hook_that_no_source_has_is_lightnings_own():
    merged = merge({"a": Lit(), "b": Lit()})
    merged.trunk.train()
    run("validate", merged, [DATA, DATA])
    assert merged.trunk.training and not merged.heads.training, "the modes of the modules are restored"


def test_steps_take_what_they_name():
    class Short(Lit):
        def test_step(self, batch):
            self.log("short", self.loss(batch))

    class Iterating(Lit):
        def test_step(self, dataloader_iter):
            _, batch_idx, _ = next(dataloader_iter)
            self.log("index", float(batch_idx))

    class Indexed(Lit):
        def test_step(self, batch, number, dataloader_idx):
            self.log("loader", float(dataloader_idx))

        def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
            self.log("hook", float(dataloader_idx))

    merged = merge({"a": Short(), "b": Iterating(), "c": Indexed()})
    found = trainer().test(merged, [DATA] * 3, verbose=False)
    logged = {name: value for each in found for name, value in each.items()}
    assert set(logged) == {"a/short", "b/index", "c/loader", "c/hook"}
    assert logged["b/index"] == 0.5 and logged["c/loader"] == logged["c/hook"] == 0


def test_a_metric_object_counts_all_batches():
    class Metered(Lit):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average="micro")

        def test_step(self, batch, batch_idx):
            self.accuracy(self(batch[0]), batch[1])
            self.log("acc", self.accuracy)

    merged = merge({"a": Metered(), "b": Metered()})
    (_, found) = trainer().test(merged, [DATA, DATA], verbose=False)
    expected = (merged(X, task="b").argmax(1) == Y).float().mean().item()
    assert found["b/acc"] == pytest.approx(expected)


def test_callbacks_of_the_sources_monitor_their_own_metrics():
    class Stopping(Lit):
        def configure_callbacks(self):
            return EarlyStopping("val_loss", patience=1)

    merged = merge({"a": Stopping(), "b": Stopping()})
    runner = trainer(max_epochs=1)
    runner.fit(merged, {"a": DATA, "b": DATA}, {"a": DATA, "b": DATA})
    assert [each.monitor for each in runner.callbacks if isinstance(each, EarlyStopping)] == [
        "a/val_loss",
        "b/val_loss",
    ]


def test_loaders_of_the_sources_are_used():
    class WithData(Lit):
        def test_dataloader(self):
            return DATA

    (*_, found) = trainer().test(merge({"a": WithData(), "b": WithData()}), verbose=False)
    assert list(found) == ["b/test_loss"]


class Counting(Lit):
    """Keeps a count that its checkpoint must hold, and leaves a frozen part out of it."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.strict_loading = False

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if not name.startswith("teacher")}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, checkpoint):
        self.count = checkpoint["count"]


class Unreadable(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["object"], checkpoint["number"] = self.net, 3


def save(models, path):
    runner = trainer()
    warnings.filterwarnings("default")  # the Trainer of the tests is silent
    merged = ZipIt(runner).merge(models, DataLoader(X, 8), backbone="net", matcher=Average(), refine=None)
    runner.save_checkpoint(path)
    return merged


def test_each_source_has_its_part_of_a_checkpoint(tmp_path):
    models = {"a": Counting(), "b": Counting()}
    models["a"].count, models["b"].count = 2, 5
    merged = save(models, tmp_path / "merged.ckpt")
    assert not [name for name in merged.state_dict() if "teacher" in name]
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert [source.count for source in loaded.sources.values()] == [2, 5]
    assert torch.equal(loaded(X)["b"], merged(X)["b"])
    for source in merged.sources.values():
        source.count = 0
    trainer().test(merged, [DATA, DATA], ckpt_path=tmp_path / "merged.ckpt", weights_only=True, verbose=False)
    assert [source.count for source in merged.sources.values()] == [2, 5]
    state = merged.state_dict()
    with pytest.raises(RuntimeError, match=r"trunk\.0\.weight"):
        merged.load_state_dict({name: value for name, value in state.items() if name != "trunk.0.weight"})


def test_what_a_file_cannot_hold_safely_is_said_when_saving(tmp_path):
    with pytest.warns(UserWarning, match=r"task 'a' adds 'object', which is not saved"):
        save({"a": Unreadable(), "b": Unreadable()}, tmp_path / "merged.ckpt")
    content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert content["lightning_zipit_sources"]["a"] == {"number": 3}
    MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")


def test_a_source_that_the_file_cannot_recreate_is_named_when_saving(tmp_path):
    class Local(Lit):
        pass

    with pytest.warns(UserWarning, match=r"task 'a' cannot be made.*top level.*models="):
        save({"a": Local(), "b": Lit()}, tmp_path / "merged.ckpt")


class Averaged(Lit):
    """Its step runs a copy of the network, such as a moving average."""

    def __init__(self):
        super().__init__()
        self.average = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.average(x)


def test_a_step_that_runs_another_copy_of_the_network_is_refused():
    merged = merge({"a": Averaged(), "b": Averaged()})
    with pytest.raises(ConfigurationError, match=r"test_step of task 'a'.*copy of its backbone, `average`"):
        trainer().test(merged, [DATA, DATA], verbose=False)


def test_a_step_that_runs_nothing_of_the_network_warns():
    class Idle(Lit):
        def test_step(self, batch, batch_idx):
            self.log("size", float(len(batch[0])))

    merged, runner = merge({"a": Lit(), "b": Idle()}), trainer()
    with pytest.warns(UserWarning, match="test_step of task 'b' did not run the merged network"):
        runner.test(merged, [DATA, DATA], verbose=False)
