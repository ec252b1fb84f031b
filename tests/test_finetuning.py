"""``trainer.fit`` of a merged module: the sources' own training steps, optimizers and schedulers."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import MultiHeadModule, ZipIt
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

G = torch.Generator().manual_seed(3)
X, Y = torch.randn(24, 6, generator=G), torch.randint(0, 3, (24,), generator=G)
FIRST, SECOND = DataLoader(TensorDataset(X, Y), 12), DataLoader(TensorDataset(X.flip(0), Y), 8)
SGD = partial(torch.optim.SGD, lr=0.1)


class Lit(LightningModule):
    def __init__(self, classes: int = 3, rate: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Grouped(Lit):
    """Groups its parameters by part, with a schedule that has a rate for each group."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net[:3].parameters(), "lr": 0.01},
            {"params": self.net[3].parameters(), "lr": self.hparams.rate},
        ]
        optimizer = torch.optim.SGD(groups, 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda epoch: 0.5**epoch])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def merge(kind=Lit, **others):
    torch.manual_seed(0)
    models = {"a": kind(3, 0.1), "b": kind(4, 0.2)}
    return ZipIt(trainer()).merge(models, DataLoader(X, 8), backbone="net", matcher=Average(), refine=None, **others)


def fit(module, loaders, epochs=1, **options):
    runner = trainer(max_epochs=epochs, **options)
    runner.fit(module, loaders)
    return runner


def by_hand(merged, batches, weights=(1.0, 1.0), rate=0.1):
    """The parameters after steps of plain gradient descent."""
    module = copy.deepcopy(merged).train()
    for own in batches:
        terms = zip("ab", own, weights, strict=True)
        losses = [weight * F.cross_entropy(module(x, task=task), y) for task, (x, y), weight in terms]
        gradients = torch.autograd.grad(sum(losses), list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return dict(module.named_parameters())


def same(found, expected):
    return all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in found)


@pytest.mark.parametrize("by_name", [True, False])
def test_fit_descends_on_the_sum_of_the_sources_losses(by_name):
    merged = merge()
    loaders = {"a": FIRST, "b": FIRST} if by_name else [FIRST, FIRST]
    expected = by_hand(merged, [(batch, batch) for batch in FIRST])
    runner = fit(merged, loaders)
    assert same(merged.named_parameters(), expected)
    metrics = runner.callback_metrics
    assert {"a/train_loss", "b/train_loss", "a/loss", "b/loss", "loss"} <= set(metrics)
    assert metrics["loss"] == pytest.approx((metrics["a/loss"] + metrics["b/loss"]).item())


def test_a_metric_is_averaged_over_the_samples_of_its_own_task():
    merged = merge().for_training(optimizer=partial(torch.optim.SGD, lr=0.0))
    uneven = DataLoader(TensorDataset(X[:11], Y[:11]), 8)
    runner = fit(merged, {"a": uneven, "b": FIRST})
    losses, counts = [], []
    merged.train()
    for x, y in uneven:
        losses.append(F.cross_entropy(merged(x, task="a"), y).item() * len(x))
        counts.append(len(x))
    assert runner.callback_metrics["a/train_loss"].item() == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_weights_an_optimizer_and_frozen_parts_are_arguments():
    merged = merge().for_training(optimizer=SGD, loss_weights={"b": 3.0}, freeze="trunk")
    before = {name: tensor.clone() for name, tensor in merged.trunk.state_dict().items()}
    reference = copy.deepcopy(merged)
    expected = {}
    for task, weight in (("a", 1.0), ("b", 3.0)):
        module = copy.deepcopy(reference)
        for x, y in FIRST:
            loss = weight * F.cross_entropy(module(x, task=task), y)
            gradients = torch.autograd.grad(loss, list(module.heads[task].parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(module.heads[task].parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
        expected |= {f"{task}.{name}": tensor for name, tensor in module.heads[task].named_parameters()}
    fit(merged, {"a": FIRST, "b": FIRST})
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.trunk.state_dict().items())
    assert same(merged.heads.named_parameters(), expected)


def test_loaders_of_different_lengths_and_a_part_of_the_tasks():
    merged = merge()
    head = copy.deepcopy(merged.heads["a"].state_dict())
    runner = fit(merged, {"b": SECOND})
    assert all(torch.equal(tensor, head[name]) for name, tensor in merged.heads["a"].state_dict().items())
    assert runner.global_step == 3
    assert fit(merge(), {"a": FIRST, "b": SECOND}).global_step == 3


@pytest.mark.parametrize("kind", [Lit, Grouped])
def test_the_first_sources_optimizer_and_scheduler_train_everything(kind):
    merged = merge(kind)
    runner = trainer(max_epochs=2)
    runner.fit(merged, {"a": FIRST, "b": FIRST}, {"a": FIRST, "b": FIRST})
    (optimizer,) = runner.optimizers
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(map(id, merged.parameters()))
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    trunk, first, second = (rates[id(next(part.parameters()))] for part in (merged.trunk, *merged.heads.values()))
    if kind is Lit:
        assert trunk == first == second == pytest.approx(0.1 * 0.25)
    else:
        assert (trunk, first, second) == pytest.approx((0.01, 0.1 * 0.25, 0.2 * 0.25))
        assert runner.lr_scheduler_configs[0].monitor == "a/val_loss"


def test_a_trained_merge_is_saved_and_resumed(tmp_path):
    merged = merge()
    runner = fit(merged, {"a": FIRST, "b": FIRST})
    runner.save_checkpoint(tmp_path / "fit.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "fit.ckpt")
    assert same(loaded.named_parameters(), dict(merged.named_parameters()))
    again = trainer(max_epochs=2)
    again.fit(loaded, {"a": FIRST, "b": FIRST}, ckpt_path=tmp_path / "fit.ckpt", weights_only=True)
    assert again.current_epoch == 2 and again.global_step == 4
    straight = merge()
    fit(straight, {"a": FIRST, "b": FIRST}, epochs=2)
    assert same(loaded.named_parameters(), dict(straight.named_parameters()))


def test_a_source_changes_the_step_of_its_optimizer():
    class Warming(Lit):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            self.steps = getattr(self, "steps", 0) + 1

    merged = merge(Warming)
    expected = by_hand(merged, [(batch, batch) for batch in FIRST])
    fit(merged, {"a": FIRST, "b": FIRST})
    assert same(merged.named_parameters(), expected)
    assert merged.sources["a"].steps == 2


class Manual(Lit):
    def __init__(self, classes: int = 3, rate: float = 0.1):
        super().__init__(classes, rate)
        self.automatic_optimization = False


class Untrained(LightningModule):
    def __init__(self, classes: int = 3, rate: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("kind", "loaders", "message"),
    [
        (Manual, {"a": FIRST, "b": FIRST}, "optimizes manually"),
        (Untrained, {"a": FIRST, "b": FIRST}, "has no training_step"),
        (Lit, FIRST, "1 dataloader for 2 tasks"),
        (Lit, {"a": FIRST, "z": FIRST}, "dataloaders for 'z'"),
        (Lit, {"a": [FIRST, FIRST], "b": FIRST}, "several dataloaders for task 'a'"),
    ],
)
def test_what_cannot_be_trained_is_said(kind, loaders, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(merge(kind), loaders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": {"z": 1.0}}, "`loss_weights` has the keys"),
        ({"freeze": "body"}, "`freeze` must contain only"),
        ({"lr_scheduler": lambda _: None}, "needs an `optimizer`"),
    ],
)
def test_arguments_of_training_are_checked(options, message):
    with pytest.raises(ConfigurationError, match=message):
        merge().for_training(**options)


class Custom(torch.optim.SGD):
    """An optimizer of the user's own."""


def test_what_for_training_sets_is_in_the_file_and_a_training_resumes(tmp_path):
    decay, data = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), {"a": FIRST, "b": SECOND}
    merged = merge().for_training(partial(torch.optim.Adam, lr=1e-3, betas=(0.8, 0.9)), decay, {"b": 2.0}, "heads")
    fit(merged, data).save_checkpoint(tmp_path / "tuned.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "tuned.ckpt")
    assert loaded._loss_weights == {"b": 2.0} and not any(each.requires_grad for each in loaded.heads.parameters())
    resumed = trainer(max_epochs=2)
    resumed.fit(loaded, data, ckpt_path=tmp_path / "tuned.ckpt", weights_only=True)
    (optimizer,) = resumed.optimizers
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 1e-3 * 0.25
    assert resumed.current_epoch == 2


@pytest.mark.parametrize("optimizer", [lambda parameters: torch.optim.SGD(parameters, 0.1), partial(Custom, lr=0.1)])
def test_an_optimizer_that_a_file_cannot_give_is_asked_for(optimizer, tmp_path):
    run = trainer()
    run.strategy.connect(merge().for_training(optimizer, freeze=["trunk"]))
    run.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.warns(UserWarning, match="does not give `optimizer` of `for_training`.*Call `for_training` again"):
        loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "own.ckpt")
    assert not any(each.requires_grad for each in loaded.trunk.parameters())
    if isinstance(optimizer, partial):
        loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "own.ckpt", trust=f"{__name__}.Custom")
        assert type(loaded.configure_optimizers()) is Custom


def test_manual_optimization_says_what_to_do():
    merged = merge()
    merged.sources["b"].automatic_optimization = False
    with pytest.raises(ConfigurationError, match=r"task 'b' optimizes manually. Train in a LightningModule"):
        fit(merged, {"a": FIRST, "b": SECOND})
