"""Every finding on a merge that is built to have that fault, and none on merges that have none."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers.nets import Lit, SmallResNet, images, settle, trainer
from torch import nn

from lightning_zipit import MergeSettings, ZipIt, merge_backbones
from lightning_zipit._report.diagnosis import noise_of
from lightning_zipit.matchers import Average, GreedyZip, KMeans, Permute


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batches(count=48, size=16):
    return list(torch.randn(count, 3, size, size, generator=seeded(0)).split(24))


def resnets(seeds=(0, 1)):
    """Networks with the statistics of batch norm that the calibration data gives."""
    nets = {}
    for task, seed in zip("abc", seeds, strict=False):
        torch.manual_seed(seed)
        nets[task] = settle(SmallResNet(), *batches())
    return nets


def twins():
    """A network, and a copy with its features in another order in one place."""
    net = resnets()["a"]
    other, order = copy.deepcopy(net), torch.randperm(8, generator=seeded(0))
    block = other.layer1[0]
    with torch.no_grad():
        for tensor in (block.conv1.weight, *block.bn1.state_dict().values()):
            if tensor.ndim:
                tensor.copy_(tensor[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
    return {"a": net, "b": other}


def perceptrons(*depths_shared):
    """Two networks of four layers; the second has the first's layers of some depths, and others of its own."""
    torch.manual_seed(0)
    sizes = (32, 32, 32, 32, 5)
    nets = [
        nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh()))) for _ in range(2)
    ]
    for depth in depths_shared:
        nets[1][2 * depth].load_state_dict(nets[0][2 * depth].state_dict())
    return dict(zip("ab", nets, strict=True))


def kinds(nets, data, **settings):
    merged = merge_backbones(nets, [data], MergeSettings(**settings))
    found = merged.report.diagnose()
    return {finding.kind: finding.message for finding in found}


def rows(count=2000, size=32):
    return [torch.randn(count, size, generator=seeded(0))]


@pytest.mark.parametrize("matcher", [GreedyZip(), Permute()])
def test_diagnosis_of_a_permuted_copy_is_empty(matcher):
    assert kinds(twins(), torch.cat(batches()), matcher=matcher) == {}


def test_diagnosis_of_equal_networks_matched_by_index_is_empty():
    nets = perceptrons(0, 1, 2, 3)
    assert kinds(nets, rows()[0], matcher=Average()) == {}


def test_diagnosis_finds_matching_by_index_no_better_than_random():
    nets, data = resnets(), torch.cat(batches())
    message = kinds(nets, data, matcher=Average())["chance"]
    assert "`" in message and "GreedyZip" in message
    assert "chance" not in kinds(nets, data, matcher=GreedyZip())


@pytest.mark.parametrize(("count", "expected"), [(40, True), (64, True), (4000, False)])
def test_diagnosis_finds_too_few_samples(count, expected):
    found = kinds(perceptrons(), rows(count)[0])
    assert ("samples" in found) == expected
    if expected:
        assert f"has {count} samples for 64 features" in found["samples"]


def test_noise_of_equals_the_highest_correlation_of_noise():
    x = torch.randn(200, 129, generator=seeded(0))
    highest = torch.corrcoef(x.T).fill_diagonal_(-1).max(1).values.mean()
    assert noise_of(200, 128) == pytest.approx(float(highest), rel=0.1)


def test_diagnosis_finds_constant_features():
    nets = twins()
    with torch.no_grad():
        nets["b"].layer1[1].bn1.bias[:4] = -100
    found = kinds(nets, torch.cat(batches()), refine="batch_norm")
    assert "4 of 8 features of model 'b' in `layer1.1.conv1`" in found["dead"]


def test_diagnosis_names_a_crowded_out_task():
    nets = perceptrons()
    with torch.no_grad():
        for layer in (0, 2, 4):  # the features of the second model are copies of four
            for parameter in nets["b"][layer].parameters():
                parameter.copy_(parameter[:4].repeat(8, *[1] * (parameter.ndim - 1)))
    found = kinds(nets, rows()[0], width=0.6)
    assert "model 'a' are crowded out" in found["crowded"] and "width=" in found["crowded"]
    assert "crowded" not in kinds(nets, rows()[0], matcher=KMeans(), width=1.2)


def test_diagnosis_suggests_stop_at_where_similarity_collapses():
    nets, data = perceptrons(0), rows()[0]
    found = kinds(nets, data, matcher=Permute())
    assert 'stop_at="0"' in found["collapse"]
    assert "collapse" not in kinds(nets, data, matcher=Permute(), stop_at="0")


def test_diagnosis_finds_large_batch_norm_shifts():
    nets = twins()
    for net in nets.values():
        net.layer1[0].bn2.running_mean.add_(3 * net.layer1[0].bn2.running_var.sqrt())
    message = kinds(nets, torch.cat(batches()), refine="batch_norm")["norms"]
    assert "1 of " in message and "`trunk.layer1.0.bn2`" in message and "least_squares" in message


def test_findings_are_printed_with_the_report(capsys):
    torch.manual_seed(0)
    run = trainer(enable_model_summary=True)
    merged = ZipIt(run).merge([Lit(), Lit()], dataloaders=images(), backbone="net", matcher=Average())
    shown = capsys.readouterr().out
    assert merged.report.diagnose()
    assert all(str(finding) in shown for finding in merged.report.diagnose())
