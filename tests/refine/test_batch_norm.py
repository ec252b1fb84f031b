"""Re-estimated statistics of batch norm: those of all samples, however these are split into batches and calls."""

import copy

import pytest
import torch
from helpers.nets import SmallResNet, settle
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.errors import CalibrationError
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.batch_norm import BatchNormEstimator

HOW = MergeSettings(refine="batch_norm")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def uneven(count=33, size=8):
    x = torch.randn(count, 3, size, size)
    x[-1] = x[-1] * 3 + 2  # an odd image, which counts as one
    return x


def estimated(module, batches, prefix="module"):
    estimator = BatchNormEstimator({prefix: module.eval()})
    for x in batches:
        with estimator.collecting(module):
            module(x)
    estimator.finish()
    return module


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[33], [32, 1], [1, 32], [1] * 33, [5, 20, 8]])
def test_batch_norm_estimate_counts_every_sample_once(sizes):
    x, net = uneven(), Net()
    merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, list(x.split(sizes)), HOW)
    norm, reaching = merged.trunk.norm, net.conv(x)
    assert torch.allclose(norm.running_mean, reaching.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, reaching.var((0, 2, 3)), rtol=1e-5)
    assert norm.num_batches_tracked == len(sizes) and norm.momentum == 0.1 and not norm._forward_pre_hooks


@torch.no_grad()
def test_batch_norm_estimate_of_one_batch_equals_torch():
    x, net = torch.randn(16, 3, 16, 16), SmallResNet()
    expected = copy.deepcopy(net).train()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    expected(x)
    found = estimated(copy.deepcopy(net), [x])
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(tensor, found.state_dict()[name], rtol=1e-4, atol=1e-5), name


@torch.no_grad()
def test_batch_norm_estimate_is_precise_for_large_means():
    x, norm = torch.randn(64, 5).double() * 1e-3 + 1e4, nn.BatchNorm1d(5).double()
    norm.running_mean.fill_(1e4 + 0.1)  # as merging left it: near the mean
    estimated(norm, x.split(10))
    assert torch.allclose(norm.running_var, x.var(0), rtol=1e-6)


class Twice(Net):
    """A norm that is called twice, by two names."""

    def __init__(self):
        super().__init__()
        self.again, self.more = self.norm, nn.Conv2d(6, 6, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.again(self.more(x)).relu().mean((2, 3)))


class Shared(Twice):
    """Two norms that share their statistics."""

    def __init__(self):
        super().__init__()
        self.again = nn.BatchNorm2d(6)
        self.again.running_mean, self.again.running_var = self.norm.running_mean, self.norm.running_var


@torch.no_grad()
@pytest.mark.parametrize("make", [Twice, Shared])
def test_batch_norm_called_twice_has_statistics_of_both_calls(make):
    x, net = uneven(12), make()
    first = net.conv(x)
    own = (first - first.mean((0, 2, 3), keepdim=True)) / first.var((0, 2, 3), False, keepdim=True).add(1e-5).sqrt()
    second = net.more(own.relu())
    both = torch.cat([first.movedim(1, 0).flatten(1), second.movedim(1, 0).flatten(1)], 1)
    norm = estimated(net, [x]).norm
    assert torch.allclose(norm.running_mean, both.mean(1), atol=1e-5)
    assert torch.allclose(norm.running_var, both.var(1), rtol=1e-4)


@torch.no_grad()
def test_batches_with_one_value_per_feature_use_old_statistics():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(20, 4)
    reaching = net[3](net[2](net[1](net[0](x))))
    found = estimated(net, x.split(1))
    assert torch.allclose(found[4].running_mean, reaching.mean(0), atol=1e-5)
    assert torch.allclose(found[4].running_var, reaching.var(0), rtol=1e-4)


@torch.no_grad()
def test_per_task_norms_count_samples_of_their_task():
    x, other = uneven(9), torch.randn(20, 3, 8, 8)
    net = Net()
    settings = MergeSettings(refine=BatchNorm(per_task=True))
    merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, [x.split(8), other.split(7)], settings)
    for task, own in (("a", x), ("b", other)):
        assert torch.allclose(merged.trunk.norm[task].running_mean, net.conv(own).mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(0, 8), (1, 3)])
def test_batch_norm_with_fewer_than_two_samples_is_an_error(count, size):
    nets = {task: Net().eval() for task in "ab"}
    estimator = BatchNormEstimator({"trunk": nets["a"]})
    with torch.no_grad(), estimator.collecting(nets["a"]):
        nets["a"](torch.randn(count, 3, size, size))
    with pytest.raises(CalibrationError, match=r"batch norm `trunk\.norm` cannot be re-estimated: fewer than two"):
        estimator.finish()


def test_heads_use_data_of_their_task_and_trunk_uses_all_data():
    torch.manual_seed(0)
    nets = {task: settle(SmallResNet(), torch.randn(16, 3, 16, 16)) for task in "ab"}
    loaders = [torch.randn(9, 3, 16, 16).split(8), torch.randn(12, 3, 16, 16).split(5)]
    merged = merge_backbones(nets, loaders, MergeSettings("layer1", refine="batch_norm"))
    with torch.no_grad():
        reaching = merged.trunk.conv1(torch.cat([x for batches in loaders for x in batches]))
    assert torch.allclose(merged.trunk.bn1.running_mean, reaching.mean((0, 2, 3)), atol=1e-5)
    batches = [merged.heads[task].layer2.get_submodule("0").bn1.num_batches_tracked for task in "ab"]
    assert batches == [2, 3]


@torch.no_grad()
@pytest.mark.parametrize("refine", [None, "batch_norm", "least_squares"])
def test_batch_norm_without_running_statistics_needs_no_single_sample(refine):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, x.split(16), MergeSettings(refine=refine))
    assert torch.allclose(merged.heads["b"](*merged.trunk(x)), net(x), atol=1e-4)
    assert merged.report.merged.flops == 2 * (6 * 8 + 2 * 8 * 3)
