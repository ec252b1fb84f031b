"""Separate stems, a merged middle, separate heads."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from architectures import relative_error
from helpers.nets import LitSplit, PlainNet, SmallResNet, SplitNet, gray, images, settle, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import CalibrationStatistics, MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit import functional as ZF
from lightning_zipit._lightning.export import export_merged
from lightning_zipit.errors import ConfigurationError, StatisticsError, ZipItError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.matchers import Average, GreedyZip, Matcher, Permute
from lightning_zipit.paths import AllHeads
from lightning_zipit.refine import BatchNorm, LeastSquares

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))
TASKS = ("rgb", "gray")
FITTED = LeastSquares(positions=None, ridge=1e-6)


class UNet(nn.Module):
    """Values of the stem pass by the middle into the head."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.middle = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(True), nn.Conv2d(10, 8, 1))
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        wide = F.relu(self.first(x))
        deep = self.down(wide)
        return self.last(self.up(self.middle(deep) + deep) + wide)


def run(merged, inputs):
    return AllHeads(merged.trunk, merged.heads, merged.stems)(inputs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("made", "start_at", "stop_at", "refinements"),
    [
        (SmallResNet, "layer1", None, [None]),
        (SmallResNet, "layer1.0.conv2", "layer2.0", [None, "batch_norm", "repair", FITTED]),
        (SmallResNet, "layer1.1", "layer1", [None, "batch_norm"]),
        (PlainNet, "classifier", None, [None, FITTED]),
        (UNet, "middle", "middle", [None, "repair", FITTED]),
    ],
)
def test_a_permuted_copy_behind_its_own_stem_merges_to_the_same_function(made, start_at, stop_at, refinements):
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = settle(made(), x)
    graph = trace(net)
    copies = {"a": net, "b": permute_spaces(net, graph, random_permutations(graph)), "c": copy.deepcopy(net)}
    for refine in refinements:
        settings = MergeSettings(stop_at, GreedyZip(alpha=1.0), refine, start_at=start_at)
        merged = merge_backbones(copies, [x], settings)
        assert relative_error(run(merged, x), net(x)) < (2e-2 if refine else 1e-4), refine
        for task, source in copies.items():  # stems are the sources' own
            for name, tensor in merged.stems[task].state_dict().items():
                assert "merge" in name or torch.equal(tensor, source.state_dict()[name])


class OnlyFirst(Matcher):
    """Of the first model every two features become one, and the second model's become the rest."""

    def __call__(self, similarity, num_models):
        half = len(similarity) // 4
        return torch.cat([torch.arange(2 * half) // 2, half + torch.arange(2 * half) % half])


@torch.no_grad()
def test_a_stem_merges_its_own_features_and_is_silent_where_it_has_none():
    nets = {"a": SplitNet().eval(), "b": SplitNet().eval()}
    merged = merge_backbones(nets, [X], MergeSettings(matcher=OnlyFirst(), refine=None, start_at="body"))
    labels = torch.cat([torch.arange(8) // 2, 4 + torch.arange(8) % 4])
    matrices, _ = ZF.merge_matrices(labels, 2)
    for task, matrix in zip("ab", matrices, strict=True):
        (handed,) = merged.stems[task](X)
        alone = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-9)  # rows of M_i that sum to 1, or are 0
        torch.testing.assert_close(handed, torch.einsum("kc,ncij->nkij", alone, nets[task].stem(X)))
        assert (handed.flatten(2).abs().amax((0, 2)) == 0).sum() == 4


@torch.no_grad()
def test_weights_of_models_do_not_weaken_a_stem():
    nets = {"a": SplitNet().eval(), "b": SplitNet().eval()}
    settings = MergeSettings(matcher=Average(), refine=None, start_at="body", weights=[3, 1])
    (handed,) = merge_backbones(nets, [X], settings).stems["b"](X)
    torch.testing.assert_close(handed, nets["b"].stem(X))


@torch.no_grad()
def test_what_stems_hand_over_is_matched_one_to_one():
    nets = {"a": SplitNet().eval(), "b": SplitNet().eval(), "c": SplitNet().eval()}
    merged = merge_backbones(nets, [X], MergeSettings(matcher=GreedyZip(), refine=None, start_at="body"))
    stem, *others = merged.report.spaces
    assert (stem.name, stem.across, stem.within, stem.alone) == ("stem", 8, 0, 0)
    assert any(space.within for space in others)
    assert any("one to one" in note and "`stem`" in note for note in merged.report.notes)


@torch.no_grad()
def test_trunk_norms_see_every_task_on_its_own_data_and_stems_keep_theirs():
    torch.manual_seed(0)
    nets = {"a": settle(SplitNet(3), X), "b": settle(SplitNet(1), gray(X))}
    loaders = [[{"a": x, "b": gray(x)} for x in part.split(16)] for part in (X[:32], 2 * X[32:])]
    for per_task in (False, True):
        merged = merge_backbones(nets, loaders, MergeSettings(refine=BatchNorm(per_task), start_at="body"))
        means = {
            task: [merged.trunk.get_submodule("body.0")(*merged.stems[task](x[task])).mean((0, 2, 3)) for x in loader]
            for task, loader in zip("ab", loaders, strict=True)
        }
        norm = merged.trunk.get_submodule("body.1")
        if per_task:
            for task in "ab":
                assert torch.allclose(norm[task].running_mean, torch.stack(means[task]).mean(0), atol=1e-5)
        else:
            assert torch.allclose(norm.running_mean, torch.stack(means["a"] + means["b"]).mean(0), atol=1e-5)
            assert norm.num_batches_tracked == 4
        for task, net in nets.items():
            assert torch.equal(merged.stems[task].get_submodule("stem.1").running_mean, net.stem[1].running_mean)


@torch.no_grad()
def test_layers_are_fitted_to_all_paths():
    torch.manual_seed(0)
    nets = {"a": settle(SplitNet(3), X), "b": settle(SplitNet(1), gray(X))}
    views = {"a": X, "b": gray(X)}

    def error(refine):
        outputs = run(merge_backbones(nets, [views], MergeSettings(refine=refine, start_at="body")), views)
        return sum((outputs[task] - net(views[task])).pow(2).mean() for task, net in nets.items())

    assert error("least_squares") < 0.5 * error("batch_norm")


@torch.no_grad()
def test_costs_count_stem_and_trunk_of_every_task():
    nets = {"a": SplitNet(3).eval(), "b": SplitNet(1, deep=True).eval()}
    views = {"a": X, "b": F.interpolate(gray(X), scale_factor=2)}
    report = merge_backbones(nets, [views], MergeSettings(refine=None, start_at="body")).report
    assert report.merged.flops == report.ensemble.flops
    assert report.merged.parameters < report.ensemble.parameters
    assert report.sources["a"].flops != report.sources["b"].flops
    assert any("once for each task" in note for note in report.notes)


@torch.no_grad()
def test_widths_change_behind_the_stems_alone():
    torch.manual_seed(0)
    net = settle(SplitNet(), X)
    copies = {"a": net, "b": copy.deepcopy(net)}
    for width, flops in ((1.25, None), ("auto", 1.9)):
        settings = MergeSettings(refine=None, start_at="body", width=width, flops=flops)
        merged = merge_backbones(copies, [X], settings)
        widths = {space.name: space.width for space in merged.report.spaces}
        assert widths["stem"] == 8
        if flops is None:
            assert widths["body.0"] == 10 and relative_error(run(merged, X), net(X)) < 1e-4
        else:
            assert merged.report.merged.flops <= flops * merged.report.sources["a"].flops * (1 + 1e-6)
    assert any("outputs of the stems" in note for note in merged.report.notes)


# With a Trainer


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = {"rgb": LitSplit(3), "gray": LitSplit(1, num_classes=5)}
    settle(made["rgb"].net, X)
    settle(made["gray"].net, gray(X))
    return made


def views(batch):
    return {"rgb": batch[0], "gray": gray(batch[0])}


COLOUR = DataLoader(TensorDataset(X, LABELS), 16)
GRAY = DataLoader(TensorDataset(gray(X), LABELS), 16)
MERGE = {"backbone": "net", "start_at": "body", "get_input": views}


@pytest.fixture(scope="module")
def merged(models):
    return ZipIt(trainer()).merge(models, [COLOUR, COLOUR], **MERGE)


def equal(first, second):
    with torch.no_grad():
        one, other = first.eval()(views([X])), second.eval()(views([X]))
    return all(torch.equal(one[task], other[task]) for task in one)


@torch.no_grad()
def test_each_task_runs_its_own_step_behind_its_own_stem(merged, models):
    run = trainer()
    (colour, grey), wanted = run.test(merged, [COLOUR, GRAY], verbose=False), merged(views([X]))
    for task, result in zip(TASKS, (colour, grey), strict=True):
        accuracy = (wanted[task].argmax(-1) == LABELS).float().mean().item()
        assert result == {f"{task}/acc": pytest.approx(accuracy)}
    (result,) = run.validate(merged, {"gray": GRAY}, verbose=False)
    assert list(result) == ["gray/acc"]
    predictions = run.predict(merged, [COLOUR, GRAY])
    assert torch.equal(torch.cat(predictions[1]), wanted["gray"])
    assert torch.equal(merged(gray(X), task="gray"), wanted["gray"])
    assert list(merged({"gray": gray(X)})) == ["gray"]
    assert list(merged.stems) == list(TASKS) and merged.report.spaces[0].name == "stem"
    with pytest.raises(ConfigurationError, match=r"unknown tasks 'sonar': the tasks of this network are"):
        merged({"sonar": X})


def test_it_is_saved_copied_and_pickled_whole(merged, tmp_path):
    run = trainer()
    run.strategy.connect(merged)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    torch.load(tmp_path / "merged.ckpt", weights_only=True)
    read = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    assert equal(merged, read) and read.report == merged.report
    assert {task: x.shape[1:] for task, x in read.example_input.items()} == {"rgb": (3, 8, 8), "gray": (1, 8, 8)}
    twin = copy.deepcopy(merged)
    assert equal(merged, twin) and equal(merged, pickle.loads(pickle.dumps(merged)))
    twin.stems["gray"] = copy.deepcopy(twin.stems["gray"]).requires_grad_(False)
    for parameter in twin.stems["gray"].parameters():
        parameter.zero_()
    with torch.no_grad():
        assert torch.equal(twin.sources["gray"](gray(X)), twin(gray(X), task="gray"))
        assert not torch.equal(twin.sources["gray"](gray(X)), merged.sources["gray"](gray(X)))


@torch.no_grad()
def test_it_exports_with_an_input_for_each_task(merged, tmp_path):
    assert export_merged(merged, tmp_path / "merged.pt2") == list(TASKS)
    program = torch.export.load(tmp_path / "merged.pt2").module()
    outputs = program({"rgb": X[:5], "gray": gray(X[:3])})
    torch.testing.assert_close(outputs["rgb"], merged(X[:5], task="rgb"))
    torch.testing.assert_close(outputs["gray"], merged(gray(X[:3]), task="gray"))
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_merged(merged, tmp_path / "merged.onnx")
    session = runtime.InferenceSession(tmp_path / "merged.onnx")
    found = session.run(list(TASKS), {"input.rgb": X[:5].numpy(), "input.gray": gray(X[:3]).numpy()})
    torch.testing.assert_close(torch.tensor(found[1]), outputs["gray"], rtol=1e-4, atol=1e-5)


def test_statistics_hold_the_inputs_of_all_and_where_the_trunk_starts(models, merged, tmp_path):
    file = tmp_path / "statistics.safetensors"
    first = ZipIt(trainer()).merge(models, [COLOUR, COLOUR], **MERGE, refine=None, statistics=file)
    again = ZipIt(trainer()).merge(models, backbone="net", start_at="body", refine=None, statistics=file)
    assert equal(first, again)
    assert {task: x.shape for task, x in again.example_input.items()} == {
        task: x.shape for task, x in merged.example_input.items()
    }
    known = CalibrationStatistics.load(file)
    assert (known + known).example_of(TASKS)["gray"].tensors[0].shape == (1, 1, 8, 8)
    with pytest.raises(StatisticsError, match=r"start_at='body', but this merge has start_at='body\.1'"):
        ZipIt(trainer()).merge(models, backbone="net", start_at="body.1", refine=None, statistics=file)
    views = known.inputs["by_task"]
    dataclasses.replace(known, inputs={"by_task": {**views, "gray": {"tensor": "no_type"}}}).save(file)
    with pytest.raises(StatisticsError, match="cannot be read as a statistics file"):
        CalibrationStatistics.load(file)
    dataclasses.replace(known, inputs={"by_task": {"rgb": views["rgb"]}}).save(file)
    with pytest.raises(StatisticsError, match="1 views of a sample, but this merge has 2 tasks"):
        ZipIt(trainer()).merge(models, backbone="net", start_at="body", refine=None, statistics=file)


def test_a_batch_with_the_tasks_as_keys_is_a_dict_of_views(models, merged):
    batches = [{"rgb": (x, y), "gray": (gray(x), y)} for x, y in COLOUR]
    how = {"backbone": "net", "start_at": "body"}
    assert equal(ZipIt(trainer()).merge(models, [batches, batches], **how), merged)
    assert merged.fit_temperatures([batches, batches]) == merged.fit_temperatures([COLOUR, COLOUR], views)


@pytest.mark.parametrize(
    ("get_input", "message"),
    [
        (lambda batch: batch[0], r"Task 'gray'.*input of shape.*get_input=lambda batch: {'rgb': batch\[0\], 'gray': "),
        (lambda batch: {"rgb": batch[0]}, "but not for 'gray'. Every model sees every sample"),
        (lambda batch: {"rgb": batch[0], "gray": gray(batch[0])[:2]}, "batch sizes differ: 16 for 'rgb', 2 for 'gray'"),
        (lambda batch: {"rgb": batch[0], "gray": 3}, "for task 'gray' it returned an object of type int"),
        (lambda batch: [batch[0]], "cannot take an input of shape"),
    ],
)
def test_inputs_that_do_not_fit_are_explained(models, get_input, message):
    with pytest.raises(ZipItError, match=message):
        ZipIt(trainer()).merge(models, COLOUR, **MERGE | {"get_input": get_input})


def test_what_was_merged_behind_stems_is_not_merged_again(models, merged):
    with pytest.raises(
        ConfigurationError, match="Model 'both': it was merged with start_at='body', and cannot be merged again"
    ):
        ZipIt(trainer()).merge({"both": merged, "other": LitSplit(1)}, COLOUR, **MERGE)
    pair = ZipIt(trainer()).merge({"a": LitSplit(), "b": LitSplit()}, images(), backbone="net", refine=None)
    with pytest.raises(ConfigurationError, match="it was merged with start_at=None, and can only be merged again"):
        ZipIt(trainer()).merge({"pair": pair, "other": LitSplit()}, images(), backbone="net", start_at="body")


def test_a_sweep_tries_starts_too(models, tmp_path):
    result = ZipIt(trainer()).sweep(
        models,
        [COLOUR, COLOUR],
        val_dataloaders=[COLOUR, GRAY],
        **MERGE | {"start_at": ["body", "body.3"]},
        stop_at=[None, "body.4"],
        matcher=Permute(),
        refine=[None],
        metric="acc",
        results=tmp_path / "sweep.csv",
    )
    assert [(row.settings.start_at, row.error) for row in result.rows] == [("body", "")] * 2 + [("body.3", "")] * 2
    assert len(list(tmp_path.glob("sweep.from-body*.safetensors"))) == 2
    merged = ZipIt(trainer()).merge(models, [COLOUR, COLOUR], **MERGE, refine=None, matcher=Permute())
    assert equal(result.merge(result.rows[0]), merged)


@torch.no_grad()
def test_views_need_no_stems():
    torch.manual_seed(0)
    net = settle(SplitNet(), X)
    other = torch.randn(X.shape, generator=torch.Generator().manual_seed(3))
    nets = {"a": net, "b": copy.deepcopy(net)}
    merged = merge_backbones(nets, [{"a": X, "b": other}], MergeSettings(matcher=Average(), refine=None))
    outputs = AllHeads(merged.trunk, merged.heads)({"a": X, "b": other})
    assert not merged.stems
    assert all(torch.allclose(outputs[task], net(x), atol=1e-5) for task, x in (("a", X), ("b", other)))
    settings = MergeSettings(matcher=Average(), refine="batch_norm")
    renewed = merge_backbones(nets, [{"a": X, "b": other}], settings)
    mean = torch.stack([net.stem[0](x).mean((0, 2, 3)) for x in (X, other)]).mean(0)
    assert torch.allclose(renewed.trunk.get_submodule("stem.1").running_mean, mean, atol=1e-5)
