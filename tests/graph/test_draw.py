"""What is drawn: every node, its spaces in colour, and what is not merged."""

import re
from xml.etree import ElementTree

import pytest
from helpers.nets import HandWrittenViT, SmallResNet
from torch import nn

from lightning_zipit import trace
from lightning_zipit.graph.draw import colours

SVG = "{http://www.w3.org/2000/svg}"


def rows(svg):
    """Text, kind and colours of every node in a picture."""
    drawn = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        fills = [rect.get("fill") for rect in group.iter(f"{SVG}rect")][1:]
        drawn[group.find(f"{SVG}text").text] = (group.get("class"), fills)
    return drawn


def test_one_space_has_one_colour_and_others_have_others():
    drawn = rows(trace(SmallResNet(), "layer1").to_svg())
    stage = drawn["conv1 · Conv2d"], drawn["layer1.0.conv2 · Conv2d"]
    assert stage[0] == stage[1] and stage[0][0] == "merged" and len(stage[0][1]) == 1
    assert drawn["layer1.0.conv1 · Conv2d"][1] != stage[0][1]
    assert drawn["linear · Linear"] == ("task", [])


def test_spaces_that_follow_each_other_have_colours_that_are_told_apart():
    fills = list(colours(trace(SmallResNet())).values())
    assert len(set(fills)) == len(fills)


def test_what_is_not_merged_is_written_below():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    graph = trace(net, merge_heads=True)
    text = "".join(ElementTree.fromstring(graph.to_svg()).itertext())
    assert "matched by number" in text and "Dashed" in text
    assert graph._repr_svg_() == graph.to_svg()


@pytest.mark.parametrize("network", [SmallResNet, HandWrittenViT])
def test_dot_declares_every_node_that_an_edge_names(network):
    text = trace(network()).to_dot()
    declared = set(re.findall(r'^  "([^"]+)" \[', text, re.MULTILINE))
    edges = re.findall(r'^  "([^"]+)" -> "([^"]+)";$', text, re.MULTILINE)
    assert edges and {name for edge in edges for name in edge} <= declared
    assert text.startswith("digraph") and text.endswith("}\n")


def test_names_are_escaped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<a & b>", nn.Conv2d(3, 4, 1))
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(getattr(self, "<a & b>")(x))

    assert "<a & b> · Conv2d" in rows(trace(Odd()).to_svg())
