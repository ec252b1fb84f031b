"""Tracing of whole networks: the table of axes, the cut, and errors."""

import pytest
import torch
import torchvision
from helpers.nets import SmallResNet
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


def test_cut_inside_a_block_passes_the_residual_stream_too():
    assert len(trace(SmallResNet(), "layer1.1.conv1").crossings) == 2


@pytest.mark.parametrize("stop_at", [None, "layer1.1.bn1", "layer2.0.shortcut"])
def test_spaces_of_the_heads_are_not_in_the_table(stop_at):
    graph = trace(SmallResNet(), stop_at)
    assert graph.axes["linear.weight"][0] is None
    assert all(space.tap is not None for space in graph.spaces.values())


def test_misspelt_stop_at_error_suggests_names():
    with pytest.raises(ConfigurationError, match=r"layr1.*Did you mean 'layer1'"):
        trace(SmallResNet(), "layr1")


@pytest.mark.parametrize("stop_at", ["linear", "layer2.1.conv1.nothing"])
def test_stop_at_that_leaves_no_head_is_an_error(stop_at):
    with pytest.raises(ConfigurationError, match=r"leaves no head|not a module"):
        trace(SmallResNet(), stop_at)


def test_a_stop_at_before_any_weights_is_an_error():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        trace(net, "0")


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


class Masked(nn.Module):
    """Creates a tensor, reads a buffer, and has an unused optional argument."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 4, 5]))

    def forward(self, x, mask=None, scale: float = 2.0):
        x = self.conv1(x)[:, self.order.view(-1)] * torch.tensor([scale])
        if mask is not None:
            x = x * mask
        return self.fc(self.conv2(x.relu()).mean((2, 3)))


def test_a_network_with_tensors_of_its_own_keeps_arguments_at_their_defaults():
    graph = trace(Masked(), verify=torch.randn(2, 3, 8, 8))
    assert not graph.barriers and graph.spaces["conv1"].pinned == ""


def test_parameters_of_a_computed_weight_are_in_the_table():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    nn.utils.parametrizations.weight_norm(net[2])
    graph = trace(net, verify=torch.randn(1, 3, 9, 9))
    assert graph.axes["2.parametrizations.weight.original1"][1].spaces == ("0",)
    assert graph.axes["2.parametrizations.weight.original0"][0].spaces == graph.axes["2.bias"][0].spaces


def test_shared_weight_ties_the_features_of_both_layers():
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    net[4].weight = net[2].weight
    graph = trace(net, verify=torch.randn(8, 4))
    assert len(graph.spaces) == 1 and graph.axes["4.weight"] == graph.axes["2.weight"]


def test_conflicting_groups_end_the_trunk_with_a_note():
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=2)),
        *(nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1)),
    )
    graph = trace(net, verify=torch.randn(2, 3, 5, 5))
    assert list(graph.spaces) == ["0", "2", "2 groups"]
    assert "Module `4` (Conv2d)" in graph.notes[0] and "divides features into groups" in graph.notes[0]


def test_groups_and_heads_are_units_of_the_spaces_they_hold():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 2, 1))
    graph = trace(net, verify=torch.randn(2, 3, 5, 5))
    assert graph.spaces["1 groups"].size == 4
    assert {space.units for space in graph.spaces.values()} == {"1 groups", None}
    assert graph.spaces["1"].unit_of == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert str(graph.axes["1.weight"][1]) == "← 0 in 4 groups"


def test_note_lists_modules_that_eval_mode_does_not_call():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aux, self.fc = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2)

        def forward(self, x):
            x = self.body(x).relu()
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    graph = trace(Auxiliary())
    assert graph.notes == ("Not called in eval mode, and omitted from the merged network: `aux`.",)
    assert "Not called in eval mode" in str(graph)


@pytest.mark.parametrize("stop_at", [None, "backbone"])
def test_a_segmentation_network_with_a_dict_of_outputs(stop_at):
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    trace(net, stop_at, verify=torch.randn(1, 3, 64, 64))
