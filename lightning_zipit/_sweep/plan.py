"""Settings of a sweep: every combination of lists, or the suggestions of an Optuna study."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_zipit._common.collectives import decide
from lightning_zipit._common.messages import quiet
from lightning_zipit._common.options import Spelled, fits, options_of, spell_out, spelled_options, unknown_names
from lightning_zipit._sweep.results import Mode, SweepRow, as_columns, to_text
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import GreedyZip
from lightning_zipit.settings import MergeSettings, Target

if TYPE_CHECKING:
    from optuna import Study, Trial

Evaluate = Callable[[MergeSettings], SweepRow]
"""Merges and validates one setting, or returns its existing row."""


@dataclass(frozen=True)
class Range:
    """A range of numbers for a search.

    Args:
        low: the lowest number.
        high: the highest number.
        log: choose numbers on a logarithmic scale.

    Raises:
        ConfigurationError: if the range is empty, or if it is logarithmic and ``low`` is not above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigurationError(f"`low` of a range must be below `high`, got {self}.")
        if self.log and not self.low > 0:
            raise ConfigurationError(f"`low` of a logarithmic range must be above 0, got {self}.")

    def rounded(self, value: float) -> float:
        """Round a number to four significant digits within the range, so that tables show its exact value."""
        return min(max(float(f"{value:.4g}"), self.low), self.high)


SHORTHANDS = {
    "alpha": Spelled(Range | list[float] | float | None, None, "``alpha`` of ``GreedyZip``; not with ``matcher``."),
    "beta": Spelled(Range | list[float] | float | None, None, "``beta`` of ``GreedyZip``; not with ``matcher``."),
}
"""Arguments of a sweep that stand for the option ``matcher``."""


def with_choices(target: Target) -> Target:
    """Add the options of a sweep to the signature and docstring of a function that takes ``**choices``.

    Names, types and texts come from :class:`~lightning_zipit.MergeSettings`. The docstring of the target needs an entry
    ``choices``.
    """
    return spell_out(target, _spelled_choices())


def _spelled_choices() -> dict[str, Spelled]:
    declared, spelled = options_of(MergeSettings), spelled_options(MergeSettings)
    several: dict[str, Spelled] = {}
    for name in sorted(spelled, key=lambda name: not declared[name].slowest):
        if declared[name].swept:
            several[name] = _several(spelled[name])
            several |= SHORTHANDS if name == "matcher" else {}
    return {**several, **{name: each for name, each in spelled.items() if name not in several}}


def _several(one: Spelled) -> Spelled:
    """Extend the type of an option to lists of values, and for numbers to a range."""
    hint = list[one.hint] | one.hint  # type: ignore[name-defined]
    return one._replace(hint=Range | hint if fits(0.5, one.hint) else hint)


def split_choices(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keyword arguments of a sweep into choices and fixed options.

    Returns:
        The options that may vary, by name in the order of their declaration; and the options that all settings share.

    Raises:
        ConfigurationError: if an option is unknown.
    """
    known = _spelled_choices()
    if problems := unknown_names(given, known):
        raise ConfigurationError.collect(problems)
    swept = {name for name, declared in options_of(MergeSettings).items() if declared.swept} | {*SHORTHANDS}
    choices = {name: given[name] for name in known if name in given and name in swept}
    return choices, {name: value for name, value in given.items() if name not in swept}


class Plan(ABC):
    """The settings that a sweep tries.

    Attributes:
        settings: the settings that are checked in advance, and that the statistics must serve.
        asks: whether the next setting depends on earlier results.
        share: the number of this process, from 1, and the number of processes; ``None`` if this process tries all
            settings.
    """

    settings: list[MergeSettings]
    asks: bool
    share: tuple[int, int] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of settings to try."""

    @abstractmethod
    def run(self, evaluate: Evaluate) -> list[SweepRow]:
        """Try all settings.

        Args:
            evaluate: merges and validates one setting.

        Returns:
            One row per setting.
        """


class Grid(Plan):
    """All settings of a list, or one share of the list.

    Args:
        settings: the list.
        share: ``(k, n)`` selects every n-th setting, starting at the k-th.
    """

    asks = False

    def __init__(self, settings: list[MergeSettings], share: tuple[int, int] | None = None) -> None:
        self.settings, self.share = settings, share
        number, count = share or (1, 1)
        self._own = settings[number - 1 :: count]

    def __len__(self) -> int:
        return len(self._own)

    def run(self, evaluate: Evaluate) -> list[SweepRow]:
        return [evaluate(each) for each in self._own]


class Search(Plan):
    """The settings that an Optuna study suggests.

    By default, the study is new and has a fixed seed. After an interruption, it suggests the same settings again, finds
    their rows, and continues. Rank 0 asks the study for all ranks.

    Args:
        choices: values to choose from, as for :func:`grid`; also a :class:`Range` of numbers.
        fixed: the options that all settings share.
        trials: the number of settings, including the earlier trials of the study.
        study: an Optuna study of the metric, or of the metric and FLOPs; ``None`` for a new study.
        metric: the name of the metric.
        mode: ``"max"`` if a higher metric is better, ``"min"`` if a lower metric is better.

    Raises:
        ConfigurationError: if optuna is not installed; or with every problem of choices and study.
    """

    asks = True

    def __init__(
        self,
        choices: Mapping[str, Any],
        fixed: Mapping[str, Any],
        trials: int,
        study: Study | None,
        metric: str,
        mode: Mode,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigurationError(
                "A search (`trials`) needs optuna: pip install 'lightning-zipit[optuna]'."
            ) from error
        ends = {name: [value.low, value.high] if isinstance(value, Range) else value for name, value in choices.items()}
        self.settings = grid(ends, **fixed)
        self.trials, self.metric, self.fixed = trials, metric, dict(fixed)
        self.ranges = {name: value for name, value in choices.items() if isinstance(value, Range)}
        # Optuna's storages hold only text and numbers, so that a value from a list is identified by its text.
        self.values = {
            name: {to_text(value): value for value in _listed(tried)}
            for name, tried in choices.items()
            if name not in self.ranges
        }
        self.distributions: dict[str, Any] = {
            name: optuna.distributions.FloatDistribution(value.low, value.high, log=value.log)
            for name, value in self.ranges.items()
        } | {
            name: optuna.distributions.CategoricalDistribution(tuple(texts))
            for name, texts in self.values.items()
            if len(texts) > 1
        }
        wanted: list[Literal["minimize", "maximize"]] = ["maximize" if mode == "max" else "minimize", "minimize"]
        if study is None:
            with quiet("optuna"):
                study = optuna.create_study(directions=wanted, sampler=optuna.samplers.TPESampler(seed=0))
        self.study = study
        self._check(wanted)

    def _check(self, wanted: Sequence[str]) -> None:
        problems = []
        if self.trials < 1:
            problems.append(f"`trials` must be at least 1, got {self.trials}.")
        if not self.distributions:
            problems.append(
                "`trials` needs something to choose, but no option has several values. Give an option a list of "
                "values, or a `Range`."
            )
        directions = [direction.name.lower() for direction in self.study.directions]
        if directions not in (list(wanted), list(wanted[:1])):
            problems.append(
                f"`study` has the directions {directions}. Create it with the directions {list(wanted)} for "
                f"{self.metric!r} and FLOPs, or with {list(wanted[:1])} for {self.metric!r} only."
            )
        for trial in self.study.trials:
            if trial.state.is_finished() and trial.distributions != self.distributions:
                problems.append(
                    f"`study` has trials with other choices: trial {trial.number} chose {trial.params}, but this sweep "
                    f"chooses {', '.join(map(repr, self.distributions)) or 'nothing'}. Create a study with another "
                    "name."
                )
                break
        if problems:
            raise ConfigurationError.collect(problems)

    def __len__(self) -> int:
        return self.trials

    def run(self, evaluate: Evaluate) -> list[SweepRow]:
        rows = [evaluate(self._to_settings(params)) for params in decide(self._known)[: self.trials]]
        while len(rows) < self.trials:
            asked: list[Trial] = []  # filled on rank 0 only
            settings = self._to_settings(decide(partial(self._ask, asked)))
            rows.append(evaluate(settings))
            for trial in asked:
                self._tell(trial, rows[-1])
        return list({tuple(as_columns(row.settings).items()): row for row in rows if row.settings is not None}.values())

    def _known(self) -> list[dict[str, Any]]:
        return [trial.params for trial in self.study.trials if trial.state.is_finished()]

    def _ask(self, asked: list[Trial]) -> dict[str, Any]:
        with quiet("optuna"):
            asked.append(self.study.ask(self.distributions))
        return asked[0].params

    def _to_settings(self, params: Mapping[str, Any]) -> MergeSettings:
        chosen = {
            name: self.ranges[name].rounded(params[name])
            if name in self.ranges
            else self.values[name][params.get(name, next(iter(self.values[name])))]
            for name in (*self.values, *self.ranges)
        }
        (settings,) = grid({name: [value] for name, value in chosen.items()}, **self.fixed)
        return settings

    def _tell(self, trial: Trial, row: SweepRow) -> None:
        with quiet("optuna"):
            if row.error:
                from optuna.trial import TrialState

                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.study.tell(trial, [row.metrics[self.metric], row.flops][: len(self.study.directions)])


def make_plan(
    choices: Mapping[str, Any],
    fixed: Mapping[str, Any],
    trials: int | None,
    study: Study | None,
    metric: str,
    mode: Mode,
    share: str | None = None,
) -> Plan:
    """Make a grid, a share of a grid (``"2/8"``), or with ``trials`` a search; see :class:`Search`.

    Raises:
        ConfigurationError: with every problem.
    """
    if trials is not None and share is not None:
        raise ConfigurationError(
            "`share` cannot be combined with `trials`: each trial depends on earlier ones. Give each process a `study` "
            "on the same storage, and its own `results`."
        )
    if trials is not None:
        return Search(choices, fixed, trials, study, metric, mode)
    if study is not None:
        raise ConfigurationError("`study` needs `trials`: the number of settings that the study chooses. Give both.")
    if ranges := [name for name, value in choices.items() if isinstance(value, Range)]:
        raise ConfigurationError(
            f"A range of {', '.join(f'`{name}`' for name in ranges)} needs `trials`: the number of settings to try. "
            "Give `trials`, or a list of values."
        )
    return Grid(grid(choices, **fixed), None if share is None else parse_share(share))


def parse_share(text: str) -> tuple[int, int]:
    """Parse a share.

    Returns:
        The number of the share, from 1, and the number of shares.

    Raises:
        ConfigurationError: if the text is not a share.

    Example:
        >>> parse_share("2/8")
        (2, 8)
    """
    number, _, count = str(text).partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigurationError(
            f"`share` must be the number of the share and the number of shares, from 1/8 to 8/8 for eight processes, "
            f"got {text!r}."
        )
    return int(number), int(count)


def grid(choices: Mapping[str, Any], **fixed: Any) -> list[MergeSettings]:
    """Make every combination of the choices.

    Args:
        choices: a value, or a list of values, for each option of :class:`~lightning_zipit.MergeSettings` by name.
            ``alpha`` and ``beta`` stand for ``matcher=GreedyZip(alpha, beta)``.
        fixed: the options that all settings share.

    Returns:
        The settings without repetition. The last choice changes fastest.

    Raises:
        ConfigurationError: with every problem of any combination.

    Example:
        >>> settings = grid({"stop_at": ["layer1", None], "alpha": [0.1, 0.5], "refine": None})
        >>> [(each.stop_at, each.matcher.alpha) for each in settings]
        [('layer1', 0.1), ('layer1', 0.5), (None, 0.1), (None, 0.5)]
    """
    listed = {name: _listed(value) for name, value in choices.items()}
    problems = [f"`{name}` is an empty list. Give at least one value." for name, tried in listed.items() if not tried]
    greedy = {name: listed.pop(name, [None]) for name in SHORTHANDS}
    greedy = {name: tried for name, tried in greedy.items() if tried != [None]}
    if greedy and listed.get("matcher", [None]) != [None]:
        problems.append(
            "`alpha` and `beta` are short for matcher=GreedyZip(alpha, beta), and cannot be combined with `matcher`. "
            "Give one or the other."
        )
    elif greedy:
        listed["matcher"] = [matcher for chosen in _product(greedy) for matcher in made(GreedyZip, chosen, problems)]
    settings: list[MergeSettings] = []
    for chosen in _product(listed) if not problems else ():
        settings += made(MergeSettings, chosen | fixed, problems)
    if problems:
        raise ConfigurationError.collect(list(dict.fromkeys(problems)))
    return list({tuple(as_columns(each).items()): each for each in settings}.values())


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _product(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def made(make: Callable[..., Any], arguments: Mapping[str, Any], problems: list[str]) -> list[Any]:
    """Make one object.

    Args:
        make: its class.
        arguments: its arguments.
        problems: gets the message if the object cannot be made.

    Returns:
        The object in a list; an empty list if it cannot be made.
    """
    try:
        return [make(**arguments)]
    except ValueError as error:
        problems.append(str(error))
        return []
