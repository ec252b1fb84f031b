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
    """Base class of matchers, which decide which features of N models are merged. Subclass it to write your own.

    Most matchers match one space at a time: they define ``__call__``, which turns the similarity of one space into
    labels. A matcher that uses several spaces, or weights, also overrides :meth:`match`. It sets ``joint = True`` if
    it needs all spaces at once.

    Attributes:
        similarity: the only similarity that the matcher accepts, for example ``"covariance"`` for a matcher that
            returns :class:`DenseMaps`, which depend on the scale of features. With ``None``, ``similarity=`` of the
            merge decides.
        any_width: whether the matcher supports any number of merged features (``width=`` of a merge).
        joint: whether :meth:`match` needs all spaces at once. All similarities are then in memory at the same time.
        needs_data: whether the matcher uses activations. If not, no activations are measured for it.
        by_index: whether feature k of every model always becomes merged feature k.
        dense: whether the matcher returns :class:`DenseMaps`. The report then lists the spaces that do not support
            them.
    """

    similarity: ClassVar[SimilarityKind | None] = None
    any_width: bool = False
    joint: bool = False
    needs_data: bool = True
    by_index: bool = False
    dense: bool = False

    @property
    def per_space(self) -> Matcher:
        """The matcher that turns the similarity of one space into labels: ``self``, or the wrapped matcher."""
        return self

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side. A dead feature has a row of zeros.
            num_models: N.

        Returns:
            int64 labels ``(N·C,)`` with C clusters (the merged feature of each source feature), or dense maps.
        """

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Call the matcher for one space, with the width if the matcher supports it.

        Args:
            similarity: see :meth:`__call__`.
            num_models: N.
            width: the number of merged features; C by default.

        Returns:
            Labels or dense maps.
        """
        return self(similarity, num_models)

    def match(self, spaces: Spaces) -> Mapping[str, Match]:
        """Match several spaces. By default, match each family separately by the similarity of its activations.

        Args:
            spaces: the spaces to match: one family, or all families if :attr:`joint`.

        Returns:
            The matching of each space.
        """
        found: dict[str, Match] = {}
        for family in spaces.families:
            found |= spaces.match_family(family, self)
        return found


class AnyWidthMatcher(Matcher):
    """Base class of matchers that support any number of merged features (``width=`` of a merge)."""

    any_width = True

    @abstractmethod
    def __call__(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        """Match the features of one space.

        Args:
            similarity: float64 ``(N·C, N·C)``, the models side by side. A dead feature has a row of zeros.
            num_models: N.
            width: the number of merged features, 1 to N·C; C by default.

        Returns:
            int64 labels ``(N·C,)`` with ``width`` clusters, or dense maps of this width.
        """

    def match_space(self, similarity: Tensor, num_models: int, width: int | None = None) -> Tensor | DenseMaps:
        return self(similarity, num_models) if width is None else self(similarity, num_models, width)
