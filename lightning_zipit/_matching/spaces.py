"""The feature spaces of a merge: the input of a matcher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from lightning_zipit import functional as F
from lightning_zipit._matching.families import Match, Rule, match_family
from lightning_zipit._matching.maps import SpaceMap
from lightning_zipit._matching.weights import trunk_parameters, weights_of_space
from lightning_zipit.graph import FeatureSpace, MergeGraph
from lightning_zipit.graph.table import Table


@dataclass(frozen=True, eq=False)
class Spaces(Mapping[str, FeatureSpace]):
    """The feature spaces to match: a mapping from space names to spaces, in the order of the families.

    Attributes:
        graph: the merge graph of the first model. It may contain further spaces.
        networks: the N source networks.
        families: the names of the spaces by family. The spaces of a family must be matched together. Groups or heads
            come before the features inside them. Every other space is a family of its own.
        widths: the number of merged features of each space without groups or heads; by default the number of features
            of one model.
        similarity_of: see :meth:`similarity`.
        rigid_of: returns the spaces to which dense maps cannot be applied.
    """

    graph: MergeGraph
    networks: Sequence[nn.Module]
    families: Sequence[Sequence[str]]
    widths: Mapping[str, int] = field(default_factory=dict)
    similarity_of: Callable[[str], Tensor | None] = field(default=lambda name: None, repr=False)
    rigid_of: Callable[[], Collection[str]] = field(default=tuple, repr=False)

    @property
    def num_models(self) -> int:
        """The number of models N."""
        return len(self.networks)

    def __getitem__(self, name: str) -> FeatureSpace:
        if not any(name in family for family in self.families):
            raise KeyError(name)
        return self.graph.spaces[name]

    def __iter__(self) -> Iterator[str]:
        return (name for family in self.families for name in family)

    def __len__(self) -> int:
        return sum(map(len, self.families))

    def width(self, name: str) -> int:
        """Return the required number of merged features of a space."""
        return self.widths.get(name, self[name].size)

    def similarity(self, name: str) -> Tensor | None:
        """Return the similarity of the activations of a space.

        Returns:
            float64 ``(N·C, N·C)``, models side by side, or ``None`` if the space is not measured. A dead feature has a
            row of zeros.
        """
        return self.similarity_of(name)

    def weights(self, name: str, labels: Mapping[str, Tensor]) -> Tensor | None:
        """Return the weights that write or read each feature of a space.

        Their other axes are mapped to the order of the merged network, so that rows of different models are
        comparable.

        Args:
            name: the space.
            labels: int64 ``(N·C,)`` for other spaces. Missing spaces are matched by index.

        Returns:
            float64 ``(N·C, weights)``, or ``None`` if no weight writes or reads the space.
        """
        by_index = {
            other: F.average(self.num_models * space.size, self.num_models)
            for other, space in self.graph.spaces.items()
            if other not in labels
        }
        maps = {other: SpaceMap(known, self.num_models) for other, known in {**by_index, **labels}.items()}
        return weights_of_space(self._table, self.networks, name, maps)

    @cached_property
    def _table(self) -> Table:
        return trunk_parameters(self.graph)

    def match_family(
        self, family: Sequence[str], rule: Rule, similarities: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, Match]:
        """Match one family of spaces, including its groups or heads, with a matcher for one space.

        Args:
            family: one of :attr:`families`.
            rule: the matcher. Its ``__call__`` matches the features of one space.
            similarities: the similarity of each space, ``(N·C, N·C)``; by default the similarity of the activations. A
                space without a similarity is matched by index.

        Returns:
            The matching of each space.

        Raises:
            ConfigurationError: if the matcher returns matrices of a wrong shape, or with NaN or Inf.
        """
        given = {name: self.similarity(name) for name in family} if similarities is None else similarities
        known = {name: similarity for name, similarity in given.items() if similarity is not None}
        return match_family(self.graph, family, known, rule, self.num_models, self.widths, self.rigid_of)
