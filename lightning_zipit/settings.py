"""What a merge is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from lightning_zipit._merging.widths import Width, changes_size
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.functional.matrices import check_weights
from lightning_zipit.matchers import AnyWidthMatcher, Average, DualSpace, GreedyZip, Matcher, SimilarityKind
from lightning_zipit.refine import NAMED, BatchNorm, LeastSquares, Refinement
from lightning_zipit.task_vectors import Combination

ModelWeights: TypeAlias = Mapping[str, float] | Sequence[float]
"""How much each model counts: by task, or in the order of the tasks."""

Refine = Literal["batch_norm", "repair", "least_squares"] | Refinement
"""What follows merging: a refinement, or the name of one with its default settings."""


@dataclass(frozen=True)
class MergeSettings:
    """What a merge is asked to do.

    Attributes:
        stop_at: dotted name inside the backbone of the trunk's last module; ``None`` zips everything down to the last
            layer, which stays a head per task. With ``width="auto"``, ``"auto"`` chooses it within ``flops`` too.
        matcher: similarity → labels, or dense maps.
        similarity: how alike features are: ``"correlation"``, ``"absolute"`` (its absolute value), ``"cosine"``, or
            ``"covariance"`` of their activations.
        refine: what follows merging: ``"least_squares"`` fits every layer to the sources, ``"batch_norm"`` re-estimates
            running statistics, ``"repair"`` gives layers the sources' means and deviations, ``None`` does nothing.
            Settings other than the default come with an instance, such as ``LeastSquares(positions=None)``.
        merge_heads: merge the last layer too, for models that share one output space.
        verify: prove the table of axes on the first calibration batch.
        statistics_memory: GiB that the statistics may take; where they need more, the calibration data is gone through
            several times, with the statistics of some spaces each time.
        statistics: a safetensors file for the statistics. One that is there stands for the calibration; else it is
            written, and an interrupted calibration goes on from what it had gathered.
        width: how many features the merged network has, as a ratio to one source's (1): above 1 it is more accurate and
            costs more, up to N, where no two features are merged; for all spaces, or by the name of the space.
            ``"auto"`` chooses them within ``flops``. A single model can be folded with a width below 1.
        flops: for ``width="auto"``, what the merged network may cost, as a ratio to one source's FLOPs.
        positions: how many positions of each image or sequence the statistics are taken from, at random; ``None`` for
            all. A few give nearly the same matching in less time.
        combine: for sources that were trained from one base and are matched by number: how their changes to it are
            combined, such as ``Ties()``, instead of averaging weights.
        weights: how much each model counts where features become one, by task or in the order of the tasks; all the
            same by default.
        start_at: dotted name inside the backbone of the trunk's first module: all that does not depend on it stays a
            stem per task, so that inputs and first layers may differ from model to model. ``None`` zips from the input
            on.
        also: other merges of the same models that a calibration for ``statistics`` shall serve too.

    Raises:
        ConfigurationError: if an argument is not one of those there are.
    """

    stop_at: str | None = None
    matcher: Matcher = field(default_factory=GreedyZip)
    refine: Refine | None = "least_squares"
    merge_heads: bool = False
    verify: bool = True
    statistics_memory: float = 8.0
    statistics: str | Path | None = None
    similarity: SimilarityKind = "correlation"
    width: Width = 1.0
    flops: float | None = None
    combine: Combination | None = None
    positions: int | None = None
    weights: ModelWeights | None = None
    start_at: str | None = None
    also: tuple[MergeSettings, ...] = ()

    def __post_init__(self) -> None:
        self._check_width()
        if self.similarity not in get_args(SimilarityKind):
            raise ConfigurationError(
                f"`similarity` must be one of {get_args(SimilarityKind)}, got {self.similarity!r}."
            )
        if self.positions is not None and self.positions < 1:
            raise ConfigurationError(f"`positions` must be at least 1, or None for all, got {self.positions}.")
        if not self.statistics_memory > 0:
            raise ConfigurationError(f"`statistics_memory` must be above 0 GiB, got {self.statistics_memory}.")
        if self.refine is not None and not isinstance(self.refine, Refinement) and self.refine not in NAMED:
            raise ConfigurationError(
                f"`refine` must be None, one of {list(NAMED)}, or an instance of one of "
                f"{[type(known).__name__ for known in NAMED.values()]}, got {self.refine!r}."
            )
        if not isinstance(self.matcher, Matcher):
            raise ConfigurationError(f"`matcher` must be a Matcher such as GreedyZip(), got {self.matcher!r}.")
        if self.matcher.similarity is not None and self.similarity not in ("correlation", self.matcher.similarity):
            raise ConfigurationError(
                f"{type(self.matcher).__name__} looks at the {self.matcher.similarity} of features whatever is said: "
                f"leave `similarity` out, got {self.similarity!r}."
            )
        if self.combine is not None and not isinstance(self.combine, Combination):
            raise ConfigurationError(f"`combine` must be a Combination such as Ties(), got {self.combine!r}.")
        if self.combine is not None and not isinstance(self.matcher, Average):
            raise ConfigurationError(
                f"`combine` adds up changes of weights by their number: use matcher=Average(), got {self.matcher!r}."
            )
        if self.combine is not None and self.weights is not None:
            raise ConfigurationError("`weights` are for averaging, and `combine` takes its place: give one of them.")

    def weights_of(self, tasks: Sequence[str]) -> tuple[float, ...] | None:
        """How much the model of each task counts, in the order of the tasks; ``None`` where all count the same.

        Raises:
            ConfigurationError: if they are not one per task, none negative and one positive.
        """
        if self.weights is None:
            return None
        if isinstance(self.weights, Mapping) and set(self.weights) != set(tasks):
            raise ConfigurationError(f"`weights` has the keys {list(self.weights)}, but the tasks are {list(tasks)}.")
        in_order = [self.weights[task] for task in tasks] if isinstance(self.weights, Mapping) else self.weights
        try:
            check_weights(in_order, len(tasks))
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        return tuple(map(float, in_order))

    def _check_width(self) -> None:
        if (self.width == "auto") != (self.flops is not None):
            raise ConfigurationError(
                '`flops` is the budget of width="auto": give both or neither, got '
                f"width={self.width!r} and flops={self.flops}."
            )
        if self.stop_at == "auto" and (self.width != "auto" or self.merge_heads):
            raise ConfigurationError(
                'stop_at="auto" shares out a budget of FLOPs: give width="auto" and `flops` with it, and no '
                f"`merge_heads`, got width={self.width!r} and merge_heads={self.merge_heads}."
            )
        if self.flops is not None and not self.flops > 0:
            raise ConfigurationError(f"`flops` must be above 0, got {self.flops}.")
        if isinstance(self.width, str) and self.width != "auto":
            raise ConfigurationError(
                f'`width` must be a ratio, ratios by the name of the space, or "auto", got {self.width!r}.'
            )
        inner = self.matcher.matcher if isinstance(self.matcher, DualSpace) else self.matcher
        if changes_size(self.width) and isinstance(inner, Matcher) and not isinstance(inner, AnyWidthMatcher):
            raise ConfigurationError(
                f"{type(inner).__name__} leaves as many features as one model has: width={self.width!r} needs another "
                "matcher, such as GreedyZip, KMeans or Agglomerative."
            )
        if self.width == "auto" and isinstance(self.matcher, DualSpace):
            raise ConfigurationError(
                f'width="auto" matches every space several times, and {type(self.matcher).__name__} all spaces '
                "together: give ratios, or another matcher."
            )

    @property
    def measured_similarity(self) -> SimilarityKind:
        """What the matcher is given."""
        return self.matcher.similarity or self.similarity

    @property
    def last_module(self) -> str | None:
        """The trunk's last module as far as that is known before matching: with ``"auto"``, it may be any."""
        return None if self.stop_at == "auto" else self.stop_at

    @property
    def refinement(self) -> Refinement | None:
        """What follows merging, with its settings."""
        return NAMED[self.refine] if isinstance(self.refine, str) else self.refine

    @property
    def before_activations(self) -> bool:
        """Whether features are measured in front of their activation functions, as layers are fitted there."""
        # They are often linear functions of fewer others there: linear maps between them are then not unique, and mix
        # what the activation function makes of them in any way.
        how = self.refinement
        return isinstance(how, LeastSquares) and how.pre_activations and self.matcher.similarity != "covariance"

    @property
    def norms_per_task(self) -> bool:
        """Whether the trunk has a batch norm for each task."""
        return isinstance(self.refinement, BatchNorm) and self.refinement.per_task


def default_matcher(combine: Combination | None) -> Matcher:
    """What matches where nothing is said: changes to a base go by the number of the feature."""
    return Average() if combine is not None else GreedyZip()
