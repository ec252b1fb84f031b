"""Drawings of a merge graph: nodes, colours of spaces, the trunk's end, and notes."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from helpers.nets import HandWrittenViT, SmallResNet
from torch import nn

from lightning_zipit import trace
from lightning_zipit.graph.draw import GREY, LEFT, _reach, colours

SVG = "{http://www.w3.org/2000/svg}"
NODE = re.compile(r'^ +"((?:[^"\\]|\\.)*)" \[label="((?:[^"\\]|\\.)*)", (.*)\];$', re.MULTILINE)
EDGE = re.compile(r'^ +"([^"]+)" -> "([^"]+)";$', re.MULTILINE)


def rows(svg):
    """Return the kind and colours of every node in an SVG, by its text."""
    drawn = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        fills = [rect.get("fill") for rect in group.iter(f"{SVG}rect") if rect.get("class") != "box"]
        drawn[group.find(f"{SVG}text").text] = (group.get("class"), fills)
    return drawn


class Named(nn.Module):
    """Build three layers, the first two with the given names."""

    def __init__(self, first, second="second"):
        super().__init__()
        self.names = first, second
        self.add_module(first, nn.Conv2d(3, 4, 1))
        self.add_module(second, nn.Conv2d(4, 6, 1))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return self.last(x)


def test_svg_nodes_of_one_space_share_one_colour():
    drawn = rows(trace(SmallResNet(), "layer1").to_svg())
    stage = drawn["conv1 · Conv2d"]
    assert stage == drawn["layer1.0.conv2 · Conv2d"] and stage[0] == "trunk" and len(stage[1]) == 1
    assert drawn["layer1.0.conv1 · Conv2d"][1] != stage[1]
    assert drawn["input"] == ("trunk", [GREY])


def test_heads_are_dashed_without_fill_and_below_the_line():
    graph = trace(SmallResNet(), "layer1")
    picture = ElementTree.fromstring(graph.to_svg())
    (line,) = picture.iter(f"{SVG}line")
    for group in picture.iter(f"{SVG}g"):
        (box,) = (rect for rect in group.iter(f"{SVG}rect") if rect.get("class") == "box")
        is_head = group.get("class") == "head"
        assert is_head == ("stroke-dasharray" in box.attrib) == (float(box.get("y")) > float(line.get("y1")))
    assert rows(graph.to_svg())["linear · Linear"] == ("head", [])
    assert dict((name, look) for name, _, look in NODE.findall(graph.to_dot()))["linear"] == "style=dashed"


def test_all_spaces_have_different_colours():
    fills = list(colours(trace(HandWrittenViT(depth=8))).values())
    assert len(set(fills)) == len(fills) and GREY not in fills


def test_svg_lists_notes_and_pinned_spaces():
    graph = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), merge_heads=True)
    texts = [text.text for text in ElementTree.fromstring(graph.to_svg()).iter(f"{SVG}text")]
    assert graph.notes and all(note in " ".join(texts) for note in graph.notes)
    assert "2: 3 features, matched by index" in texts
    assert rows(graph.to_svg())["2 · Linear"] == ("trunk", [GREY])
    assert graph._repr_svg_() == graph.to_svg()


def test_long_notes_are_wrapped():
    graph = replace(trace(SmallResNet()), notes=("word <of a note> " * 60,))
    texts = [text.text for text in ElementTree.fromstring(graph.to_svg()).iter(f"{SVG}text")]
    assert graph.notes[0].strip() in " ".join(texts) and max(map(len, texts)) <= 90


@pytest.mark.parametrize("network", [SmallResNet, HandWrittenViT])
def test_dot_declares_every_node_of_an_edge_once(network):
    graph = trace(network())
    text = graph.to_dot()
    declared = [name for name, _, _ in NODE.findall(text) if not name.startswith("legend ")]
    nodes = [node for node in graph.fx_graph.nodes if node.op != "get_attr"]
    assert sorted(declared) == sorted(node.name for node in nodes)
    edges = EDGE.findall(text)
    assert set(edges) == {(a.name, b.name) for b in nodes for a in b.all_input_nodes if a.op != "get_attr"}
    assert text.startswith("digraph") and text.count("{") == text.count("}") and text.count('"') % 2 == 0
    assert text == trace(network()).to_dot()


def test_dot_stripes_nodes_of_several_spaces_and_lists_all_spaces():
    graph = trace(HandWrittenViT())
    drawn = {name: (label, look) for name, label, look in NODE.findall(graph.to_dot())}
    fills = colours(graph)
    assert drawn["linear"][1] == f'style=striped, fillcolor="{fills["blocks.0.qkv"]}:{fills["blocks.0.qkv#2"]}"'
    legend = [label for name, (label, _) in drawn.items() if name.startswith("legend ")]
    assert len(legend) == len(graph.spaces) and "blocks.0.fc1: 24 features" in legend


def test_names_are_escaped():
    graph = trace(Named('<a & "b">', "back\\slash\x01"))
    drawn = rows(graph.to_svg())
    assert '<a & "b"> · Conv2d' in drawn and "back\\slash\N{REPLACEMENT CHARACTER} · Conv2d" in drawn
    labels = [label for _, label, _ in NODE.findall(graph.to_dot())]
    assert r"<a &amp; \"b\"> · Conv2d" in labels and "back\\\\slash\N{REPLACEMENT CHARACTER} · Conv2d" in labels


@pytest.mark.parametrize("name", ["dimension", "size_of", "getattr_like"])
def test_no_name_hides_a_node(name):
    graph = trace(Named("stem", name))
    assert f"{name} · Conv2d" in rows(graph.to_svg())
    assert {("stem", name), (name, "last")} <= set(EDGE.findall(graph.to_dot()))


def test_arcs_stay_inside_the_picture():
    reaches = [_reach(rows) for rows in range(2, 1000)]
    assert reaches == sorted(reaches) and reaches[0] > 0 and reaches[-1] <= LEFT
