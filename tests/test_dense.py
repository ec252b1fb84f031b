"""Networks whose merged features are linear combinations of the sources'."""

import copy
import json

import pytest
import torch
from helpers.nets import (
    HandWrittenViT,
    Lit,
    PlainNet,
    SmallResNet,
    images,
    settle,
    settled_pair,
    trainer,
)
from torch import nn

from lightning_zipit import MergeReport, MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit._matching.maps import DenseMap
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import AxisRef, Block, permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.graph.rigid import find_rigid
from lightning_zipit.matchers import CCA, AnyWidthMatcher, DenseMaps, DualSpace, Matcher, Permute
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.zip import Zip

EXACT = CCA(gamma=1e-9)


class LinearNet(nn.Module):
    """Convolutions with norms, a sum, a concatenation, a flatten: everything but activation functions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.block = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1))
        self.beside = nn.Conv2d(6, 4, 1)
        self.pool, self.flat = nn.AvgPool2d(4), nn.Flatten()
        self.hidden, self.head = nn.Linear(10 * 4, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        x = torch.cat([x, self.beside(x)], 1)
        return self.head(self.hidden(self.flat(self.pool(x))))


def mixed(net, seed=0):
    """A copy of a LinearNet that computes the same from other features: each space is mixed by a matrix of its own."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)

    def matrix(size):
        return torch.randn(size, size, generator=generator) / size + torch.eye(size)[torch.randperm(size)]

    def write(layer, norm, by):
        scale = torch.ones(len(by)) if norm is None else norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = layer.bias if norm is None else (layer.bias - norm.running_mean) * scale + norm.bias
        layer.weight.copy_(torch.tensordot(by, layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)), 1))
        layer.bias.copy_(by @ shift)
        if norm is not None:
            norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1), norm.bias.zero_()

    def read(layer, by):
        layer.weight.copy_(torch.tensordot(layer.weight, torch.linalg.inv(by), ([1], [0])).movedim(-1, 1))

    stream, inner, beside, hidden = map(matrix, (6, 5, 4, 7))
    with torch.no_grad():
        write(*net.stem, stream)
        read(net.block[0], stream)
        write(net.block[0], net.block[1], inner)
        read(net.block[2], inner)
        write(net.block[2], None, stream)
        read(net.beside, stream)
        write(net.beside, None, beside)
        read(net.hidden, torch.kron(torch.block_diag(stream, beside), torch.eye(4)))
        write(net.hidden, None, hidden)
        read(net.head, hidden)
    return net


def noise(count=64, size=8, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distance(merged, net, x, task="b"):
    """How far the output of one path is from that of a network, in deviations over samples."""
    expected = net(x)
    return float((merged.heads[task](*merged.trunk(x)) - expected).abs().max() / expected.std(0).mean())


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return settle(LinearNet(), noise())


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return settle(SmallResNet(), noise(size=16))


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("refine", [None, "least_squares"])
def test_a_linear_network_and_its_mixed_copies_merge_to_what_they_compute(linear, num_models, refine):
    nets = {
        name: net
        for name, net in zip("bcd", [linear, *(mixed(linear, seed) for seed in range(1, num_models))], strict=False)
    }
    x = noise(256)
    for net in nets.values():
        assert torch.allclose(net(x), linear(x), atol=1e-3)
    merged = merge_backbones(nets, [x], MergeSettings(matcher=EXACT, refine=refine))
    assert find_rigid(trace(linear)) == {} and merged.report.notes == ()
    permuted = merge_backbones(nets, [x], MergeSettings(matcher=Permute(), refine=None))
    for task in nets:
        assert distance(merged, linear, x, task) < (1e-3 if refine is None else 0.1)
    assert distance(permuted, linear, x) > 1


@pytest.mark.parametrize(
    ("refine", "gamma"), [(None, 1e-6), ("batch_norm", 0.1), ("repair", 10.0), ("least_squares", 0.1)]
)
def test_a_network_and_its_copies_merge_to_what_they_compute(residual, refine, gamma):
    x = noise(size=16)
    graph = trace(residual)
    shuffled = permute_spaces(residual, graph, random_permutations(graph, torch.Generator().manual_seed(1)))
    for other in (residual, shuffled):
        merged = merge_backbones({"a": residual, "b": other}, [x], MergeSettings(matcher=CCA(gamma), refine=refine))
        assert distance(merged, residual, x) < 1e-3
        assert min(space.similarity for space in merged.report.spaces) > 0.999
        assert max(max(space.losses) for space in merged.report.spaces) < 1e-3


def test_fitted_layers_of_copies_compute_the_same(residual):
    x = noise(128, size=16)
    merged = merge_backbones({"a": residual, "b": residual}, [x], MergeSettings(matcher=CCA(), refine="least_squares"))
    assert distance(merged, residual, x) < 0.05


def test_the_target_of_a_fit_is_the_product_with_the_matrices():
    maps = {"s": DenseMap(DenseMaps(tuple(torch.randn(2, 4, 4).double()), tuple(torch.randn(2, 4, 4).double())))}
    ref = AxisRef((Block("s", range(1, 5)),), "producer", 5)
    values = torch.randn(2, 30, 5)
    zipped = Zip(torch.tensor([0.25, 0.75]), ref, maps)
    matrices = [
        torch.block_diag(share, own) for share, own in zip(zipped.shares, maps["s"].matrices.merge, strict=True)
    ]
    expected = sum(value.double() @ matrix.T for value, matrix in zip(values, matrices, strict=True))
    torch.testing.assert_close(zipped(list(values)), expected.float())


@torch.no_grad()
def test_a_network_merged_with_itself_has_its_own_weights(residual):
    x = noise(size=16)
    merged = merge_backbones({"a": residual, "b": residual}, [x], MergeSettings(matcher=CCA(), refine=None))
    for name, found in merged.trunk.state_dict().items():
        assert torch.allclose(found, residual.state_dict()[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("source", [0, 1])
def test_with_all_the_weight_on_one_linear_network_it_is_that_network(linear, source):
    other = settle(LinearNet(), noise(seed=5))
    nets, weights, x = [linear, other], [0.0, 0.0], noise(256)
    weights[source] = 1.0
    settings = MergeSettings(matcher=CCA(1e-3), refine=None, weights=weights)
    merged = merge_backbones(dict(zip("ab", nets, strict=True)), [x], settings)
    assert distance(merged, nets[source], x, "ab"[source]) < 1e-3


def test_heads_unmerge_what_they_cannot_take_into_their_weights(tmp_path):
    models = settled_pair()
    models["a"].net.load_state_dict(
        {**models["b"].net.state_dict(), **{k: v for k, v in models["a"].net.state_dict().items() if "linear" in k}}
    )
    x = noise(48, size=16)
    loaders = images(48)
    merge = {"backbone": "net", "stop_at": "layer2.0.conv1", "refine": None}
    found = ZipIt(trainer()).merge(models, loaders, matcher=CCA(), **merge)
    assert any("matrix" in name for name in found.state_dict())
    for task, model in models.items():
        assert torch.allclose(found(x, task=task), model(x), atol=1e-3)
    run = trainer()
    run.strategy.connect(found)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert torch.equal(loaded(x, task="a"), found(x, task="a"))
    third = Lit(4)
    third.net.load_state_dict(
        {**models["b"].net.state_dict(), **{k: v for k, v in third.net.state_dict().items() if "linear" in k}}
    )
    for matcher in (CCA(), Permute()):
        again = ZipIt(trainer()).merge({"both": loaded, "c": third.eval()}, loaders, matcher=matcher, **merge)
        for task, model in {**models, "c": third}.items():
            assert torch.allclose(again(x, task=task), model(x), atol=1e-3), (task, matcher)


class Separable(nn.Sequential):
    """A depthwise convolution between two others."""

    def __init__(self):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
        layers += [nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(10, 5))


RIGID = {
    "attention": (HandWrittenViT, 16),
    "depthwise": (Separable, 16),
    "flattened": (PlainNet, 16),
}


@pytest.mark.parametrize("name", RIGID)
def test_rigid_spaces_are_matched_one_to_one_and_reported(name):
    make, size = RIGID[name]
    torch.manual_seed(0)
    x = noise(48, size=size)
    net = settle(make(), x)
    rigid = find_rigid(trace(net, example_input=x[:1]))
    merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, [x], MergeSettings(matcher=CCA()))
    assert distance(merged, net, x) < 1e-2
    notes = [note for note in merged.report.notes if note.startswith("Matched one to one")]
    assert len(notes) == bool(rigid)
    if name == "flattened":
        assert not rigid
    else:
        measured = [space.name for space in merged.report.spaces if space.tap]
        assert rigid and all(f"`{space}`" in notes[0] for space in rigid if space in measured)
        assert name != "depthwise" or any(space not in rigid for space in measured)


def test_norms_per_task_have_the_moments_of_their_own_source(residual):
    x, other = noise(size=16), copy.deepcopy(residual)
    settings = MergeSettings(matcher=CCA(), refine=BatchNorm(per_task=True))
    merged = merge_backbones({"a": residual, "b": other}, [[x], [x]], settings)
    for task in "ab":
        found = merged.heads[task](*merged.trunk(x, task))
        assert torch.allclose(found, residual(x), atol=1e-2)


class Turned(Matcher):
    """Maps that turn features; of spaces of 8 features alone."""

    similarity = "covariance"

    def __init__(self, cut=None):
        self.cut = cut

    def __call__(self, similarity, num_models):
        size = len(similarity) // num_models
        if size != 8:
            return Permute()(similarity, num_models)
        turn = tuple(torch.eye(size) for _ in range(num_models))
        return DenseMaps(tuple(each / num_models for each in turn), tuple(each[:, : self.cut] for each in turn))


def test_a_matcher_may_return_labels_of_some_spaces_and_matrices_of_others(residual):
    x = noise(size=16)
    report = merge_backbones({"a": residual, "b": residual}, [x], MergeSettings(matcher=Turned(), refine=None)).report
    assert {space.size for space in report.spaces} == {8, 16}
    assert MergeReport.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()
    with pytest.raises(ConfigurationError, match=r"\(8, 8\).*\(8, 7\)"):
        merge_backbones({"a": residual, "b": residual}, [x], MergeSettings(matcher=Turned(7)))


class TwoOfEach(AnyWidthMatcher):
    """Leaves any width, with matrices; nothing is merged at twice the width."""

    similarity = "covariance"

    def __call__(self, similarity, num_models, width=None):
        size = len(similarity) // num_models
        merge = torch.eye(width or size, num_models * size)
        return DenseMaps(merge.split(size, 1), merge.T.split(size))


def test_matrices_may_change_the_width(linear):
    other, x = settle(LinearNet(), noise(seed=5)), noise(128)
    settings = MergeSettings(matcher=TwoOfEach(), refine=None, width=2.0)
    merged = merge_backbones({"a": linear, "b": other}, [x], settings)
    assert distance(merged, linear, x, "a") < 1e-3 and distance(merged, other, x, "b") < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 1.5}, "CCA cannot change the number of features"),
        ({"similarity": "cosine"}, "CCA always uses the covariance"),
    ],
)
def test_merge_settings_refuse_bad_options_for_cca(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MergeSettings(matcher=CCA(), **settings)


def test_dual_space_refuses_cca():
    with pytest.raises(ValueError, match="covariance"):
        DualSpace(matcher=CCA())


class Gate(nn.Module):
    """Adds its mean over the features."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


OBSTACLES = {
    "free": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), {}),
    "depthwise": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1)),
        {"0": "depthwise"},
    ),
    "norm first": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), {"0": "`2`"}),
    "norm of batches": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1)),
        {"0": "`1`"},
    ),
    "norm without scale": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)),
        {"0": "`1`"},
    ),
    "layer norm": (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)),
        {"0": "`1`"},
    ),
    "slopes": (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), {"0": "`1`"}),
    "mean of features": (nn.Sequential(nn.Conv2d(3, 4, 1), Gate(), nn.Conv2d(4, 2, 1)), {"0": "reduces over"}),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_features_can_be_mixed_where_only_layers_and_their_norms_know_them(name):
    net, expected = OBSTACLES[name]
    found = find_rigid(trace(net))
    assert list(found) == list(expected)
    for space, why in expected.items():
        assert why in found[space]
