"""Matching by weights: with no data, and together with activations."""

import copy
from itertools import permutations

import pytest
import torch
from architectures import relative_error, unsettle
from helpers.nets import HandWrittenViT, Lit, PlainNet, SmallResNet, images, settle, trainer
from torch import nn
from torchvision.models import ShuffleNetV2

from lightning_zipit import MergeSettings, ZipIt, merge_backbones, trace
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.matchers import Average, DualSpace, GreedyZip, Permute, WeightMatching
from lightning_zipit.paths import AllHeads


def grouped(width):
    """Grouped convolutions behind each other, which tie their groups."""
    channels = 8 * width
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, groups=8), nn.ReLU(), nn.Conv2d(channels, 2 * channels, 3, groups=8)),
        *(nn.BatchNorm2d(2 * channels), nn.ReLU(), nn.Conv2d(2 * channels, 12, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


NETWORKS = {
    "plain": (PlainNet, 16),
    "residual": (SmallResNet, 16),
    "attention": (HandWrittenViT, 16),
    "groups": (lambda: grouped(8), 16),
    "depthwise": (lambda: grouped(1), 16),
    "shuffled": (lambda: ShuffleNetV2([2, 2, 2], [8, 16, 32, 48, 64], num_classes=5), 64),
}


@torch.no_grad()
@pytest.mark.parametrize("matcher", [WeightMatching(), WeightMatching(matcher=GreedyZip()), DualSpace()], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_is_found_by_its_weights(name, matcher):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    x = torch.randn(24, 3, size, size)
    net = unsettle(make(), x)
    graph = trace(net, example_input=x[:1])
    permuted = permute_spaces(net, graph, random_permutations(graph))
    merged = merge_backbones({"a": net, "b": permuted}, [x], MergeSettings(matcher=matcher, refine=None))
    assert relative_error(AllHeads(merged.trunk, merged.heads)(x), net(x)) < 1e-3
    assert all(space.across == space.size for space in merged.report.spaces)


class Perceptron(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("seed", range(4))
def test_weight_matching_is_the_best_of_all_permutations(seed):
    torch.manual_seed(seed)
    nets = [Perceptron(4), Perceptron(4)]
    settings = MergeSettings(matcher=WeightMatching(), refine=None, merge_heads=True)
    merged = merge_backbones(dict(zip("ab", nets, strict=True)), torch.randn(1, 8, 3), settings)
    rows = [
        nn.functional.normalize(torch.cat([net.first.weight, net.first.bias[:, None], net.last.weight.T], 1))
        for net in nets
    ]
    best = max(permutations(range(4)), key=lambda order: (rows[0] * rows[1][list(order)]).sum().item())
    expected = (nets[0].first.weight + nets[1].first.weight[list(best)]) / 2
    assert torch.allclose(merged.trunk.get_submodule("first").weight, expected, atol=1e-6)


def test_dual_space_with_tau_zero_matches_by_activations():
    nets = {task: settle(SmallResNet(), torch.randn(32, 3, 16, 16)) for task in "ab"}
    x = torch.randn(64, 3, 16, 16)
    one, other = (
        merge_backbones(nets, [x], MergeSettings(matcher=matcher, refine=None)).trunk.state_dict()
        for matcher in (DualSpace(tau=0.0), Permute())
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weight_matching_does_not_depend_on_data(tmp_path):
    torch.manual_seed(0)
    models = {task: Lit(5) for task in "ab"}
    for model in models.values():
        settle(model.net, torch.randn(32, 3, 16, 16))
    how = {"backbone": "net", "matcher": WeightMatching(), "refine": "batch_norm"}
    merges = [
        ZipIt(trainer()).merge(models, images(seed=seed), statistics=file, **how)
        for seed, file in enumerate((None, tmp_path / "s.safetensors"))
    ]
    first, second = (merged.state_dict() for merged in merges)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if "running" not in name)
    assert not torch.equal(first["trunk.bn1.running_mean"], second["trunk.bn1.running_mean"])


@pytest.mark.parametrize("similarity", ["absolute", "cosine", "covariance"])
def test_other_similarities_find_copies_too(similarity):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 16, 16)
    net = settle(SmallResNet(), x).eval()
    graph = trace(net)
    permuted = permute_spaces(net, graph, random_permutations(graph))
    settings = MergeSettings(matcher=Permute(), refine=None, similarity=similarity)
    merged = merge_backbones({"a": net, "b": permuted}, [x], settings)
    assert relative_error(AllHeads(merged.trunk, merged.heads)(x), net(x)) < 1e-3


def test_unknown_similarity_is_refused():
    with pytest.raises(ConfigurationError, match="similarity"):
        MergeSettings(similarity="distance")


def test_report_notes_sources_trained_from_the_same_initialisation():
    x = torch.randn(64, 3, 16, 16)
    net = settle(SmallResNet(), x)
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.std().item())

    def notes(other, matcher):
        settings = MergeSettings(matcher=matcher, refine=None)
        return " ".join(merge_backbones({"a": net, "b": other}, [x], settings).report.notes)

    assert "same initialisation" in notes(tuned, Permute()) and "100% of the features" in notes(tuned, Permute())
    assert "same initialisation" not in notes(tuned, Average())
    assert "same initialisation" not in notes(settle(SmallResNet(), x), Permute())
