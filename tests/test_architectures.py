"""Networks that were never written for this package, merged with copies of themselves."""

import copy

import pytest
import torch
from helpers.nets import PlainNet, SmallResNet, settle, torchvision_net

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.verify import random_permutations
from lightning_zipit.session import AllHeads

SMALL = {"small_resnet": (SmallResNet, ("layer1.0", "layer2")), "plain": (PlainNet, ("features.0", "classifier.1"))}
TORCHVISION = {
    "resnet18": ("layer2", "layer3.0.bn1"),
    "resnet34": ("layer2.1", "layer3"),
    "resnet50": ("layer1", "layer2.0.conv2"),
    "wide_resnet50_2": ("layer1", "layer2.0"),
    "vgg11": ("features.8", "classifier.1"),
    "vgg11_bn": ("features.0", "avgpool"),
    "alexnet": ("features.6", "avgpool"),
    "densenet121": ("features.denseblock2.denselayer3", "features.transition2"),
    "squeezenet1_0": ("features.6", "features.3.squeeze"),
    "squeezenet1_1": ("features.6", "features.10"),
    "googlenet": ("inception4a", "inception3a.branch2"),
    "mobilenet_v2": ("features.7", "features.3.conv.1"),
}
CASES = {**SMALL, **{name: (name, cuts) for name, cuts in TORCHVISION.items()}}


def make(name):
    source, cuts = CASES[name]
    net = source() if callable(source) else torchvision_net(source)
    size = 16 if callable(source) else 64
    x = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(0))
    return settle(net, x), x, cuts


def relative_error(outputs, expected):
    return max(((output - expected).abs().max() / expected.abs().max()).item() for output in outputs.values())


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_model_merged_with_its_copy_gives_the_same_function(name):
    net, x, cuts = make(name)
    expected = net(x[:4])
    for stop_at in (None, *cuts):
        settings = MergeSettings(stop_at, refine=None, verify=False)
        merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, list(x[None]), settings)
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x[:4]), expected) < 1e-4, stop_at


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_table_of_axes_is_proven_by_permuting_every_space(name):
    net, x, cuts = make(name)
    for stop_at in (None, *cuts):
        trace(net, stop_at, verify=x[:2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["small_resnet", "plain", "resnet18", "vgg11_bn", "squeezenet1_1", "densenet121"])
def test_a_model_merged_with_a_permuted_copy_gives_the_same_function(name):
    net, x, cuts = make(name)
    whole = trace(net)
    permuted = permute_spaces(net, whole, random_permutations(whole))
    expected = net(x[:4])
    assert relative_error({"permuted": permuted(x[:4])}, expected) < 1e-4
    for stop_at in (None, *cuts):
        settings = MergeSettings(stop_at, refine=None, verify=False)
        merged = merge_backbones({"a": net, "b": permuted}, list(x[None]), settings)
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x[:4]), expected) < 1e-4, stop_at
