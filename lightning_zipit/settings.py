"""The options of a merge: their declaration, documentation and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, get_args

from torch import nn
from typing_extensions import Unpack

from lightning_zipit._common.options import keywords_of, option, spell_out, spelled_options, unknown_names, wrong_values
from lightning_zipit._merging.widths import Width, changes_size
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.functional.matrices import check_weights
from lightning_zipit.matchers import Average, GreedyZip, Matcher, SimilarityKind
from lightning_zipit.refine import NAMED, Refinement
from lightning_zipit.task_vectors import Combination

Target = TypeVar("Target", bound=Callable[..., Any])

ModelWeights: TypeAlias = Mapping[str, float] | Sequence[float]
"""The weight of each model in an average: by task, or in the order of the tasks."""

Refine = Literal["batch_norm", "repair", "least_squares"] | Refinement
"""A refinement, or the name of one with its default settings."""

SIMILARITIES = ", ".join(map(repr, get_args(SimilarityKind)))
REFINEMENTS = ", ".join(map(repr, NAMED))
REFINEMENT_CLASSES = ", ".join(type(known).__name__ for known in NAMED.values())


class MergeOptions(TypedDict, total=False):
    """The options of a merge as keyword arguments, for editors and type checkers.

    :class:`MergeSettings` documents them. A test checks that names and types agree with that class.
    """

    stop_at: str | None
    matcher: Matcher | None
    refine: Refine | None
    merge_heads: bool
    verify: bool
    statistics_memory: float
    statistics: str | Path | None
    similarity: SimilarityKind
    width: Width
    flops: float | None
    combine: Combination | None
    positions: int | None
    weights: ModelWeights | None
    start_at: str | None


@dataclass(frozen=True)
class MergeSettings:
    """The options of a merge.

    Every merge takes them: :class:`~lightning_zipit.ZipIt` and :class:`~lightning_zipit.ZipItCallback` as keyword
    arguments, the command line as flags, a sweep as values or lists of values.

    Attributes:
        stop_at: dotted name, inside the backbone, of the trunk's last module. ``None`` merges all layers but the last
            one, which becomes the head of each task. ``"auto"`` chooses the module within the budget ``flops``, and
            needs ``width="auto"``.
        matcher: the matcher of features. ``None`` stands for ``GreedyZip()``, or with ``combine`` for ``Average()``.
        refine: the refinement of the merged weights, on the calibration data: ``"least_squares"`` fits every layer to
            the sources, ``"batch_norm"`` re-estimates running statistics, ``"repair"`` gives every layer the means and
            standard deviations of the sources, ``None`` does nothing. To set the arguments of a refinement, give
            ``LeastSquares(positions=256)``, or ``--refine LeastSquares --refine.positions 256``.
        merge_heads: merge the last layer too. The models must share one output space.
        verify: prove on the first calibration batch that permuting each feature space does not change the outputs.
        statistics_memory: memory for the statistics, in GiB. If the statistics need more, the calibration data is read
            several times, each time for a part of the feature spaces.
        statistics: a safetensors file for the statistics. If the file exists, it replaces calibration. Otherwise the
            statistics are saved to it, and an interrupted calibration resumes.
        similarity: the similarity of features, from their activations: ``"correlation"``, ``"absolute"`` (its absolute
            value), ``"cosine"`` or ``"covariance"``.
        width: the number of features of the merged network, as a ratio to one source: one ratio for all feature spaces,
            or ratios by the name of the space. A ratio above 1 makes the merged network more accurate and more
            expensive; a ratio below 1 does the opposite. The ratio N, for N models, merges no features. ``"auto"``
            chooses the widths within the budget ``flops``. A ratio below 1 also compresses a single model.
        flops: the budget of ``width="auto"``: the ratio of the merged network's FLOPs to one source's FLOPs.
        combine: the rule that combines the changes of the sources to their common base, instead of an average:
            ``TaskArithmetic()``, ``Ties()`` or ``Dare()``. Only for sources that were trained from one base. Features
            are then matched by index.
        positions: the number of random positions of each image or sequence that the statistics use; ``None`` for all. A
            few positions give nearly the same matching in less time.
        weights: the weight of each model in averages of features, by task or in the order of the tasks; ``None`` for
            equal weights.
        start_at: dotted name, inside the backbone, of the trunk's first module. Modules that do not depend on it become
            the stem of each task. Inputs and first layers may then differ between models. ``None`` starts the trunk at
            the input.
        also: other merges of the same models that the ``statistics`` must also serve.

    Raises:
        ConfigurationError: with every problem, if options are not allowed, or not allowed together.
    """

    stop_at: str | None = field(
        default=None, metadata=option("the dotted name of a module, 'auto', or None", swept=True)
    )
    matcher: Matcher = field(  # type: ignore[assignment]  # None becomes the default matcher
        default=None, metadata=option("an instance of Matcher, such as GreedyZip(), or None", swept=True)
    )
    refine: Refine | None = field(
        default="least_squares",
        metadata=option(f"one of {REFINEMENTS}, an instance of {REFINEMENT_CLASSES}, or None", swept=True),
    )
    merge_heads: bool = field(default=False, metadata=option("True or False"))
    verify: bool = field(default=True, metadata=option("True or False", column=False))
    statistics_memory: float = field(
        default=8.0, metadata=option("above 0 (a number of GiB)", lambda size: size > 0, column=False)
    )
    statistics: str | Path | None = field(default=None, metadata=option("the path of a file, or None", column=False))
    similarity: SimilarityKind = field(default="correlation", metadata=option(f"one of {SIMILARITIES}", swept=True))
    width: Width = field(
        default=1.0,
        metadata=option(
            'a ratio, a dict of ratios by the name of the feature space, or "auto"',
            lambda width: not isinstance(width, str) or width == "auto",
            swept=True,
        ),
    )
    flops: float | None = field(
        default=None,
        metadata=option("above 0 (a ratio to the FLOPs of one source), or None", lambda budget: budget > 0, swept=True),
    )
    combine: Combination | None = field(
        default=None, metadata=option("an instance of Combination, such as Ties(), or None", swept=True)
    )
    positions: int | None = field(
        default=None, metadata=option("an integer of at least 1, or None for all", lambda count: count >= 1)
    )
    weights: ModelWeights | None = field(
        default=None, metadata=option("a dict of numbers by task, a list of numbers in the order of the tasks, or None")
    )
    start_at: str | None = field(
        default=None, metadata=option("the dotted name of a module, or None", swept=True, slowest=True)
    )
    also: tuple[MergeSettings, ...] = field(
        default=(), metadata=option("a tuple of MergeSettings", column=False, keyword=False)
    )

    def __post_init__(self) -> None:
        if self.matcher is None:
            object.__setattr__(self, "matcher", GreedyZip() if self.combine is None else Average())
        wrong = wrong_values(self)
        together = (problem_of(self) for names, problem_of in TOGETHER if wrong.keys().isdisjoint(names))
        if problems := [*wrong.values(), *filter(None, together)]:
            raise ConfigurationError.collect(problems)

    @classmethod
    def of(cls, **options: Unpack[MergeOptions]) -> MergeSettings:
        """Make settings from keyword arguments.

        Raises:
            ConfigurationError: if an option is unknown, with the names of all options; or if a value is not allowed.
        """
        if problems := unknown_names(options, keywords_of(cls)):
            raise ConfigurationError.collect(problems)
        return cls(**options)  # type: ignore[arg-type]  # None is the default matcher

    def weights_of(self, tasks: Sequence[str]) -> tuple[float, ...] | None:
        """Return the weight of each task's model, in the order of the tasks; ``None`` if all weights are equal.

        Raises:
            ConfigurationError: unless every task has one weight, no weight is negative, and at least one is positive.
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

    @property
    def measured_similarity(self) -> SimilarityKind:
        """The similarity that the matcher receives."""
        return self.matcher.similarity or self.similarity

    @property
    def last_module(self) -> str | None:
        """The trunk's last module before matching: ``stop_at``, or ``None`` (the longest trunk) for ``"auto"``."""
        return None if self.stop_at == "auto" else self.stop_at

    def needs_data(self, networks: Iterable[nn.Module]) -> bool:
        """Whether a merge of these networks needs calibration data, for its matching or its refinement."""
        how = self.refinement
        return self.matcher.needs_data or (how is not None and how.needs_data(networks))

    @property
    def refinement(self) -> Refinement | None:
        """The refinement with its settings."""
        return NAMED[self.refine] if isinstance(self.refine, str) else self.refine

    @property
    def before_activations(self) -> bool:
        """Whether features are measured in front of their activation functions, where least squares fit layers."""
        # In front of the activation, features are often linear functions of fewer other features. Linear maps between
        # them are then not unique, and mix the features after the activation arbitrarily.
        how = self.refinement
        return how is not None and how.pre_activations and self.matcher.similarity != "covariance"

    @property
    def norms_per_task(self) -> bool:
        """Whether the trunk has a batch norm for each task."""
        return self.refinement is not None and self.refinement.per_task


def with_options(target: Target) -> Target:
    """Add the options of a merge to the signature and docstring of a function or class that takes ``**options``.

    Names, types and texts come from :class:`MergeSettings`. The docstring of the target needs an entry ``options``.
    """
    return spell_out(target, spelled_options(MergeSettings))


def _budget_problem(settings: MergeSettings) -> str | None:
    if (settings.width == "auto") != (settings.flops is not None):
        return (
            f'`flops` is the budget of width="auto", but got width={settings.width!r} and flops={settings.flops}. Give '
            "both or neither."
        )
    return None


def _cut_problem(settings: MergeSettings) -> str | None:
    if settings.stop_at == "auto" and (settings.width != "auto" or settings.merge_heads):
        return (
            'stop_at="auto" chooses the end of the trunk within a budget of FLOPs, but got '
            f'width={settings.width!r} and merge_heads={settings.merge_heads}. Give width="auto" and `flops` with it, '
            "and merge_heads=False."
        )
    return None


def _width_problem(settings: MergeSettings) -> str | None:
    matcher = settings.matcher
    inner = matcher.per_space
    if changes_size(settings.width) and not inner.any_width:
        return (
            f"{type(inner).__name__} cannot change the number of features, but got width={settings.width!r}. Use "
            "another matcher, such as GreedyZip, KMeans or Agglomerative."
        )
    if settings.width == "auto" and matcher.joint:
        return (
            f'width="auto" matches every feature space several times, but {type(matcher).__name__} matches all spaces '
            "together. Give ratios as `width`, or use another matcher."
        )
    return None


def _similarity_problem(settings: MergeSettings) -> str | None:
    if settings.matcher.similarity is None or settings.similarity in ("correlation", settings.matcher.similarity):
        return None
    return (
        f"{type(settings.matcher).__name__} always uses the {settings.matcher.similarity} of features, but got "
        f"similarity={settings.similarity!r}. Omit `similarity`."
    )


def _combine_problem(settings: MergeSettings) -> str | None:
    if settings.combine is not None and not settings.matcher.by_index:
        return (
            "`combine` adds the changes of features with the same index, but got "
            f"matcher={settings.matcher!r}. Use matcher=Average()."
        )
    return None


def _weights_problem(settings: MergeSettings) -> str | None:
    if settings.combine is not None and settings.weights is not None:
        return "`weights` are for an average, but `combine` replaces the average. Give only one of them."
    return None


TOGETHER: tuple[tuple[tuple[str, ...], Callable[[MergeSettings], str | None]], ...] = (
    (("width", "flops"), _budget_problem),
    (("stop_at", "width", "merge_heads"), _cut_problem),
    (("width", "matcher"), _width_problem),
    (("similarity", "matcher"), _similarity_problem),
    (("combine", "matcher"), _combine_problem),
    (("combine", "weights"), _weights_problem),
)
"""Options that depend on each other, and the function that finds a problem of their combination."""
