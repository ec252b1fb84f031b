"""Captures are kept, and used for inputs of other sizes where they hold."""

import copy

import pytest
import torch
from helpers.capturing import module
from torch import nn

from lightning_zipit.graph import remember, trace
from lightning_zipit.graph.capture import capture


@pytest.fixture
def captures(monkeypatch):
    """The networks that were captured anew, in order."""
    found = []

    def counting(network, example):
        found.append(network)
        return capture(network, example)

    monkeypatch.setattr(remember, "capture", counting)
    monkeypatch.setattr(remember, "_known", type(remember._known)())
    return found


def free(self, x):
    y = self.conv(x).relu()
    parts = y.chunk(2, -1)
    return self.fc((y.mean((2, 3)) + parts[0].mean((2, 3))) * (x.shape[-1] + 1))


def fixed(self, x):
    return self.fc(self.conv(x).relu().flatten(2).mean(2) + self.conv(x).view(-1, 6, 64).sum(2))


def branching(self, x):
    y = self.conv(x)
    return self.fc((y.relu() if x.shape[-1] > 8 else y.sigmoid()).mean((2, 3)))


def deciding(self, x):
    y = self.conv(x)
    return self.fc((y if x.abs().sum() > -1 else -y).mean((2, 3)))


def network(forward):
    torch.manual_seed(0)
    return module(forward, conv=nn.Conv2d(3, 6, 3, padding=1), fc=nn.Linear(6, 4)).eval()


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_capture_is_used_for_other_sizes_with_their_shapes(captures, monkeypatch):
    net = network(free)
    trace(net, example_input=images(8))
    found = trace(copy.deepcopy(net), example_input=images(12))
    assert len(captures) == 1
    trace(net, example_input=images(8)), trace(net, example_input=images(12))
    assert len(captures) == 1
    monkeypatch.setattr(remember, "_known", type(remember._known)())
    anew = trace(net, example_input=images(12))
    assert len(captures) == 2 and found.shapes == anew.shapes and found.axes == anew.axes
    metas = [
        [(node.meta.get("shape"), node.meta.get("value")) for node in each.fx_graph.nodes] for each in (found, anew)
    ]
    assert metas[0] == metas[1] and str(found.fx_graph) == str(anew.fx_graph)
    assert found.captured.sizes.single


@pytest.mark.parametrize("forward", [branching, deciding])
def test_a_network_that_decides_by_its_input_is_captured_for_each_size(captures, forward):
    net = network(forward)
    graphs = [trace(net, example_input=images(size)) for size in (8, 12)]
    assert len(captures) == 2
    with torch.no_grad():
        for graph, size in zip(graphs, (8, 12), strict=True):
            torch.testing.assert_close(graph.captured.run(net, images(size)), net(images(size)))


def test_a_network_of_one_size_is_not_run_on_another(captures):
    net = network(fixed)
    trace(net, example_input=images(8))
    with pytest.raises(Exception, match=r"fixed sizes|cannot take an input"):
        trace(net, example_input=images(12))
