"""Sources stay as they were: networks that change themselves when they run, and functions that fail."""

from __future__ import annotations

import pytest
import torch
from helpers.nets import Wrap, images, trainer
from helpers.untouched import Snapshot, watched
from torch import nn

from lightning_zipit import Ensemble, MergeSettings, ZipIt, merge_backbones, trace
from lightning_zipit.errors import ZipItError


class Changing(nn.Module):
    """Three layers; what a forward changes is for subclasses."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.last = nn.Linear(5, 2)

    def change(self, x):
        pass

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        self.change(x)
        return self.last(torch.relu(self.conv2(x)).mean((2, 3)))


class CountsInBuffer(Changing):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def change(self, x):
        self.count = self.count + 1


class CountsInPlace(CountsInBuffer):
    def change(self, x):
        self.count += 1


class CountsInAttribute(Changing):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def change(self, x):
        self.calls += 1


class FillsCache(Changing):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def change(self, x):
        self.cache["features"] = x


class AppendsToList(Changing):
    def __init__(self):
        super().__init__()
        self.features = []

    def change(self, x):
        self.features.append(x)


class KeepsFeatures(Changing):
    def __init__(self):
        super().__init__()
        self.features = None

    def change(self, x):
        self.features = x


class KeepsInSubmodule(Changing):
    def change(self, x):
        self.norm.seen = x


class ComputesOnce(Changing):
    """A table that the first forward makes."""

    def __init__(self):
        super().__init__()
        self.table = None

    def change(self, x):
        if self.table is None:
            self.table = torch.arange(4.0)


CHANGING = [
    CountsInBuffer,
    CountsInPlace,
    CountsInAttribute,
    FillsCache,
    AppendsToList,
    KeepsFeatures,
    KeepsInSubmodule,
    ComputesOnce,
]


@pytest.mark.parametrize("network", CHANGING)
def test_a_network_that_changes_when_it_runs_is_traced_as_it_is(network):
    trace(network(), example_input=torch.randn(2, 3, 8, 8), verify=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("network", CHANGING)
def test_so_it_is_merged_without_a_trainer(network):
    merge_backbones({"a": network(), "b": network()}, [torch.randn(8, 3, 8, 8)])


@pytest.mark.parametrize("network", CHANGING)
def test_so_it_is_merged_with_one(network):
    models = {"a": Wrap(network()), "b": Wrap(network())}
    ZipIt(trainer()).merge(models, images(16, 8), backbone="net")
    Ensemble(models, "net")


@pytest.mark.parametrize("network", CHANGING)
def test_so_it_stays_where_a_merge_fails(network):
    networks = {"a": network(), "b": network()}
    with pytest.raises(ZipItError):
        trace(networks["a"], stop_at="nowhere", example_input=torch.randn(2, 3, 8, 8))
    with pytest.raises(ZipItError):
        merge_backbones(networks, [torch.full((8, 3, 8, 8), torch.nan)])


class FailsInForward(Changing):
    def change(self, x):
        self.seen = x
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "function",
    [
        lambda network: trace(network, example_input=torch.randn(2, 3, 8, 8)),
        lambda network: merge_backbones({"a": network, "b": FailsInForward()}, [torch.randn(8, 3, 8, 8)]),
    ],
)
def test_so_it_stays_where_its_own_forward_fails(function):
    with pytest.raises(ZipItError):
        function(FailsInForward())


def test_training_mode_and_gradients_of_some_parameters_are_kept():
    networks = {"a": Changing(), "b": Changing()}
    for network in networks.values():
        network.train()
        network.norm.eval()
        network.conv1.weight.requires_grad_(False)
        network(torch.randn(4, 3, 8, 8)).sum().backward()
    merge_backbones(networks, [torch.randn(16, 3, 8, 8)])
    merge_backbones(networks, [torch.randn(16, 3, 8, 8)], MergeSettings(refine="batch_norm"))


def test_reading_hyperparameters_leaves_nothing_behind():
    models = {"a": Wrap(Changing()), "b": Wrap(Changing())}
    ZipIt(trainer()).merge(models, images(16, 8), backbone="net")
    assert "_hparams" not in vars(models["a"])


def hooked():
    network = Changing()
    network.conv1.register_forward_hook(print)
    return network


CHANGES = {
    "a weight": lambda net: net.conv1.weight.data.add_(1e-7),
    "a parameter that is a new one": lambda net: setattr(net.conv1, "weight", nn.Parameter(net.conv1.weight.clone())),
    "a statistic": lambda net: net.norm.running_mean.add_(1),
    "a mode": lambda net: net.norm.eval(),
    "what asks for a gradient": lambda net: net.last.bias.requires_grad_(False),
    "a hook": lambda net: net.conv2.register_forward_hook(print),
    "a hook that is gone": lambda net: net.conv1._forward_hooks.clear(),
    "a new attribute": lambda net: setattr(net, "note", 1),
    "a type": lambda net: net.double(),
    "a module": lambda net: setattr(net, "conv2", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_watch_sees(change):
    network = hooked()
    assert Snapshot(network).changes() == []
    with pytest.raises(AssertionError, match="changed what it was given"):
        watched(change)(network)
