"""Analysis of a captured network: interprets its graph, and groups its features into spaces."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx, nn

from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.events import Event
from lightning_zipit.graph.grouping import Grouping
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.naming import describe_node, place_of
from lightning_zipit.graph.notes import find_notes
from lightning_zipit.graph.order import varying
from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.spaces import (
    Crossing,
    FeatureSpace,
    MergeGraph,
    Projection,
    Tap,
)
from lightning_zipit.graph.table import AxisRef, Block, Row, named_tensors
from lightning_zipit.graph.taps import find_repeated, measured_once
from lightning_zipit.graph.uses import find_conflicts, find_uses
from lightning_zipit.graph.values import Features, Opaque, leaves


class Analysis:
    """The analysis of one captured network, which results in a :class:`MergeGraph`.

    Args:
        backbone: the network.
        graph: its captured graph.
        shapes: shapes of tensors by node name.
        trunk: the nodes of the trunk.
        stop_at: the module that was requested as the trunk's last.
        barriers: nodes that must stay in the heads, and the reasons.
        stem: the nodes of the stem.
        start_at: the module that was requested as the trunk's first.
        merge_heads: whether the models share one output space, whose order must stay.
    """

    def __init__(
        self,
        backbone: nn.Module,
        graph: fx.Graph,
        shapes: dict[str, tuple[int, ...]],
        trunk: set[fx.Node],
        stop_at: str | None,
        barriers: Mapping[str, str],
        stem: Collection[fx.Node] = (),
        start_at: str | None = None,
        merge_heads: bool = False,
    ) -> None:
        self.backbone, self.graph, self.stop_at, self.barriers = backbone, graph, stop_at, barriers
        self.nodes = list(graph.nodes)
        self.trunk, self.stem, self.start_at, self.merge_heads = trunk, stem, start_at, merge_heads
        self.ctx = Context(backbone, shapes, barriers)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.entry_nodes = [node for node in self.nodes if node in stem and not trunk.isdisjoint(node.users)]
        self.passed = [node for node in self.nodes if node in stem and any(map(self._in_head, node.users))]
        entering = self._enter()
        self.entries = {node: value for node, value in entering.items() if isinstance(value, Features)}
        values = self.values = self.ctx.run([node for node in self.nodes if node in trunk], entering, tolerant=())
        depending = varying(self.nodes)
        self.crossing_nodes = [
            node for node in self.nodes if node in trunk & depending and any(map(self._in_head, node.users))
        ]
        self.trunk_values = {node: values[node] for node in self.crossing_nodes}
        for node in self.crossing_nodes:
            self._cross(node, values[node])
        self.trunk_events = [event for events in self.ctx.events.values() for event in events]
        self.touched = list(self.ctx.touched.values())
        self.nestings, self.projected = list(self.ctx.nestings), list(self.ctx.projected)
        self.head_values = self._interpret_heads(values)

    def _in_head(self, node: fx.Node) -> bool:
        return node not in self.trunk and node not in self.stem

    def _enter(self) -> dict[fx.Node, Any]:
        """Interpret the stem, and replace the features that it outputs by new features of the trunk.

        The stem is not merged, so its operators must not tie features of the trunk.
        """
        stem = [node for node in self.nodes if node in self.stem]
        values = self.stem_values = self.ctx.run(stem, {}, tolerant=self.stem)
        self.ctx.forget()
        entering = {}
        for node in self.entry_nodes:
            self.ctx.node, value = node, values[node]
            if isinstance(value, Features) and len(value.axes) == 1:
                _, first, which = np.unique(value.ids.ravel(), return_index=True, return_inverse=True)
                value = replace(value, ids=self.ctx.fresh(len(first))[np.argsort(np.argsort(first))[which]])
                self.ctx.enter(value)
            elif any(isinstance(part, (Features, Opaque)) and part.ids.size for part in leaves(value)):
                raise ConfigurationError(
                    f"The trunk cannot start at {self.start_at!r}: its input from "
                    f"{describe_node(node, self.backbone)} has no known axis of features, or several. "
                    "Choose another module as `start_at`, or register rules for "
                    "the operators before it with `lightning_zipit.graph.register_rule`."
                )
            entering[node] = value
        return entering

    def _cross(self, node: fx.Node, value: Any) -> None:
        self.ctx.node = node
        if not isinstance(value, Features):
            if any(isinstance(part, Features) for part in leaves(value)):
                raise self.ctx.error("the trunk would end at an operator that returns several tensors")
            return
        if len(value.axes) > 1:
            raise self.ctx.error(
                "the trunk would end at a tensor with separate attention heads; end it after the whole block"
            )
        self.ctx.cross(value)
        if self.merge_heads and any(user.op == "output" for user in node.users):
            self.ctx.pin(value, "they are the network's output")

    def _interpret_heads(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Features]:
        """Interpret the heads on new features, so that operators of a head do not tie spaces of the trunk."""
        own, known = {}, dict(values)
        for node, value in self.trunk_values.items():
            if isinstance(value, Features):
                own[node] = replace(value, ids=self.ctx.fresh(*value.ids.shape))
        for node in self.passed:
            value = known[node] = self.stem_values[node]
            if isinstance(value, Features):
                own[node] = replace(value, ids=self.ctx.fresh(*value.ids.shape))
        self.ctx.events, self.ctx.mixed, self.ctx.nestings, self.ctx.touched = {}, [], [], {}
        heads = [node for node in self.nodes if self._in_head(node)]
        known |= own
        self.ctx.run(heads, known, tolerant=set(heads))
        returned = leaves(known[self.nodes[-1]])
        self.returned = [value.ids.ravel() for value in returned if isinstance(value, (Features, Opaque))]
        self.head_nestings, self.ctx.nestings = self.ctx.nestings, self.nestings
        return own

    def result(self) -> MergeGraph:
        self.component = self.ctx.components()
        self._check_nestings()
        self._check_roles()
        self.grouping = Grouping(self.component, self.trunk_events, self.touched, self.nestings)
        head_events = [event for events in self.ctx.events.values() for event in events]
        heads = [node for node in self.nodes if self._in_head(node)]
        self.head_conflicts = find_conflicts(
            find_uses(self.backbone, heads, head_events, self.component), self.position
        )
        crossings = tuple(self._crossing(node, head_events) for node in self.crossing_nodes)
        rows, spaces = self._axes(self.trunk_events), self._spaces()
        of_heads = self._axes(head_events, self._read_by_heads(crossings))
        axes = self._every_name(rows, of_heads)
        passed = tuple(Crossing(node.name) for node in self.passed)
        return MergeGraph(
            spaces=spaces,
            axes=axes,
            crossings=crossings + passed,
            trunk_nodes=frozenset(node.name for node in self.trunk),
            stop_at=self.stop_at,
            module=self.backbone,
            fx_graph=self.graph,
            held={node.name: self._held(value) for node, value in self.values.items() if node in self.trunk},
            shapes=dict(self.ctx.shapes),
            barriers=dict(self.barriers),
            notes=tuple(find_notes(self.backbone, self.nodes, self.trunk, spaces, axes, self.barriers)),
            start_at=self.start_at,
            stem_nodes=frozenset(node.name for node in self.stem),
            entries=tuple(map(self._entry, self.entry_nodes)),
            head_axes=of_heads,
        )

    def _held(self, value: Any) -> tuple[str, ...]:
        ids = [part.ids.ravel() for part in leaves(value) if isinstance(part, Features)]
        features = self.component[np.concatenate(ids)].tolist() if ids else []
        return tuple(
            dict.fromkeys(self.grouping.space_of[feature] for feature in features if feature in self.grouping.space_of)
        )

    def _check_nestings(self) -> None:
        """Check that no two operators group the same features differently; if so, the later one becomes a barrier."""
        for nesting in self.nestings:
            units, members = self.component[nesting.units], np.sort(self.component[nesting.members], 1)
            first = {unit: row for row, unit in reversed(list(enumerate(units.tolist())))}
            same = all((members[row] == members[first[unit]]).all() for row, unit in enumerate(units.tolist()))
            if not same:
                clashing = (other.node for other in self.nestings if np.isin(self.component[other.units], units).any())
                self.ctx.node = max(clashing, key=self.position.__getitem__)
                raise self.ctx.error(
                    f"it divides features into {nesting.kind} that differ from those of an earlier operator"
                )

    def _crossing(self, node: fx.Node, head_events: list[Event]) -> Crossing:
        value = self.trunk_values[node]
        if not isinstance(value, Features):
            return Crossing(node.name)
        own = self.component[self.head_values[node].ids.ravel()]
        others = [event.entries for event in head_events if event.kind != "consumer" or event.groups > 1]
        others += [event.entries for event in head_events if event.path in self.head_conflicts]
        others += [ids for ids, _ in self.ctx.pinned]
        others += [ids.ravel() for nesting in self.head_nestings for ids in (nesting.members, nesting.units)]
        others += [*self.ctx.mixed, *self.ctx.opaque, *self.returned]
        others += [other.ids.ravel() for source, other in self.head_values.items() if source is not node]
        absorbed = len(set(own.tolist())) == len(own)
        for entries in (*(event.entries for event in head_events), *self.ctx.touched.values()):
            # an operator on a part of the features cannot read merged features, as these have no such parts
            appearances = np.isin(self.head_values[node].ids.ravel(), entries).sum()
            absorbed = absorbed and appearances in (0, len(own))
        absorbed = absorbed and not any(np.isin(own, self.component[ids]).any() for ids in others)
        return Crossing(node.name, value.axes[0], self.grouping.ref(self.component[value.ids.ravel()], None), absorbed)

    def _entry(self, node: fx.Node) -> Crossing:
        shape = self.ctx.shapes.get(node.name, ())[1:]
        value = self.entries.get(node)
        if value is None:
            return Crossing(node.name, shape=shape)
        return Crossing(
            node.name, value.axes[0], self.grouping.ref(self.component[value.ids.ravel()], None), shape=shape
        )

    def _check_roles(self) -> None:
        """Check that every parameter of the trunk has one role; a node that uses it in another becomes a barrier."""
        nodes = [node for node in self.nodes if node in self.trunk]
        uses = find_uses(self.backbone, nodes, self.trunk_events, self.component)
        conflicts = find_conflicts(uses, self.position)
        if conflicts:
            path, self.ctx.node = min(conflicts.items(), key=lambda item: self.position[item[1]])
            raise self.ctx.error(f"it uses `{path}` in another role than an earlier layer")

    def _axes(self, events: list[Event], of: Mapping[int, int] | None = None) -> dict[str, Row]:
        """Build the rows of the parameters in some events, by the names that the forward reads.

        Args:
            events: the events of the trunk or of the heads.
            of: for heads, the trunk's feature for each feature of a head that reads the trunk through its weights.
        """
        tensors = named_tensors(self.backbone)
        table: dict[str, list[AxisRef | None]] = {}
        for event in events:
            if event.kind not in ("producer", "consumer"):
                continue
            row = table.setdefault(event.path, [None] * tensors[event.path].ndim)
            features = self.component[event.entries]
            if of is not None:
                features = np.array([of.get(feature, -1) for feature in event.entries.tolist()])
                if event.kind == "producer" or not (features >= 0).any():
                    continue
            if row[event.axis] is None:
                row[event.axis] = self.grouping.ref(features, event.kind, event.groups if of is None else 1)
        return {name: tuple(row) for name, row in table.items()}

    def _read_by_heads(self, crossings: Sequence[Crossing]) -> dict[int, int]:
        """Map each feature that a head reads through its weights to the trunk's feature."""
        read: dict[int, int] = {}
        for node, crossing in zip(self.crossing_nodes, crossings, strict=True):
            if crossing.absorbed:
                own, trunk = self.head_values[node].ids.ravel(), self.component[self.trunk_values[node].ids.ravel()]
                read.update(zip(own.tolist(), trunk.tolist(), strict=True))
        return read

    def _every_name(self, rows: Mapping[str, Row], of_heads: Mapping[str, Row]) -> dict[str, Row]:
        """Return a row for every name of every tensor: its own row, or the row of another name of the tensor."""
        tensors = named_tensors(self.backbone)
        known: dict[int, Row] = {}
        for source in (rows, of_heads):
            for name, row in source.items():
                known.setdefault(id(tensors[name]), row)
        return {
            name: rows.get(name) or of_heads.get(name) or known.get(id(tensor)) or (None,) * tensor.ndim
            for name, tensor in tensors.items()
        }

    def _pinned(self) -> dict[int, str]:
        """Return the pinned features and the reasons. A unit is pinned if one of its members is pinned."""
        why: dict[int, str] = {}
        for ids, reason in self.ctx.pinned:
            for feature in self.component[ids].tolist():
                why.setdefault(feature, reason)
        for nesting in self.nestings:
            for unit, row in zip(self.component[nesting.units].tolist(), self.component[nesting.members], strict=True):
                of_member = next((why[member] for member in row.tolist() if member in why), None)
                if of_member is not None:
                    why.setdefault(unit, of_member)
        return why

    def _spaces(self) -> dict[str, FeatureSpace]:
        pinned = self._pinned()
        roles: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: {"producer": [], "consumer": []})
        reads: dict[str, list[Event]] = defaultdict(list)
        for event in self.trunk_events:
            for space in self.grouping.spaces_of(event.entries):
                if event.kind in ("producer", "consumer"):
                    roles[space][event.kind].append((event.name, event.axis))
                if event.kind not in ("producer", "entry") and event.value is not None:
                    reads[space].append(event)
        repeated = {
            space for event in find_repeated(self.trunk_events) for space in self.grouping.spaces_of(event.entries)
        }
        unit_of = self._units()
        projections = self._projections()
        spaces = {}
        for name, features in self.grouping.members.items():
            why = next((pinned[feature] for feature in features if feature in pinned), "")
            tap = projections.get(name) or self._tap(name, reads[name], name in repeated)
            units = [unit_of[feature] for feature in features if feature in unit_of]
            spaces[name] = FeatureSpace(
                name=name,
                size=len(features),
                producers=tuple(roles[name]["producer"]),
                consumers=tuple(roles[name]["consumer"]),
                tap=None if why else tap,
                pinned=why,
                units=self.grouping.space_of[units[0]] if units else None,
                unit_of=tuple(self.grouping.rank_of[unit] for unit in units),
            )
        return spaces

    def _units(self) -> dict[int, int]:
        unit_of: dict[int, int] = {}
        for nesting in self.nestings:
            units, members = self.component[nesting.units], self.component[nesting.members]
            for unit, row in zip(units.tolist(), members.tolist(), strict=True):
                unit_of.update(dict.fromkeys(row, unit))
        return unit_of

    def _projections(self) -> dict[str, Tap]:
        """Return the taps of spaces whose features no node holds."""
        taps: dict[str, Tap] = {}
        for projected in self.projected:
            features = self.component[projected.ids].tolist()
            space = self.grouping.space_of[features[0]]
            assert projected.value.node is not None
            rows = {self.grouping.rank_of[feature]: projected.start + row for row, feature in enumerate(features)}
            projection = Projection(projected.weight, tuple(rows[rank] for rank in range(len(rows))))
            block = Block(space, range(projected.value.ids.size))
            here = Tap(projected.value.node.name, projected.value.axes, block, place_of(projected.node))
            known = taps.get(space, here)
            if projection in known.projections:  # the layer is applied again
                taps[space] = measured_once([known, *known.also, here])
            elif known.node == here.node:  # otherwise the space is already measured at another node
                taps[space] = replace(known, projections=(*known.projections, projection))
        return taps

    def _tap(self, space: str, reads: list[Event], everywhere: bool) -> Tap | None:
        """Return the tap of a space: at the cut, otherwise at its last reader; or at all readers if ``everywhere``."""
        reads = sorted(reads, key=lambda event: (event.kind != "crossing", -self.position[event.node]))
        taps = [self._tap_at(space, event) for event in (reads if everywhere else reads[:1])]
        return measured_once(taps) if taps else None

    def _tap_at(self, space: str, event: Event) -> Tap:
        assert event.value is not None
        value = self._before_pooling(event.value)
        assert value.node is not None
        ref = self.grouping.ref(self.component[value.ids.ravel()], None)
        block = next(block for block in ref.blocks if block.space == space)
        reader = "the cut" if event.kind == "crossing" else place_of(event.node)
        return Tap(value.node.name, value.axes, block, reader)

    def _before_pooling(self, value: Features) -> Features:
        """Return the input of a global pooling in place of its output: each position is a sample."""
        node, found = value.node, value
        while node in self.trunk and math.prod(found.positions) == 1 and len(np.unique(found.ids)) == found.ids.size:
            inputs = [self.values[source] for source in node.all_input_nodes if source in self.values]
            passing = traits_of(node, self.backbone) & (Trait.POOLING | Trait.REARRANGE)
            if not passing or len(inputs) != 1 or not isinstance(inputs[0], Features):
                return value
            found, node = inputs[0], inputs[0].node
        return found
