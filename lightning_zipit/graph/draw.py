"""Drawings of a merge graph: the nodes of a network in the colors of their feature spaces."""

from __future__ import annotations

import colorsys
import textwrap
from html import escape
from itertools import count

from torch import fx

from lightning_zipit._common.text import printable
from lightning_zipit.graph.naming import operator_name, place_of
from lightning_zipit.graph.spaces import MergeGraph

ROW, BOX, MARGIN, LETTER = 24, 18, 10, 6.6
"""Distance between rows, height of a node, margin of the picture, and width of a letter; all in pixels."""
LEFT, BAR, GAP = 150, 72, 28
"""Width of the area for arcs, width of a node's color bar, and gap at the trunk's start and end; all in pixels."""
GREY, LINE = "#d0d0d0", "#888888"
GOLDEN = 0.6180339887
LIGHTNESS = (0.68, 0.78, 0.58)
KINDS = ("stem", "trunk", "head")
KEY = "Grey: no features, or matched by index. Dashed: one per task."


def colours(graph: MergeGraph) -> dict[str, str]:
    """Return a color for every space, with distinct colors for neighbors. Spaces matched by index are grey."""
    index = count()
    return {name: GREY if space.pinned else _colour(next(index)) for name, space in graph.spaces.items()}


def _colour(index: int) -> str:
    """Return the color of an index. Hues in steps of the golden ratio cover the circle evenly for any count."""
    parts = colorsys.hls_to_rgb(index * GOLDEN % 1.0, LIGHTNESS[index % len(LIGHTNESS)], 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def label(graph: MergeGraph, node: fx.Node) -> str:
    """Return the label of a node: its module and class, or its operator and the module that contains it."""
    if node.op == "call_module":
        return f"{node.target} · {type(graph.module.get_submodule(str(node.target))).__name__}"
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op)
    operator = operator_name(node)
    return f"{operator} in {place_of(node)}"


def legend(graph: MergeGraph) -> list[tuple[str, str]]:
    """Return the color and description of every space."""
    described = (
        f"{name}: {space.size} features"
        + (f" of {graph.spaces[space.units].size} {space.units.rpartition(' ')[2]}" if space.units else "")
        + (", matched by index" if space.pinned else "")
        for name, space in graph.spaces.items()
    )
    return list(zip(colours(graph).values(), described, strict=True))


def _shown(graph: MergeGraph) -> list[fx.Node]:
    """Return the nodes to draw in order of execution: stem, trunk, head. Parameter reads are omitted."""
    nodes = (node for node in graph.fx_graph.nodes if node.op != "get_attr")
    return sorted(nodes, key=lambda node: _part(graph, node))


def _part(graph: MergeGraph, node: fx.Node) -> int:
    """Return the index of a node's part in :data:`KINDS`."""
    return 0 if node.name in graph.stem_nodes else 1 if node.name in graph.trunk_nodes else 2


def _edges(shown: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    known = set(shown)
    return [(source, node) for node in shown for source in node.all_input_nodes if source in known]


def _fills(graph: MergeGraph, node: fx.Node, colour: dict[str, str]) -> list[str]:
    """Return the colors of a node: none in stem and head, grey for trunk nodes without features."""
    if node.name not in graph.trunk_nodes:
        return []
    return [colour[space] for space in graph.held.get(node.name, ())] or [GREY]


def to_dot(graph: MergeGraph) -> str:
    """Draw the graph in Graphviz's DOT language. Filled nodes are merged; dashed nodes stay per task."""
    colour, shown = colours(graph), _shown(graph)
    lines = ["digraph merge {", '  node [shape=box, fontname="sans-serif", fontsize=10];']
    for node in shown:
        look = _look(_fills(graph, node, colour))
        lines.append(f"  {_quoted(node.name)} [label={_quoted(label(graph, node))}, {look}];")
    lines += [f"  {_quoted(source.name)} -> {_quoted(node.name)};" for source, node in _edges(shown)]
    lines += ["  subgraph cluster_legend {", '    label="feature spaces";']
    for index, (fill, text) in enumerate(legend(graph)):
        lines.append(f'    "legend {index}" [label={_quoted(text)}, shape=note, {_look([fill])}];')
    return "\n".join([*lines, "  }", "}", ""])


def _look(fills: list[str]) -> str:
    style = ("dashed", "filled")[len(fills)] if len(fills) < 2 else "striped"
    return f"style={style}" + (f', fillcolor="{":".join(fills)}"' if fills else "")


def _quoted(text: str) -> str:
    r"""Quote a string for DOT, where ``\`` and ``&`` start escape sequences."""
    escaped = printable(text).replace("\\", r"\\").replace('"', r"\"").replace("&", "&amp;")
    return f'"{escaped}"'


def to_svg(graph: MergeGraph) -> str:
    """Draw the graph as SVG: nodes from top to bottom, skip connections as arcs, spaces in color."""
    colour, shown = colours(graph), _shown(graph)
    row = {node: index for index, node in enumerate(shown)}
    cuts = tuple(sum(_part(graph, node) < part for node in shown) for part in (1, 2))
    texts = [label(graph, node) for node in shown]
    held = [graph.held.get(node.name, ()) for node in shown]
    box = round(max(map(len, texts)) * LETTER) + BAR + 3 * MARGIN
    width = LEFT + box + 2 * MARGIN + round(max(len(_names(spaces)) for spaces in held) * LETTER)

    parts = [_edge(row[source], row[node], cuts) for source, node in _edges(shown)]
    for index, (node, text, spaces) in enumerate(zip(shown, texts, held, strict=True)):
        parts.append(
            _node(_top(index, cuts), box, text, _fills(graph, node, colour), spaces, KINDS[_part(graph, node)])
        )
    names = ("stems: one per task", "trunk: merged", "heads: one per task")
    for cut, above, below in zip(cuts, names[:2], names[1:], strict=True):
        if 0 < cut < len(shown):
            parts.append(_cut(_top(cut, cuts) - GAP // 2 - (ROW - BOX) // 2, width, above, below))

    y = _top(len(shown), cuts) + ROW
    written = [line for note in (KEY, *graph.notes) for line in textwrap.wrap(note, 90)]
    for fills, text in [*(([fill], text) for fill, text in legend(graph)), *(([], line) for line in written)]:
        parts.append(_bar(LEFT, y, BOX, fills) + _text(LEFT + (BOX + MARGIN if fills else 0), y, text))
        width, y = max(width, LEFT + 4 * MARGIN + round(len(text) * LETTER)), y + ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="{width}" height="{y}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _top(row: int, cuts: tuple[int, ...]) -> int:
    """Return the y position of a row. Gaps separate stem, trunk and head."""
    return MARGIN + row * ROW + GAP * sum(0 < cut <= row for cut in cuts)


def _reach(rows: int) -> int:
    """Return the horizontal extent of an arc. It grows with the number of skipped rows, up to ``LEFT``."""
    return round(LEFT * rows / (rows + 6))


def _edge(start: int, end: int, cuts: tuple[int, ...]) -> str:
    if end == start + 1:
        path = f"M {LEFT + MARGIN} {_top(start, cuts) + BOX} V {_top(end, cuts)}"
    else:
        top, bottom, bend = _top(start, cuts) + BOX - 5, _top(end, cuts) + 5, LEFT - _reach(end - start)
        path = f"M {LEFT} {top} C {bend} {top}, {bend} {bottom}, {LEFT} {bottom}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-opacity="0.7"/>'


def _node(y: int, width: int, text: str, fills: list[str], spaces: tuple[str, ...], kind: str) -> str:
    dashes = "" if fills else ' stroke-dasharray="3 2"'
    title = f"<title>{escape(printable(', '.join(spaces)))}</title>" if spaces else ""
    return (
        f'<g class="{kind}">{title}{_bar(LEFT + width - BAR, y, BAR, fills)}'
        f'<rect class="box" x="{LEFT}" y="{y}" width="{width}" height="{BOX}" fill="none" stroke="#555555"{dashes}/>'
        f"{_text(LEFT + MARGIN, y, text)}{_text(LEFT + width + MARGIN, y, _names(spaces))}</g>"
    )


def _names(spaces: tuple[str, ...]) -> str:
    return ", ".join(spaces[:2]) + (f" and {len(spaces) - 2} more" if len(spaces) > 2 else "")


def _bar(x: int, y: int, width: int, fills: list[str]) -> str:
    """Draw one stripe per color."""
    stripe = width / max(len(fills), 1)
    return "".join(
        f'<rect x="{x + place * stripe:.1f}" y="{y}" width="{stripe:.1f}" height="{BOX}" fill="{fill}"/>'
        for place, fill in enumerate(fills)
    )


def _cut(y: int, width: int, above: str, below: str) -> str:
    line = f'<line class="cut" x1="0" y1="{y}" x2="{width}" y2="{y}" stroke="black" stroke-width="1.5"/>'
    x = LEFT + 2 * MARGIN
    return f"{line}{_text(x, y - BOX, above)}{_text(x, y, below)}"


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y + 13}">{escape(printable(text))}</text>' if text else ""
