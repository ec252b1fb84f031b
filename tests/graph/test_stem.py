"""Stems: the parts before the trunk's start, which stay per task."""

import pytest
import torch
from helpers.nets import PlainNet, SmallResNet, SplitNet
from torch import nn

from lightning_zipit import trace
from lightning_zipit._common.calls import Call
from lightning_zipit.errors import ArchitectureMismatchError, ConfigurationError
from lightning_zipit.graph.settle import trace_all

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stop_at", [None, "layer2.0"])
@pytest.mark.parametrize("start_at", ["bn1", "layer1", "layer1.1", "layer1.0.conv2", "layer2.0.shortcut"])
def test_any_module_starts_the_trunk_and_the_table_proves_right(start_at, stop_at):
    graph = trace(SmallResNet(), stop_at, start_at=start_at, verify=X)
    assert not graph.barriers and graph.entries and graph.start_at == start_at
    assert not graph.stem_nodes & graph.trunk_nodes
    assert {space for entry in graph.entries for space in entry.ref.spaces} == {n for n in graph.spaces if "stem" in n}
    stem = {"conv1.weight"} if start_at == "bn1" else {"conv1.weight", "bn1.weight"}
    assert all(not any(graph.axes[name]) for name in stem)


def test_without_start_at_the_stem_is_empty_and_node_names_stay():
    graph = trace(SmallResNet())
    assert not graph.stem_nodes and not graph.entries and "x" in graph.trunk_nodes


def test_entries_are_all_stem_values_that_the_trunk_reads():
    graph = trace(SmallResNet(), start_at="layer1.0.conv2")  # what conv2 reads, and the shortcut around it
    assert [entry.shape[0] for entry in graph.entries] == [8, 8]
    assert graph.spaces["stem"].producers[0][0] == "layer1.0.conv2.weight"  # the stage is one space
    assert graph.spaces["stem#2"].consumers == (("layer1.0.conv2.weight", 1),)


def test_positions_of_a_flattened_feature_stay_together():
    (entry,) = trace(PlainNet(), start_at="classifier").entries
    assert [(block.size, block.repeat) for block in entry.ref.blocks] == [(12, 36)]


class Tied(nn.Module):
    """Uses one weight both in the stem and in the trunk."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(nn.functional.linear(self.first(x), self.weight))
        return self.last(torch.relu(nn.functional.linear(self.second(x), self.weight)))


def test_a_weight_that_is_used_on_both_sides_belongs_to_both():
    graph = trace(Tied(), start_at="second", verify=torch.randn(4, 5))
    targets = [{node.target for node in part} for part in (graph.stem_graph(), graph.trunk_graph())]
    assert all("weight" in part for part in targets)
    assert [str(ref) for ref in graph.axes["weight"]] == ["→ weight", "← second"]


@pytest.mark.parametrize(
    ("start_at", "stop_at", "message"),
    [
        ("layer9", None, r"start_at='layer9' is not a module of the backbone \(SmallResNet\)\. Did you mean"),
        ("conv1", None, "start_at='conv1' leaves no stem: no other module comes before it"),
        ("linear", None, "start_at='linear' comes after the trunk's end"),
        ("layer2", "layer1", "start_at='layer2' comes after the trunk's end"),
    ],
)
def test_wrong_start_at_is_refused(start_at, stop_at, message):
    with pytest.raises(ConfigurationError, match=message):
        trace(SmallResNet(), stop_at, start_at=start_at)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cumsum(self.first(x), 1)
        return self.last(torch.relu(self.second(x)))


def test_operators_without_a_rule_may_be_in_a_stem_but_not_at_its_end():
    with pytest.raises(ConfigurationError, match=r"cannot start at 'second'.*cumsum.*register_rule"):
        trace(Unknown(), start_at="second")
    net = nn.Sequential(Unknown(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert not trace(net, start_at="2", verify=torch.randn(4, 5)).barriers


def test_stems_may_differ_between_networks():
    graphs = trace_all({"a": SplitNet(3), "b": SplitNet(1, deep=True)}, None, start_at="body")
    first, second = graphs.values()
    assert first.trunk_nodes == second.trunk_nodes and first.stem_nodes != second.stem_nodes
    assert list(first.spaces) == list(second.spaces) == ["stem", "body.0", "body.3"]


def test_stems_must_output_the_same_shapes_and_features():
    pair = {"a": SplitNet(3), "b": SplitNet(3, deep=True)}
    with pytest.raises(ArchitectureMismatchError, match=r"\(8, 16, 16\) in the first and \(8, 8, 8\)"):
        trace_all(pair, None, example=Call.of(X), start_at="body")
    other = PlainNet()
    other.features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 432))
    with pytest.raises(ArchitectureMismatchError, match=r"different features: 12 on axis 1.* in the first and 432"):
        trace_all({"a": PlainNet(), "b": other}, None, example=Call.of(X), start_at="classifier")


def test_error_of_different_first_layers_suggests_start_at():
    with pytest.raises(ArchitectureMismatchError, match=r"stem\.0\.weight.*`start_at`"):
        trace_all({"a": SplitNet(3), "b": SplitNet(1)}, None)


def test_the_picture_shows_all_three_parts():
    picture = trace(SmallResNet(), start_at="layer1", stop_at="layer1").to_svg()
    assert all(f'class="{part}"' in picture for part in ("stem", "trunk", "head"))
    assert all(text in picture for text in ("stems: one per task", "trunk: merged", "heads: one per task"))
