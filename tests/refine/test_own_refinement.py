"""Refinements of a user's own."""

import copy

import pytest
import torch
from helpers.nets import SmallResNet, images, settle, settled_pair, trainer
from torch import nn

from lightning_zipit import MergeSettings, ZipIt, merge_backbones
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.refine import BatchNorm, Changes, LeastSquares, MergedNetworks, Refinement, Refining, Repair
from lightning_zipit.refine.refiner import Refiner

X = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class MatchMeans(Refinement):
    """Shift the last bias of each head so that its mean output is that of its source."""

    def start(self, merged):
        return MatchingMeans(merged)


class MatchingMeans(Refining):
    def __init__(self, merged):
        super().__init__(merged)
        self.gaps = {task: [] for task in merged.heads}

    def add(self, inputs, tasks):
        for task in tasks:
            self.gaps[task].append(self.merged.source_output(inputs, task) - self.merged.output(inputs, task))

    def finish(self):
        for task, head in self.merged.heads.items():
            head.linear.bias += torch.cat(self.gaps[task]).mean(0)
        return Changes(fits={f"heads.{task}.linear": 0.5 for task in self.gaps}, notes=("Means match.",))


class Calls(Refinement):
    """Calls a function on the merged networks in the end."""

    def __init__(self, change):
        self.change = change

    def start(self, merged):
        return Calling(merged, self.change)


class Calling(Refining):
    def __init__(self, merged, change):
        super().__init__(merged)
        self.change = change

    def add(self, inputs, tasks):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()

    def finish(self):
        self.change(self.merged)
        return Changes()


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return {task: settle(SmallResNet(), X) for task in "ab"}


@torch.no_grad()
@pytest.mark.parametrize("stop_at", [None, "layer1"])
def test_own_refinement_shifts_each_head_to_the_mean_of_its_source(nets, stop_at):
    merged = merge_backbones(nets, X.split(16), MergeSettings(stop_at, refine=MatchMeans()))
    for task, net in nets.items():
        output = merged.heads[task](*merged.trunk(X))
        torch.testing.assert_close(output.mean(0), net.eval()(X).mean(0), rtol=1e-3, atol=1e-4)
    assert merged.report.fits == {"heads.a.linear": 0.5, "heads.b.linear": 0.5}
    assert "Means match." in merged.report.notes and "Means match." in str(merged.report)


def test_own_refinement_runs_in_a_trainer():
    """Where batches are made in inference mode."""
    merged = ZipIt(trainer()).merge(settled_pair(), images(), backbone="net", refine=MatchMeans())
    assert set(merged.report.fits) == {"heads.a.linear", "heads.b.linear"}


def refined(merged, nets, change):
    """Refine merged networks in place."""
    models = {task: number for number, task in enumerate(nets)}
    parts = MergedNetworks(
        merged.trunk, merged.heads, merged.stems, nets, merged.graphs, {}, models, None, torch.device("cpu")
    )
    refiner = Refiner(Calls(change), parts)
    refiner.add(X, list(nets))
    return refiner.finish()


def spoil(merged):
    merged.trunk.conv1.weight.zero_()
    merged.heads["b"].linear.bias[0] = float("nan")


def test_own_refinement_changes_all_merged_networks_or_none(nets):
    merged = merge_backbones(nets, X.split(16), MergeSettings(refine=None))
    before = copy.deepcopy(merged.trunk.state_dict())
    with pytest.raises(CalibrationError, match=r"`heads\.b\.linear\.bias`"):
        refined(merged, nets, spoil)
    assert all(torch.equal(tensor, merged.trunk.state_dict()[name]) for name, tensor in before.items())
    refined(merged, nets, lambda parts: parts.trunk.conv1.weight.zero_())
    assert not merged.trunk.conv1.weight.any()


def replace_layer(merged):
    merged.trunk.conv1 = nn.Conv2d(3, 5, 3, padding=1)


def add_bias(merged):
    merged.heads["a"].linear.extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(("change", "named"), [(replace_layer, r"trunk\.conv1\.weight"), (add_bias, r"linear\.extra")])
def test_own_refinement_may_not_change_the_structure(nets, change, named):
    with pytest.raises(ConfigurationError, match=rf"Calls .*{named}`"):
        merge_backbones(nets, X.split(16), MergeSettings(refine=Calls(change)))


def test_needs_data_of_own_refinement_decides_on_the_pass(nets):
    plain = {"a": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))}
    assert not BatchNorm().needs_data(plain.values()) and BatchNorm().needs_data(nets.values())
    assert LeastSquares().needs_data(plain.values()) and MatchMeans().needs_data(plain.values())


@pytest.mark.parametrize(
    ("how", "per_task", "pre_activations"),
    [
        (MatchMeans(), False, False),
        (BatchNorm(), False, False),
        (BatchNorm(per_task=True), True, False),
        (Repair(), False, False),
        (LeastSquares(), False, True),
        (LeastSquares(pre_activations=False), False, False),
    ],
)
def test_attributes_of_own_refinement_change_the_merge(how, per_task, pre_activations):
    assert (how.per_task, how.pre_activations) == (per_task, pre_activations)
