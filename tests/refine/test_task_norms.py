"""Batch norm per task inside a shared trunk."""

import copy
import pickle

import pytest
import torch
from helpers.nets import PlainNet, SmallResNet, Wrap, images, settle, settled_pair, trainer
from torch import nn

from lightning_zipit import MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit._lightning.export import export_merged
from lightning_zipit._matching.maps import SpaceMap
from lightning_zipit._merging.rebuild import build_merged
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.task_norms import give_norms, set_affine

PER_TASK = BatchNorm(per_task=True)
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def data():
    return [images(seed=0), images(seed=1, classes=7)]


@pytest.fixture(scope="module")
def merged(data):
    merge = {"backbone": "net", "stop_at": "layer1", "refine": PER_TASK}
    return ZipIt(trainer()).merge(settled_pair(), data, **merge).eval()


@torch.no_grad()
def test_per_task_norms_have_statistics_of_their_task(merged, data):
    for task, loader in zip("ab", data, strict=True):
        norm = merged.trunk.get_submodule("bn1")[task]
        means = [merged.trunk.get_submodule("conv1")(x).mean((0, 2, 3)) for x, _ in loader]
        assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-5)
        assert norm.num_batches_tracked == len(loader) and norm.momentum == 0.1


@torch.no_grad()
def test_per_task_norms_distinguish_tasks_of_different_scale():
    net = settle(SmallResNet(), torch.randn(48, 3, 16, 16))
    other = copy.deepcopy(net)
    other.conv1.weight /= 3
    x = torch.randn(48, 3, 16, 16)
    for loaders, per_task in (([[x], [3 * x]], True), ([[x], [3 * x]], False)):
        settle(net, x)
        settle(other, 3 * x)
        how = MergeSettings(matcher=Average(), refine=BatchNorm(per_task))
        found = merge_backbones({"a": net, "b": other}, loaders, how)
        outputs = {
            task: found.heads[task](*(found.trunk(batch, task) if per_task else found.trunk(batch)))
            for task, (batch,) in zip("ab", loaders, strict=True)
        }
        same = [torch.allclose(output, net(x), rtol=1e-3, atol=1e-3) for output in outputs.values()]
        assert same == [per_task] * 2


@torch.no_grad()
def test_per_task_norm_scales_own_features_and_zeroes_others():
    nets = {task: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)) for task in "ab"}
    for factor, net in enumerate(nets.values()):
        nn.init.uniform_(net[1].weight)
        nn.init.constant_(net[1].bias, factor)
    graphs = {task: trace(net) for task, net in nets.items()}
    maps = {"0": SpaceMap(torch.tensor([0, 0, 1, 2, 1, 1, 3, 0]), 2)}
    trunk, _ = build_merged(list(graphs.values()), list(nets.values()), maps)
    give_norms(trunk, nets)
    set_affine(trunk, nets, graphs["a"].axes, maps, {"a": 0, "b": 1})
    (first, second), own = (net[1].weight for net in nets.values()), trunk.get_submodule("1")
    assert torch.allclose(own["a"].weight, torch.stack([first[:2].mean(), first[2], first[3], torch.tensor(0.0)]))
    assert torch.allclose(own["b"].weight, torch.stack([second[3], second[:2].mean(), torch.tensor(0.0), second[2]]))
    assert own["b"].bias.tolist() == [1, 1, 0, 1]


@torch.no_grad()
def test_cost_with_per_task_norms_counts_one_trunk_pass_per_task(merged):
    together = merged(X)
    assert all(torch.equal(together[task], merged(X, task=task)) for task in "ab")
    assert not torch.equal(merged.trunk(X, "a")[0], merged.trunk(X, "b")[0])
    assert merged.report.merged.flops == merged.report.ensemble.flops
    assert any("once for each task" in note for note in merged.report.notes)


@torch.no_grad()
def test_module_with_per_task_norms_is_saved_copied_pickled_and_exported(merged, data, tmp_path):
    run = trainer()
    results = {key: value for result in run.test(merged, data, verbose=False) for key, value in result.items()}
    hits = [merged(x, task="b").argmax(-1) == y for x, y in data[1]]
    assert results["b/test_acc"] == pytest.approx(torch.cat(hits).float().mean().item())
    run.save_checkpoint(tmp_path / "merged.ckpt")
    export_merged(merged, tmp_path / "merged.pt2")
    others = [
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt"),
        copy.deepcopy(merged),
        pickle.loads(pickle.dumps(merged)),
        torch.compile(merged, backend="eager"),
        torch.export.load(tmp_path / "merged.pt2").module(),
    ]
    expected = merged(X)
    for number, other in enumerate(others):
        assert all(torch.allclose(output, expected[task], atol=1e-5) for task, output in other(X).items()), number


def test_per_task_norms_refuse_a_trunk_without_batch_norm():
    with pytest.raises(ConfigurationError, match="needs batch norm in the trunk"):
        ZipIt(trainer()).merge([Wrap(PlainNet()), Wrap(PlainNet())], images(), backbone="net", refine=PER_TASK)
