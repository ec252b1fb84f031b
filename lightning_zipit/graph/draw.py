"""Draws a merge graph: the nodes of a network in the colours of the feature spaces that they hold."""

from __future__ import annotations

import colorsys
import json
from html import escape
from itertools import count

from torch import fx

from lightning_zipit.graph.interpret import place_of
from lightning_zipit.graph.spaces import MergeGraph

ROW, LEFT, WIDTH, CHIP = 22, 150, 460, 16
GREY = "#d0d0d0"
GOLDEN = 0.6180339887


def colours(graph: MergeGraph) -> dict[str, str]:
    """A colour for every space, neighbours far apart; grey for those that are matched by number."""
    hues = ((index * GOLDEN) % 1.0 for index in count())
    return {name: GREY if space.pinned else _hex(next(hues)) for name, space in graph.spaces.items()}


def _hex(hue: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue, 0.68, 0.62)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _shown(graph: MergeGraph) -> list[fx.Node]:
    """Parameters that are used by name, and arithmetic on sizes, are left out."""
    tensors = set(graph.held) | {node.name for node in graph.fx_graph.nodes if node.op == "call_module"}
    hidden = ("size", "getattr", "dim", "floordiv", "_assert")
    return [
        node
        for node in graph.fx_graph.nodes
        if node.op != "get_attr"
        and (node.name in tensors or node.name not in graph.trunk_nodes)
        and not node.name.startswith(hidden)
    ]


def label(graph: MergeGraph, node: fx.Node) -> str:
    """A node for people: the module that it calls and its class, or the operator and where it stands."""
    if node.op == "call_module":
        return f"{node.target} · {type(graph.module.get_submodule(str(node.target))).__name__}"
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op)
    operator = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{operator} in {place_of(node)}"


def legend(graph: MergeGraph) -> list[tuple[str, str]]:
    """Colour and description of every space."""
    described = (
        f"{name}: {space.size} features"
        + (f" of {graph.spaces[space.units].size} {space.units.rpartition(' ')[2]}" if space.units else "")
        + (", matched by number" if space.pinned else "")
        for name, space in graph.spaces.items()
    )
    return list(zip(colours(graph).values(), described, strict=True))


def to_dot(graph: MergeGraph) -> str:
    """The graph in Graphviz's language: filled nodes are merged, dashed ones stay per task."""
    colour, shown = colours(graph), _shown(graph)
    names = {node.name for node in shown}
    lines = ["digraph merge {", '  node [shape=box, fontname="sans-serif", fontsize=10];']
    for node in shown:
        held = graph.held.get(node.name, ())
        if node.name not in graph.trunk_nodes:
            look = "style=dashed"
        elif len(held) > 1:
            look = f'style=striped, fillcolor="{":".join(colour[space] for space in held)}"'
        else:
            look = f'style=filled, fillcolor="{colour[held[0]] if held else "white"}"'
        lines.append(f"  {json.dumps(node.name)} [label={json.dumps(label(graph, node))}, {look}];")
    lines += [
        f"  {json.dumps(source.name)} -> {json.dumps(node.name)};"
        for node in shown
        for source in node.all_input_nodes
        if source.name in names
    ]
    for index, (fill, text) in enumerate(legend(graph)):
        lines.append(f'  "legend {index}" [label={json.dumps(text)}, style=filled, fillcolor="{fill}", shape=note];')
    return "\n".join([*lines, "}", ""])


def to_svg(graph: MergeGraph) -> str:
    """The graph as a picture: nodes from top to bottom, connections that skip some as arcs, spaces in colour."""
    colour, shown = colours(graph), _shown(graph)
    row = {node.name: index for index, node in enumerate(shown)}
    parts = []
    for node in shown:
        for source in node.all_input_nodes:
            if source.name in row:
                parts.append(_edge(row[source.name], row[node.name]))
    for node in shown:
        fills = [colour[space] for space in graph.held.get(node.name, ())]
        parts.append(_node(row[node.name], label(graph, node), node.name in graph.trunk_nodes, fills))
    height = (len(shown) + 1) * ROW
    for fill, text in legend(graph):
        parts.append(_chip(LEFT, height, fill) + _text(LEFT + 2 * CHIP, height, text))
        height += ROW
    for note in ("Dashed: one per task.", *graph.notes):
        parts.append(_text(LEFT, height, note))
        height += ROW
    widest = max([WIDTH, *(7 * len(note) for note in graph.notes)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + widest}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _edge(start: int, end: int) -> str:
    top, bottom = start * ROW + CHIP, end * ROW
    if end == start + 1:
        path = f"M {LEFT + CHIP} {top} V {bottom + 2}"
    else:
        bend = LEFT - min(LEFT - 10, 14 + 6 * (end - start))
        path = f"M {LEFT} {top - 6} C {bend} {top - 6}, {bend} {bottom + 10}, {LEFT} {bottom + 10}"
    return f'<path d="{path}" fill="none" stroke="#888"/>'


def _node(row: int, text: str, merged: bool, fills: list[str]) -> str:
    outline = "" if merged else ' stroke-dasharray="3 2"'
    box = f'<rect x="{LEFT}" y="{row * ROW}" width="{WIDTH - 10}" height="{CHIP + 2}" rx="3" fill="white" '
    right = LEFT + WIDTH - 14
    chips = "".join(_chip(right - CHIP * place, row * ROW + 1, fill) for place, fill in enumerate(fills[:6], 1))
    kind = "merged" if merged else "task"
    return f'<g class="{kind}">{box}stroke="#555"{outline}/>{_text(LEFT + 6, row * ROW, text)}{chips}</g>'


def _chip(x: int, y: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{CHIP}" height="{CHIP}" fill="{fill}"/>'


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y + 13}">{escape(text)}</text>'
