"""The base class of all matchers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lightning_zipit._matching.families import Match
from lightning_zipit._matching.maps import DenseMaps
from lightning_zipit._matching.similarity import SimilarityKind
from lightning_zipit._matching.spaces import Spaces


class Matcher(ABC):
    """Decides which features of N models become one; subclass it to write your own.

    Most matchers look at one space at a time: they define ``__call__``, from the similarity of one space to labels. A
    matcher that looks at several spaces, or at weights, also overrides :meth:`match`, and sets ``joint = True`` if it
    must be given all spaces at once.

    Attributes:
        similarity: the only similarity that the matcher takes, such as ``"covariance"`` for a matcher that returns
            :class:`DenseMaps`, which depend on the scale of features. ``None`` leaves the choice to ``similarity=`` of
            the merge.
        any_width: whether the matcher can leave any number of features, as ``width=`` of a merge asks for.
        joint: whether :meth:`match` must be given all spaces at once. Their similarities are then in memory together.
        needs_data: whether the matcher looks at activations. If not, no space is measured for it.
        by_index: whether feature k of every model always becomes merged feature k.
        dense: whether the matcher returns :class:`DenseMaps`. The report then lists the spaces that cannot take them.
    """

    similarity: ClassVar[SimilarityKind | None] = None
    any_width: bool = False
    joint: bool = False
    needs_data: bool = True
    by_index: bool = False
    dense: bool = False

    @property
    def per_space(self) -> Matcher:
        """The matcher that turns the similarity of one space into labels: this one, unless it wraps another."""
        return self

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side; a dead feature has a row of zeros.
            num_models: N.

        Returns:
            int64 labels ``(N·C,)`` with C clusters: the merged feature that each source feature becomes; or dense maps.
        """

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Call the matcher for one space, with the width if it takes one.

        Args:
            similarity: see :meth:`__call__`.
            num_models: N.
            width: the number of features to leave; C by default.

        Returns:
            Labels or dense maps.
        """
        return self(similarity, num_models)

    def match(self, spaces: Spaces) -> Mapping[str, Match]:
        """Match several spaces; by default each family by itself, from the similarity of its activations.

        Args:
            spaces: the spaces to match: one family, or all of them if :attr:`joint`.

        Returns:
            The matching of each space.
        """
        found: dict[str, Match] = {}
        for family in spaces.families:
            found |= spaces.match_family(family, self)
        return found


class AnyWidthMatcher(Matcher):
    """A matcher that can leave more or fewer features than one model has, as ``width=`` of a merge asks for."""

    any_width = True

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side; a dead feature has a row of zeros.
            num_models: N.
            width: the number of features to leave, 1 to N·C; C by default.

        Returns:
            int64 labels ``(N·C,)`` with ``width`` clusters; or dense maps of that width.
        """

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        return self(similarity, num_models) if width is None else self(similarity, num_models, width)
