"""Grouping of features into spaces, and of axis entries into the blocks of these spaces."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_zipit.graph.events import Event, Nesting
from lightning_zipit.graph.naming import place_of
from lightning_zipit.graph.table import AxisRef, Block, as_starts
from lightning_zipit.graph.values import Ids

STEM = "stem"
"""Name of the space that stems write. It must not depend on the modules of a stem."""


class Grouping:
    """The feature spaces of a trunk.

    Args:
        component: the component of each feature id; tied features have the same component.
        events: how the operators of the trunk use features.
        touched: sets of features that are the input of an operator.
        nestings: features in groups or heads.

    Attributes:
        space_of: the space of each feature.
        rank_of: the index of each feature in its space.
        members: the features of each space, in order.
    """

    def __init__(
        self, component: Ids, events: Sequence[Event], touched: Sequence[Ids], nestings: Sequence[Nesting]
    ) -> None:
        self.component, self.events, self.nestings = component, events, nestings
        self.space_of: dict[int, str] = {}
        self.rank_of: dict[int, int] = {}
        self.members: dict[str, list[int]] = {}
        self._refs: dict[Any, AxisRef] = {}
        self._group(touched)

    def _group(self, touched: Sequence[Ids]) -> None:
        """Form spaces of features that appear on the same axes, equally often (the coarsest such partition)."""
        where: dict[int, list[Any]] = defaultdict(list)
        for index, event in enumerate(self.events):
            for feature, times in Counter(self.component[event.entries].tolist()).items():
                where[feature].append((index, times))
        parts = {ids.tobytes(): ids for ids in map(self.component.__getitem__, touched)}
        for index, ids in enumerate(parts.values()):  # features that an operator reads without the others
            for feature, times in Counter(ids.tolist()).items():
                if feature in where:
                    where[feature].append((("part", index), times))
        nested = [(self.component[nesting.members], self.component[nesting.units]) for nesting in self.nestings]
        for index, (members, units) in enumerate(nested):
            for feature in dict.fromkeys(members.ravel().tolist()):
                where[feature].append(("in", index))
            for feature in dict.fromkeys(units.tolist()):
                where[feature].append(("unit", index))
        kinds = {feature: tuple(places) for feature, places in where.items()}  # in the order of first appearance
        count = 0
        while len(set(kinds.values())) > count:  # units differ if their members differ, and vice versa
            count = len(set(kinds.values()))
            number = {kind: index for index, kind in enumerate(dict.fromkeys(kinds.values()))}
            seen: dict[int, set[Any]] = defaultdict(set)
            for index, (members, units) in enumerate(nested):
                for unit, row in zip(units.tolist(), members.tolist(), strict=True):
                    seen[unit].add((index, *sorted(number[kinds[feature]] for feature in row)))
                    for feature in row:
                        seen[feature].add((index, number[kinds[unit]]))
            kinds = {
                feature: (number[kind], *sorted(seen[feature])) if feature in seen else (number[kind],)
                for feature, kind in kinds.items()
            }
        self._name_spaces(kinds, where)

    def _name_spaces(self, kinds: dict[int, Any], where: dict[int, list[Any]]) -> None:
        together: dict[Any, list[int]] = defaultdict(list)
        for feature, kind in kinds.items():
            together[kind].append(feature)
        for features in together.values():
            name = self._name(where[features[0]])
            self.members[name] = features
            for rank, feature in enumerate(features):
                self.space_of[feature], self.rank_of[feature] = name, rank

    def _name(self, where: list[Any]) -> str:
        nesting = next((self.nestings[index] for place, index in where if place == "unit"), None)
        events = [self.events[place] for place, _ in where if isinstance(place, int)]
        if nesting is not None:
            base = f"{place_of(nesting.node)} {nesting.kind}"
        elif any(event.kind == "entry" for event in events):
            base = STEM
        else:
            first = next((event for event in events if event.kind == "producer"), events[0])
            base = first.name.rpartition(".")[0] if "." in first.name else first.name
        same = sum(name.split("#")[0] == base for name in self.members)
        return f"{base}#{same + 1}" if same else base

    def spaces_of(self, entries: Ids) -> list[str]:
        """Return the spaces that some features belong to, in order."""
        features = self.component[entries].tolist()
        return list(dict.fromkeys(self.space_of[feature] for feature in features if feature in self.space_of))

    def ref(self, held: Ids, role: Any, groups: int = 1) -> AxisRef:
        """Sort the entries of an axis into blocks: the k-th appearance of each feature of a space forms one block."""
        key = held.tobytes(), role, groups  # weight, bias and statistics of a layer share one result
        if key not in self._refs:
            self._refs[key] = self._sort_into_blocks(held, role, groups)
        return self._refs[key]

    def _sort_into_blocks(self, held: Ids, role: Any, groups: int) -> AxisRef:
        features = held.tolist()
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
        return AxisRef(tuple(blocks), role, len(features), groups)


def _common_repeat(features: list[int]) -> int:
    """Return the length of runs of equal neighbors if all runs have the same length, otherwise 1."""
    array = np.array(features)
    starts = np.flatnonzero(np.r_[True, array[1:] != array[:-1]]) if len(array) else np.zeros(1)
    lengths = np.diff(np.r_[starts, len(array)])
    return int(lengths[0]) if len(lengths) and (lengths == lengths[0]).all() else 1
