"""Whole networks: the table, the cut, and that tracing leaves them alone."""

import pytest
import torch
from helpers.nets import PlainNet, SmallResNet
from torch import nn

from lightning_zipit import trace
from lightning_zipit.errors import ConfigurationError, TraceError


def test_the_table_prints_a_row_for_every_parameter_with_a_space():
    text = str(trace(SmallResNet()))
    assert "layer1.0.conv2.weight" in text and "→ conv1" in text and "← layer1.0.conv1" in text


def test_a_space_is_measured_at_the_input_of_its_last_consumer():
    graph = trace(SmallResNet())
    assert graph.spaces["layer1.0.conv1"].tap.reader == "layer1.0.conv2"
    assert graph.spaces["conv1"].tap.reader == "layer2.0.shortcut.0"


def test_a_global_pooling_is_measured_before_it():
    graph = trace(SmallResNet())
    tap = graph.spaces["layer2.0.conv2"].tap
    assert tap.reader == "the cut" and tap.node.startswith("relu")


def test_a_cut_inside_a_residual_stage_needs_an_explicit_unmerge():
    at_the_end, inside = trace(SmallResNet(), "layer1"), trace(SmallResNet(), "layer1.0")
    assert [crossing.absorbed for crossing in at_the_end.crossings] == [True]
    assert [crossing.absorbed for crossing in inside.crossings] == [False]


def test_a_cut_inside_a_block_hands_over_the_stream_too():
    assert len(trace(SmallResNet(), "layer1.1.conv1").crossings) == 2


@pytest.mark.parametrize("stop_at", [None, "layer1.1.bn1", "layer2.0.shortcut"])
def test_spaces_of_the_heads_are_not_in_the_table(stop_at):
    graph = trace(SmallResNet(), stop_at)
    assert graph.axes["linear.weight"][0] is None
    assert all(space.tap is not None for space in graph.spaces.values())


def test_a_misspelt_stop_at_is_told_what_is_close():
    with pytest.raises(ConfigurationError, match=r"layr1.*Did you mean 'layer1'"):
        trace(SmallResNet(), "layr1")


@pytest.mark.parametrize("stop_at", ["linear", "layer2.1.conv1.nothing"])
def test_a_stop_at_that_cuts_nothing_is_an_error(stop_at):
    with pytest.raises(ConfigurationError, match=r"cuts nothing|no module"):
        trace(SmallResNet(), stop_at)


def test_a_stop_at_before_any_weights_is_an_error():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        trace(net, "0")


def test_tracing_changes_neither_modes_nor_weights():
    net = PlainNet().train()
    net.features.eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trace(net, verify=torch.randn(2, 3, 16, 16))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_network_of_two_inputs_is_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(TraceError, match="2 inputs"):
        trace(Two())


def test_a_backbone_that_returns_features_keeps_its_last_layers_as_heads():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    graph = trace(net, verify=torch.randn(2, 3, 8, 8))
    assert list(graph.spaces) == ["0"] and graph.axes["4.weight"] == (None,)


def test_merged_heads_keep_the_order_of_their_outputs():
    graph = trace(SmallResNet(), merge_heads=True)
    assert graph.spaces["linear"].pinned
