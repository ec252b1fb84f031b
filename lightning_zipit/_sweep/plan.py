"""Which settings a sweep tries: every combination of lists, or what an Optuna study asks for."""

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
from lightning_zipit._sweep.results import Mode, SweepRow, describe, to_text
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import GreedyZip
from lightning_zipit.settings import MergeSettings, Target

if TYPE_CHECKING:
    from optuna import Study, Trial

Evaluate = Callable[[MergeSettings], SweepRow]
"""Merges and validates one setting, or returns its row if it is done."""


@dataclass(frozen=True)
class Range:
    """A range of numbers that a search chooses from.

    Args:
        low: the lowest number.
        high: the highest number.
        log: choose on a logarithmic scale.

    Raises:
        ConfigurationError: if the range is empty, or logarithmic and not above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigurationError(f"A range goes from a lower to a higher number, got {self}.")
        if self.log and not self.low > 0:
            raise ConfigurationError(f"A logarithmic range is one of numbers above 0, got {self}.")

    def rounded(self, value: float) -> float:
        """Round a number to four digits, within the range, so that a table shows the exact value."""
        return min(max(float(f"{value:.4g}"), self.low), self.high)


SHORTHANDS = {
    "alpha": Spelled(Range | list[float] | float | None, None, "``alpha`` of ``GreedyZip``, instead of ``matcher``."),
    "beta": Spelled(Range | list[float] | float | None, None, "``beta`` of ``GreedyZip``, instead of ``matcher``."),
}
"""Arguments of a sweep that stand for an option of a merge."""


def with_choices(target: Target) -> Target:
    """Show what a sweep may try as keyword arguments of a function that takes ``**choices``.

    Signature and docstring come from :class:`~lightning_zipit.MergeSettings`; the docstring needs an entry ``choices``.
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
    """The argument of a sweep for an option: a value, a list of values or, for numbers, a range."""
    hint = list[one.hint] | one.hint  # type: ignore[name-defined]
    return one._replace(hint=Range | hint if fits(0.5, one.hint) else hint)


def split_choices(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keyword arguments of a sweep.

    Returns:
        What is chosen from, by name and in the order of the declaration; and what all settings have in common.

    Raises:
        ConfigurationError: if there is no such option.
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
        settings: the settings that are checked in advance, and that the statistics serve.
        asks: whether the next setting depends on earlier results.
        share: the number of this process and how many share the settings; ``None`` if it tries all.
    """

    settings: list[MergeSettings]
    asks: bool
    share: tuple[int, int] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many settings are tried."""

    @abstractmethod
    def run(self, evaluate: Evaluate) -> list[SweepRow]:
        """Try them.

        Returns:
            A row for each.
        """


class Grid(Plan):
    """All settings of a list, or one share of them.

    Args:
        settings: the list.
        share: ``(k, n)`` takes every n-th setting, from the k-th on.
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
    """The settings that an Optuna study asks for.

    Without a given study, a new one is made with a fixed seed. After an interruption, it asks for the same settings
    again, finds their rows, and continues. Rank zero asks for all ranks.

    Args:
        choices: as for :func:`grid`; a :class:`Range` stands for all numbers in it.
        fixed: what all settings have in common.
        trials: the number of settings, including those that the study has tried before.
        study: an Optuna study of the metric, or of the metric and FLOPs.
        metric: the name of the metric.
        mode: whether it is to be high or low.

    Raises:
        ConfigurationError: if optuna is not installed, or with all that is wrong with choices and study.
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
        # Optuna's files hold text and numbers only: one of several values goes by its text.
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
            problems.append("There is nothing to search: give an argument a list of values, or a `Range`.")
        directions = [direction.name.lower() for direction in self.study.directions]
        if directions not in (list(wanted), list(wanted[:1])):
            problems.append(
                f"`study` has the directions {directions}, but a sweep looks for {list(wanted)} of {self.metric!r} and "
                f"FLOPs, or for {list(wanted[:1])} of {self.metric!r} alone."
            )
        for trial in self.study.trials:
            if trial.state.is_finished() and trial.distributions != self.distributions:
                problems.append(
                    f"`study` has trials of other choices: number {trial.number} chose {trial.params}, and now "
                    f"{', '.join(map(repr, self.distributions)) or 'nothing'} is to be chosen. Give it another name."
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
        return list({tuple(describe(row.settings).items()): row for row in rows if row.settings is not None}.values())

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
    """A grid, or a share of one (``"2/8"``), or with ``trials`` a search; see :class:`Search`.

    Raises:
        ConfigurationError: with all that is wrong.
    """
    if trials is not None and share is not None:
        raise ConfigurationError(
            "`share` cannot be combined with `trials`: each trial depends on earlier ones. Give each process a `study` "
            "on the same storage, and `results` of its own."
        )
    if trials is not None:
        return Search(choices, fixed, trials, study, metric, mode)
    if study is not None:
        raise ConfigurationError("`study` is there for a search: say with `trials` how many settings to try.")
    if ranges := [name for name, value in choices.items() if isinstance(value, Range)]:
        raise ConfigurationError(
            f"{', '.join(f'`{name}`' for name in ranges)} has a range: say with `trials` how many settings to try, or "
            "list values."
        )
    return Grid(grid(choices, **fixed), None if share is None else parse_share(share))


def parse_share(text: str) -> tuple[int, int]:
    """Parse a share: its number, and the number of shares.

    Raises:
        ConfigurationError: if the text is not a share.

    Example:
        >>> parse_share("2/8")
        (2, 8)
    """
    number, _, count = str(text).partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigurationError(f"`share` is which of how many, from 1/8 to 8/8 for eight processes, got {text!r}.")
    return int(number), int(count)


def grid(choices: Mapping[str, Any], **fixed: Any) -> list[MergeSettings]:
    """Every combination of the choices.

    Args:
        choices: from an argument of :class:`~lightning_zipit.MergeSettings` to one value, or to a list of those to try;
            ``alpha`` and ``beta`` stand for ``matcher=GreedyZip(alpha, beta)``.
        fixed: what all have in common.

    Returns:
        The settings, without repetition; the last choice changes fastest.

    Raises:
        ConfigurationError: with all that is wrong with any of them.

    Example:
        >>> settings = grid({"stop_at": ["layer1", None], "alpha": [0.1, 0.5], "refine": None})
        >>> [(each.stop_at, each.matcher.alpha) for each in settings]
        [('layer1', 0.1), ('layer1', 0.5), (None, 0.1), (None, 0.5)]
    """
    listed = {name: _listed(value) for name, value in choices.items()}
    problems = [
        f"`{name}` lists nothing to try: give one value at least." for name, tried in listed.items() if not tried
    ]
    greedy = {name: listed.pop(name, [None]) for name in SHORTHANDS}
    greedy = {name: tried for name, tried in greedy.items() if tried != [None]}
    if greedy and listed.get("matcher", [None]) != [None]:
        problems.append("`alpha` and `beta` are those of GreedyZip: give them, or `matcher`, not both.")
    elif greedy:
        listed["matcher"] = [matcher for chosen in _product(greedy) for matcher in made(GreedyZip, chosen, problems)]
    settings: list[MergeSettings] = []
    for chosen in _product(listed) if not problems else ():
        settings += made(MergeSettings, chosen | fixed, problems)
    if problems:
        raise ConfigurationError.collect(list(dict.fromkeys(problems)))
    return list({tuple(describe(each).items()): each for each in settings}.values())


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _product(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def made(make: Callable[..., Any], arguments: Mapping[str, Any], problems: list[str]) -> list[Any]:
    """One object, or none and its problem."""
    try:
        return [make(**arguments)]
    except ValueError as error:
        problems.append(str(error))
        return []
