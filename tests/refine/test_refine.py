"""Refinements that go through the layers: least squares and REPAIR."""

import copy

import numpy as np
import pytest
import torch
from architectures import relative_error
from helpers.nets import (
    HandWrittenViT,
    PlainNet,
    SmallResNet,
    images,
    settle,
    settled_pair,
    torchvision_net,
    trainer,
)
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import DenseNet, ShuffleNetV2

from lightning_zipit import MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit.errors import ConfigurationError, StatisticsError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.graph.taps import before_activations
from lightning_zipit.matchers import Average, GreedyZip
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine import LeastSquares, Repair
from lightning_zipit.refine.frontier import Frontier
from lightning_zipit.refine.normal_equations import NormalEquations
from lightning_zipit.refine.patches import patches, samples

EVERYTHING = {"positions": None}

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (nn.Linear(6, 4), (5, 7, 6)),
    "one by one": (nn.Conv2d(6, 4, 1), (3, 6, 5, 4)),
    "strided": (nn.Conv2d(6, 4, 3, stride=2, padding=1), (3, 6, 9, 8)),
    "dilated, rectangular": (nn.Conv2d(6, 4, (3, 1), dilation=2, padding=(2, 1)), (3, 6, 9, 8)),
    "reflecting": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 9, 8)),
    "same": (nn.Conv2d(6, 4, 4, padding="same"), (3, 6, 9, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (3, 6, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (3, 6, 9, 8)),
    "one dimension": (nn.Conv1d(6, 4, 3, stride=2, padding=2), (3, 6, 9)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_times_weights_equal_the_layer_output(name, memory_format):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    if x.ndim == 4:
        x = x.to(memory_format=memory_format)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    positions = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2]])[: len(x)] if x.ndim > 2 else None
    for chosen in (None, positions):
        product = (patches(layer, x, chosen) @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
        assert torch.allclose(product, samples(layer, layer(x), chosen), atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
@pytest.mark.parametrize("intercept", [True, False])
def test_normal_equations_equal_dense_least_squares(ridge, intercept):
    torch.manual_seed(0)
    x, prior = torch.randn(2, 300, 5).double() + 2, torch.randn(2, 3, 5).double()
    target = x @ torch.randn(2, 5, 3).double() + torch.randn(2, 300, 3).double() + 4
    equations = NormalEquations(2, 5, 3, x.device)
    for part in (slice(100), slice(100, 300)):
        equations.add(x[:, part], target[:, part])
    weight, bias = equations.centred().solve(prior, ridge, intercept)
    for group in range(2):
        mean = x[group].mean(0) if intercept else torch.zeros(5)
        offset = target[group].mean(0) if intercept else torch.zeros(3)
        centred = (x[group] - mean).numpy()
        strength = ridge * np.square(x[group].numpy()).mean()
        rows = np.concatenate([centred, np.sqrt(300 * strength) * np.eye(5)])
        wanted = np.concatenate([(target[group] - offset).numpy(), np.sqrt(300 * strength) * prior[group].T.numpy()])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
        assert np.allclose(weight[group].numpy(), expected, atol=1e-4)
        assert np.allclose(
            bias[group].numpy(), (offset - torch.from_numpy(expected).to(mean) @ mean).numpy(), atol=1e-3
        )


def test_explained_variance_equals_that_of_the_residuals():
    x = torch.randn(1, 400, 5)
    target = x @ torch.randn(5, 3) + torch.randn(400, 3)
    equations = NormalEquations(1, 5, 3, x.device)
    equations.add(x, target)
    centred = equations.centred()
    weight, bias = centred.solve(torch.zeros(1, 3, 5), 1e-6)
    residual = target[0] - x[0] @ weight[0].T.float() - bias[0].float()
    assert centred.explained(weight, bias) == pytest.approx(
        1 - (residual.var(0).sum() / target[0].var(0).sum()).item(), abs=1e-4
    )


def test_normal_equations_of_constant_or_equal_inputs_have_a_solution():
    x = torch.randn(1, 50, 1).expand(1, 50, 6).clone()
    x[..., 0] = 3
    equations = NormalEquations(1, 6, 2, x.device)
    equations.add(x, x[..., 1:3])
    weight, bias = equations.centred().solve(torch.zeros(1, 2, 6), 1e-9)
    assert weight.isfinite().all() and torch.allclose(
        x[0] @ weight[0].T.float() + bias[0].float(), x[0, :, 1:3], atol=1e-3
    )


NETWORKS = {
    "residual": (SmallResNet, 16, ("layer1.0", "layer1.1.conv1")),
    "no norm": (PlainNet, 16, ("features.2",)),
    "attention": (HandWrittenViT, 16, ("blocks.0",)),
    "depthwise": (lambda: torchvision_net("mobilenet_v3_small", width_mult=0.4), 64, ("features.4",)),
    "concatenated": (lambda: torchvision_net("squeezenet1_1"), 64, ("features.4",)),
    "shuffled": (lambda: ShuffleNetV2([2, 2, 2], [8, 16, 32, 48, 64], num_classes=5), 64, ("stage2",)),
    "norm first": (lambda: DenseNet(8, (2, 2), 16, num_classes=5), 32, ("features.denseblock1",)),
}


def by_name(*nightly):
    return [pytest.param(name, marks=pytest.mark.nightly if name in nightly else ()) for name in NETWORKS]


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "tolerance"), [(LeastSquares(), 1e-3), (Repair(**EVERYTHING), 2e-2)], ids=["least squares", "repair"]
)
@pytest.mark.parametrize("name", by_name("depthwise", "concatenated"))
def test_a_model_merged_with_a_permuted_copy_stays_the_same_function(name, how, tolerance):
    if isinstance(how, Repair) and name == "concatenated":
        pytest.skip("REPAIR averages the moments of features that are never active, which may wake them")
    torch.manual_seed(0)
    make, size, cuts = NETWORKS[name]
    x = torch.randn(64 if size < 32 else 24, 3, size, size)
    net = settle(make(), x).eval()
    graph = trace(net, example_input=x[:1])
    permuted = permute_spaces(net, graph, random_permutations(graph))
    for stop_at in (None, *cuts):
        merged = merge_backbones({"a": net, "b": permuted}, list(x.split(16)), MergeSettings(stop_at, refine=how))
        assert relative_error(AllHeads(merged.trunk, merged.heads)(x[:8]), net(x[:8])) < tolerance, stop_at


@torch.no_grad()
@pytest.mark.parametrize("name", by_name("depthwise", "concatenated", "shuffled"))
def test_least_squares_is_closer_to_the_sources_than_zipping(name):
    torch.manual_seed(0)
    make, size, cuts = NETWORKS[name]
    x = torch.randn(96 if size < 32 else 32, 3, size, size)
    nets = {task: settle(make(), x).eval() for task in "ab"}

    def distance(refine, stop_at):
        merged = merge_backbones(nets, list(x.split(16)), MergeSettings(stop_at, refine=refine))
        outputs = AllHeads(merged.trunk, merged.heads)(x)
        return sum(((outputs[task] - net(x)).square().mean() / net(x).var()).item() for task, net in nets.items())

    for stop_at in (None, cuts[0]):
        assert distance("least_squares", stop_at) < 0.7 * distance("batch_norm", stop_at), stop_at


def merge(models, refine, **arguments):
    data = [images(), images(40, seed=1)]
    return ZipIt(trainer()).merge(models, data, backbone="net", refine=refine, **arguments)


@pytest.fixture(scope="module")
def models():
    return settled_pair()


@pytest.mark.parametrize("stop_at", [None, "layer1"])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_activations_beyond_cache_bytes_are_recomputed(models, stop_at, cache_bytes, monkeypatch):
    """All of them, or those of the first layers only: the last hold fewer positions."""
    batches_kept = []

    def visit(self, ends, visit=Frontier.visit):
        yield from visit(self, ends)
        batches_kept.append(len(self._kept))

    kept = merge(models, LeastSquares(), stop_at=stop_at).state_dict()
    monkeypatch.setattr(Frontier, "visit", visit)
    recomputed = merge(models, LeastSquares(cache_bytes=cache_bytes), stop_at=stop_at).state_dict()
    assert all(torch.equal(tensor, recomputed[name]) for name, tensor in kept.items())
    assert (min(batches_kept) == 0) and (max(batches_kept) > 0) == (cache_bytes > 0)


@pytest.mark.parametrize("positions", [9, None])
def test_refinement_does_not_depend_on_the_split_into_batches(models, positions):
    """Not even where the inputs of a layer hardly vary: noise, averaged over positions, looks always the same."""
    x = [torch.randn(45, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    eights, fives = (
        ZipIt(trainer())
        .merge(models, [DataLoader(part, size) for part in x], backbone="net", refine=LeastSquares(positions))
        .state_dict()
        for size in (8, 5)
    )
    for name, tensor in eights.items():
        assert torch.allclose(tensor, fives[name], rtol=0, atol=1e-5), name


def test_refined_module_can_be_saved(models, tmp_path):
    run = trainer()
    merged = ZipIt(run).merge(models, images(), backbone="net", refine="least_squares")
    run.save_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    again = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    x = torch.randn(4, 3, 16, 16)
    assert all(torch.equal(output, again(x)[task]) for task, output in merged.eval()(x).items())
    assert again.report.fits == merged.report.fits


def test_report_lists_fits_and_skipped_layers(models):
    report = merge(models, "least_squares", stop_at="layer1").report
    assert "trunk.layer1.1.conv2" in report.fits and "heads.b.linear" in report.fits
    assert all(0 < fit <= 1 for fit in report.fits.values())
    assert "layers were fitted" in str(report) and not any("The refinement skipped" in note for note in report.notes)

    class Recurring(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x).relu()).relu()).relu())

    merged = merge_backbones(
        {task: Recurring() for task in "ab"}, torch.randn(2, 16, 6), MergeSettings(refine="least_squares")
    )
    assert any("The refinement skipped these layers: `trunk.again` (" in note for note in merged.report.notes)
    assert set(merged.report.fits) == {"trunk.first", "heads.a.last", "heads.b.last"}


def test_batch_norms_have_the_statistics_of_their_inputs():
    """So that fine-tuning starts from the fitted network."""
    torch.manual_seed(0)
    x = torch.randn(256, 3, 16, 16)
    nets = {task: settle(SmallResNet(), x) for task in "ab"}
    merged = merge_backbones(nets, [x], MergeSettings(refine=LeastSquares(positions=None)))
    network = AllHeads(merged.trunk, merged.heads)
    with torch.no_grad():
        fitted = network.eval()(x)
        trained = network.train()(x)
    assert all((trained[task] - output).abs().mean() < 1e-2 * output.std() for task, output in fitted.items())


def test_repair_sets_the_mean_standard_deviation_of_the_sources():
    torch.manual_seed(0)
    x = torch.randn(128, 3, 16, 16)
    nets = {task: PlainNet() for task in "ab"}
    settings = MergeSettings(matcher=Average(), refine=Repair(positions=None))
    merged = merge_backbones(nets, [x], settings)
    with torch.no_grad():
        own = merged.trunk.get_submodule("features.0")(x)
        sources = [net.features[0](x) for net in nets.values()]
    for moment in (torch.mean, torch.std):
        expected = sum(moment(value, (0, 2, 3)) for value in sources) / 2
        assert torch.allclose(moment(own, (0, 2, 3)), expected, rtol=1e-3, atol=1e-4)


def test_pre_activations_are_matched_for_least_squares(models, tmp_path):
    """In front of their activation function, unless it is asked for otherwise: that is then the matching of zipping."""
    behind, in_front = LeastSquares(pre_activations=False), LeastSquares()
    file = tmp_path / "statistics.safetensors"
    plain, same, other = (merge(models, refine) for refine in ("batch_norm", behind, in_front))

    def matched(merged):
        return [(space.name, space.across, space.similarity) for space in merged.report.spaces]

    assert matched(plain) == matched(same) != matched(other)
    merge(models, "batch_norm", statistics=file)
    merge(models, behind, statistics=file)
    with pytest.raises(StatisticsError, match="pre_activations"):
        merge(models, in_front, statistics=file)


def test_taps_move_in_front_of_activations_only():
    spaces = before_activations(trace(SmallResNet())).spaces
    assert [spaces[name].tap.node for name in ("conv1", "layer1.0.conv1")] == ["add_1", "layer1_0_bn1"]
    pooled = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(4, 2, 1)))
    assert [graph.spaces["0"].tap.node for graph in (pooled, before_activations(pooled))] == ["_3", "_2"]


def test_merged_heads_are_fitted(models):
    same = {"a": models["a"], "b": copy.deepcopy(models["a"])}
    merged = merge(same, "least_squares", merge_heads=True)
    x = torch.randn(8, 3, 16, 16)
    outputs = merged.eval()(x)
    assert torch.equal(outputs["a"], outputs["b"])
    assert relative_error(outputs, models["a"].eval()(x)) < 5e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergeSettings(refine="nothing"), "'repair', 'least_squares'"),
        (lambda: MergeSettings(refine=GreedyZip()), "LeastSquares"),
        (lambda: LeastSquares(positions=0), "positions"),
        (lambda: LeastSquares(ridge=0), "ridge"),
        (lambda: Repair(cache_bytes=-1), "cache_bytes"),
    ],
)
def test_refinement_refuses_bad_settings(make, message):
    with pytest.raises((ConfigurationError, ValueError), match=message):
        make()
