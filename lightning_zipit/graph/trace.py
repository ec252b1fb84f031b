"""From a backbone to its merge graph: record it with torch.fx, cut it, interpret it, group the features into spaces."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_zipit.errors import ConfigurationError, TraceError
from lightning_zipit.graph.cut import find_trunk
from lightning_zipit.graph.interpret import RULES, Context, Event, describe, find_rule, location
from lightning_zipit.graph.rules import POOLING
from lightning_zipit.graph.spaces import AxisRef, Block, Crossing, FeatureSpace, MergeGraph, Tap, as_starts
from lightning_zipit.graph.values import Features, Ids, Opaque, leaves, product


class Tracer(fx.Tracer):
    """Records modules that have a rule, and those of torch.nn, as single nodes; goes into all others."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.Sequential):
            return False
        return super().is_leaf_module(module, qualified_name) or any(cls in RULES for cls in type(module).__mro__)


def trace(
    backbone: nn.Module,
    stop_at: str | None = None,
    *,
    example_input: Tensor | None = None,
    merge_heads: bool = False,
    verify: Tensor | None = None,
) -> MergeGraph:
    """Find out which axes of a network's parameters must be merged together.

    The network is recorded in eval mode by torch.fx and is left as it was. No data is needed unless the network has
    a reshape whose meaning depends on the size of its input.

    Args:
        backbone: a network of one input whose ``forward`` torch.fx can follow.
        stop_at: dotted name of the trunk's last module; all that comes after it stays a head per task. ``None``
            zips everything down to the last layer with weights.
        example_input: an input; with it, reshapes are understood from real sizes. One forward is run.
        merge_heads: put the last layer into the trunk too: the models then share one output space.
        verify: an input on which to prove the table: every space is permuted at random in a copy, which must then
            compute the same. Two forwards of at most 8 samples are run in float64.

    Returns:
        The feature spaces and the table of axes.

    Raises:
        TraceError: where an operator or a reshape inside the trunk cannot be merged, or torch.fx cannot follow.
        ConfigurationError: if ``stop_at`` does not exist or leaves nothing to merge.
        VerificationError: if ``verify`` is given and a permuted space changes the output.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> graph = trace(net)
        >>> list(graph.spaces)
        ['0']
        >>> [str(ref) for ref in graph.axes["3.weight"]]
        ['None', '← 0[0:288]×36']
    """
    graph = _record(backbone)
    shapes = _shapes(backbone, graph, example_input if example_input is not None else verify)
    nodes = list(graph.nodes)
    trunk = find_trunk(backbone, nodes, stop_at, shapes, merge_heads)
    merge_graph = _Analysis(backbone, graph, shapes, trunk, stop_at).result()
    if not any(space.tap for space in merge_graph.spaces.values()):
        raise ConfigurationError(
            f"stop_at={stop_at!r} leaves no layer with weights in the trunk, so there is nothing to merge: "
            "name a later module."
            if stop_at
            else "The backbone has no layer with weights before its last, so there is nothing to merge."
        )
    if verify is not None:
        from lightning_zipit.graph.verify import verify_graph

        verify_graph(backbone, merge_graph, verify)
    return merge_graph


# Recording


def _record(backbone: nn.Module) -> fx.Graph:
    with evaluating(backbone):
        try:
            graph = Tracer().trace(backbone)
        except Exception as error:
            raise TraceError(_cannot_follow(backbone, error)) from error
    _drop_unused(backbone, graph)
    inputs = [node.name for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        raise TraceError(
            f"{type(backbone).__name__}.forward takes {len(inputs)} inputs ({', '.join(inputs)}); a backbone "
            "takes one. Name a submodule with one input as `backbone`."
        )
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in inputs:
            graph.erase_node(node)
    return graph


def _drop_unused(backbone: nn.Module, graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("output", "placeholder"):
            continue
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        module = backbone.get_submodule(target) if node.op == "call_module" else None
        if node.op.startswith("call") and (target.endswith("_") or getattr(module, "inplace", False)):
            raise TraceError(
                f"{describe(node, backbone)} changes a tensor in place and its result is not used, so what reads the "
                "tensor later is not in the graph. Write `x = …` with its result."
            )
        graph.erase_node(node)


def _cannot_follow(backbone: nn.Module, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torch/fx" not in frame.filename]
    own = [frame for frame in frames if "torch/nn" not in frame.filename and not frame.filename.startswith("<")]
    line = f' at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: "{own[-1].line}"' if own else ""
    return (
        f"torch.fx cannot follow {type(backbone).__name__}.forward{line}: {error}\nName a submodule without "
        "that line as `backbone`, or hide the block behind a leaf module with `lightning_zipit.graph.register_rule`."
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _shapes(backbone: nn.Module, graph: fx.Graph, example: Tensor | None) -> dict[str, tuple[int, ...]]:
    if example is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    with evaluating(backbone), torch.no_grad():
        Recorder(backbone, graph=graph).run(example[:8])
    return shapes


# Interpreting and grouping


class _Analysis:
    """One traced network on its way to a :class:`MergeGraph`."""

    def __init__(
        self,
        backbone: nn.Module,
        graph: fx.Graph,
        shapes: dict[str, tuple[int, ...]],
        trunk: set[fx.Node],
        stop_at: str | None,
    ) -> None:
        self.backbone, self.graph, self.stop_at = backbone, graph, stop_at
        self.nodes = list(graph.nodes)
        self.trunk = trunk
        self.ctx = Context(backbone, shapes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        values = self.values = self.ctx.run([node for node in self.nodes if node in trunk], {}, tolerant=())
        self.crossing_nodes = [
            node for node in self.nodes if node in trunk and any(user not in trunk for user in node.users)
        ]
        self.trunk_values = {node: values[node] for node in self.crossing_nodes}
        for node in self.crossing_nodes:
            self.ctx.node = node
            if isinstance(values[node], Features):
                self.ctx.cross(values[node])
                if any(user.op == "output" for user in node.users):
                    self.ctx.pin(values[node])  # a merged output: what it means is the same in all models
        self.trunk_events = [event for events in self.ctx.events.values() for event in events]
        self.head_values = self._interpret_heads(values)

    def _interpret_heads(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Features]:
        """Run the heads on features of their own, so that nothing in a head ties spaces of the trunk."""
        own = {}
        for node, value in self.trunk_values.items():
            if isinstance(value, Features):
                ids = self.ctx.fresh(len(value.ids))
                own[node] = Features(ids, value.axis, value.shape, value.repeat, node)
        self.ctx.events = {}
        heads = [node for node in self.nodes if node not in self.trunk]
        known = {**values, **own}
        self.ctx.run(heads, known, tolerant=set(heads))
        returned = [value.ids for value in leaves(known[self.nodes[-1]]) if isinstance(value, (Features, Opaque))]
        self.returned = returned
        return own

    def result(self) -> MergeGraph:
        self.component = self.ctx.components()
        self._group()
        head_events = [event for events in self.ctx.events.values() for event in events]
        crossings = tuple(self._crossing(node, head_events) for node in self.crossing_nodes)
        return MergeGraph(
            spaces=self._spaces(),
            axes=self._axes(crossings, head_events),
            crossings=crossings,
            trunk_nodes=frozenset(node.name for node in self.trunk),
            stop_at=self.stop_at,
            module=self.backbone,
            fx_graph=self.graph,
        )

    def _group(self) -> None:
        """Features that appear on the same axes, equally often, form one space (the coarsest such partition)."""
        appearances: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, event in enumerate(self.trunk_events):
            for feature, times in Counter(self.component[event.entries].tolist()).items():
                appearances[feature].append((index, times))
        members: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for feature, where in appearances.items():  # in the order of first appearance
            members[tuple(where)].append(feature)
        self.space_of: dict[int, str] = {}
        self.rank_of: dict[int, int] = {}
        self.members: dict[str, list[int]] = {}
        for key, features in members.items():
            name = self._name(key)
            self.members[name] = features
            for rank, feature in enumerate(features):
                self.space_of[feature], self.rank_of[feature] = name, rank

    def _name(self, where: tuple[tuple[int, int], ...]) -> str:
        events = [self.trunk_events[index] for index, _ in where]
        first = next((event for event in events if event.role == "producer"), events[0])
        base = first.name.rpartition(".")[0] if "." in first.name else first.name
        same = sum(name.split("#")[0] == base for name in self.members)
        return f"{base}#{same + 1}" if same else base

    def _ref(self, entries: Ids, role: Any) -> AxisRef:
        """Sort the entries of an axis into blocks: the k-th appearance of each feature of a space is one block."""
        features = self.component[entries].tolist()
        repeat = _common_repeat(features)
        places: dict[tuple[str, int], dict[int, int]] = {}
        seen: Counter[int] = Counter()
        for position, feature in enumerate(features[::repeat]):
            if feature in self.space_of:
                key = self.space_of[feature], seen[feature]
                places.setdefault(key, {})[self.rank_of[feature]] = position * repeat
                seen[feature] += 1
        blocks = (
            Block(space, as_starts(np.array([starts[rank] for rank in range(len(starts))])), repeat)
            for (space, _), starts in places.items()
        )
        return AxisRef(tuple(blocks), role, len(entries))

    def _crossing(self, node: fx.Node, head_events: list[Event]) -> Crossing:
        value = self.trunk_values[node]
        if not isinstance(value, Features):
            return Crossing(node.name)
        own = self.component[self.head_values[node].ids]
        others = [self.component[event.entries] for event in head_events if event.role == "producer"]
        others += [self.component[ids] for ids in (*self.ctx.pinned, *self.ctx.opaque, *self.returned)]
        others += [self.component[other.ids] for source, other in self.head_values.items() if source is not node]
        absorbed = not any(np.isin(own, other).any() for other in others) and len(set(own.tolist())) == len(own)
        return Crossing(node.name, value.axis, self._ref(value.entries(), None), absorbed)

    def _axes(self, crossings: tuple[Crossing, ...], head_events: list[Event]) -> dict[str, tuple[AxisRef | None, ...]]:
        table: dict[str, list[AxisRef | None]] = {}
        canonical = set(self.ctx._canonical.values())
        for name, tensor in (*self.backbone.named_parameters(), *self.backbone.named_buffers()):
            if name in canonical:
                table[name] = [None] * tensor.ndim
        for event in self.trunk_events:
            if event.role is not None and table[event.name][event.axis] is None:
                table[event.name][event.axis] = self._ref(event.entries, event.role)
        for node, crossing in zip(self.crossing_nodes, crossings, strict=True):
            if not crossing.absorbed:
                continue
            own = dict(zip(self.head_values[node].ids.tolist(), self.trunk_values[node].ids.tolist(), strict=True))
            for event in head_events:
                entries = event.entries
                if event.role == "consumer" and entries[0] in own:
                    translated = np.array([own.get(feature, -1) for feature in entries.tolist()])
                    if (translated >= 0).all():
                        table[event.name][event.axis] = self._ref(translated, "consumer")
        return {name: tuple(refs) for name, refs in table.items()}

    def _spaces(self) -> dict[str, FeatureSpace]:
        pinned = {int(feature) for ids in self.ctx.pinned for feature in self.component[ids]}
        roles: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: {"producer": [], "consumer": []})
        last: dict[str, tuple[tuple[int, int], Event]] = {}
        for event in self.trunk_events:
            crossing = event.role is None
            for space in dict.fromkeys(self.space_of[feature] for feature in self.component[event.entries].tolist()):
                if event.role is not None:
                    roles[space][event.role].append((event.name, event.axis))
                if event.role != "producer":
                    moment = (int(crossing), self.position[event.node])  # the cut comes after all of the trunk
                    last[space] = max(last.get(space, (moment, event)), (moment, event), key=lambda item: item[0])
        spaces = {}
        for name, features in self.members.items():
            is_pinned = not pinned.isdisjoint(features)
            spaces[name] = FeatureSpace(
                name=name,
                size=len(features),
                producers=tuple(roles[name]["producer"]),
                consumers=tuple(roles[name]["consumer"]),
                tap=self._tap(name, last[name][1]) if name in last and not is_pinned else None,
                pinned=is_pinned,
            )
        return spaces

    def _tap(self, space: str, event: Event) -> Tap:
        value = self._before_pooling(event.value)
        assert value.node is not None
        ref = self._ref(event.entries if value is event.value else value.entries(), None)
        block = next(block for block in ref.blocks if block.space == space)
        reader = str(event.node.target) if event.node.op == "call_module" else location(event.node)
        return Tap(value.node.name, value.axis, block, "the cut" if event.role is None else reader)

    def _before_pooling(self, value: Features) -> Features:
        """What a global pooling reads: every position is a sample, while its average is but one per input."""
        node, found = value.node, value
        while node is not None and product(found.positions) == 1 and found.repeat == 1:
            inputs = [self.values[source] for source in node.all_input_nodes if source in self.values]
            if find_rule(node, self.backbone) not in POOLING or len(inputs) != 1 or not isinstance(inputs[0], Features):
                return value
            found, node = inputs[0], inputs[0].node
        return found


def _common_repeat(features: list[int]) -> int:
    """The length of the runs of equal neighbours, where all have the same."""
    array = np.array(features)
    starts = np.flatnonzero(np.r_[True, array[1:] != array[:-1]]) if len(array) else np.zeros(1)
    lengths = np.diff(np.r_[starts, len(array)])
    return int(lengths[0]) if len(lengths) and (lengths == lengths[0]).all() else 1
