"""Features, the ties between them, and the axes of parameters that use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_zipit.graph.events import Event, Nesting
from lightning_zipit.graph.values import Entries, Ids, Parameter


class Ties:
    """Features, those that must be merged alike, their units, and the axes of parameters that write or read them."""

    def __init__(self) -> None:
        self.nestings: list[Nesting] = []
        self._edges: list[tuple[Ids, Ids]] = []
        self._count = 0
        self.events: dict[tuple[str, int], list[Event]] = {}
        self._partial: tuple[Mapping[Any, Any], dict[tuple[str, int], Ids]] = (self.events, {})

    def fresh(self, *sizes: int) -> Ids:
        """Create new features that are tied to no others."""
        first = self._count
        self._count += int(np.prod(sizes))
        return np.arange(first, self._count).reshape(sizes)

    def tie(self, first: Ids, second: Ids) -> None:
        """Tie feature k of both, so that they are merged alike; there are as many of each."""
        if first is not second:
            self._edges.append((first.ravel(), second.ravel()))

    def numbered(self, parameter: Parameter, axis: int, size: int) -> Ids:
        """Return the features along the whole axis of a parameter of which only some entries are used at a time."""
        if self._partial[0] is not self.events:  # the heads have features of their own
            self._partial = (self.events, {})
        used, partial = self.events.get((parameter.name, axis)), self._partial[1]
        if (parameter.name, axis) not in partial:
            partial[parameter.name, axis] = used[0].entries if used else self.fresh(size)
        return partial[parameter.name, axis]

    def follow(self, entries: Entries) -> Ids:
        """Return the features that some entries of parameters write or read."""
        ids = self.fresh(len(entries.which))
        for number, (source, axis, size) in enumerate(entries.of):
            chosen = np.flatnonzero(entries.which == number)
            ids[chosen] = self.numbered(source, axis, size)[entries.rows[chosen]]
        for other in entries.also:
            self.tie(ids, self.follow(other))
        return ids

    def add(self, event: Event) -> None:
        """Record an ordered use of features. Uses of the same axis of a parameter are tied."""
        known = self.events.setdefault((event.name, event.axis), [])
        partial = self._partial[1].get((event.name, event.axis)) if self._partial[0] is self.events else None
        if known:  # the parameter is used twice
            self.tie(known[0].entries, event.entries)
        elif partial is not None:
            self.tie(partial, event.entries)
        known.append(event)

    def drop_single_units(self) -> Ids:
        """Drop units whose members are all tied to the unit itself; return the components of all features."""
        component = self._connected()
        self.nestings[:] = [
            nesting
            for nesting in self.nestings
            if (component[nesting.members] != component[nesting.units][:, None]).any()
        ]
        return component

    def components(self) -> Ids:
        """Return the index of the tied set that each feature belongs to. Units of one feature are tied to it."""
        while True:
            component = self._connected()
            pairs = [
                (component[nesting.members].ravel(), np.repeat(component[nesting.units], nesting.members.shape[1]))
                for nesting in self.nestings
            ]
            if not pairs:
                return component
            members, units = (np.concatenate(side) for side in zip(*pairs, strict=True))
            order = np.lexsort((units, members))
            members, units = members[order], units[order]
            several = (members[1:] == members[:-1]) & (units[1:] != units[:-1])
            if not several.any():
                return component
            first = np.zeros(self._count, np.int64)
            first[component] = np.arange(self._count)  # one feature of each component
            self._edges.append((first[units[1:][several]], first[units[:-1][several]]))

    def _connected(self) -> Ids:
        if not self._edges:
            return np.arange(self._count)
        first, second = (np.concatenate(side) for side in zip(*self._edges, strict=True))
        ties = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(self._count, self._count))
        return connected_components(ties, directed=False)[1].astype(np.int64)
