"""The options of a merge: declared once, checked once, taken everywhere."""

import csv
import inspect
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from helpers.nets import trainer

from lightning_zipit import MergeSettings, ZipIt, ZipItCallback, ZipItCLI, ZipItTrainer
from lightning_zipit._common.options import entries, keywords_of, options_of, spelled_options
from lightning_zipit._lightning.internals import subcommand_parsers
from lightning_zipit._sweep.results import ResultsFile, SweepRow, as_columns
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average, GreedyZip, Permute
from lightning_zipit.refine import LeastSquares
from lightning_zipit.settings import MergeOptions
from lightning_zipit.task_vectors import Ties

OPTIONS = keywords_of(MergeSettings)
NAN = float("nan")
WRONG = {
    "stop_at": [3, ["layer1"], True, Path("layer1")],
    "matcher": [GreedyZip, "GreedyZip", 1],
    "refine": [LeastSquares, "nothing", True, GreedyZip()],
    "merge_heads": ["no", 1, None],
    "verify": ["no", 0, None],
    "statistics_memory": ["8", 0, -1.0, NAN, True, None],
    "statistics": [3, True, [Path("file")]],
    "similarity": ["distance", None, 1],
    "width": [NAN, "wide", True, None, [1.0], {"conv1": "wide"}, {1: 1.0}],
    "flops": [NAN, 0.0, -1, "1", True],
    "combine": [Ties, "Ties", Average()],
    "positions": [0, -1, 2.5, True, "8"],
    "weights": ["ab", 1.0, ["a", "b"], {"a": NAN}, {"a": True}],
    "start_at": [3, True, ["layer1"]],
    "also": [3, [MergeSettings()], (1,)],
}
RIGHT = [
    {"stop_at": "layer1", "start_at": "conv1", "verify": False, "merge_heads": True},
    {"matcher": Permute(), "refine": None, "similarity": "cosine", "positions": 8, "statistics_memory": 1},
    {"matcher": None, "combine": Ties()},
    {"width": 2, "statistics": Path("file"), "weights": [1, 0.5]},
    {"width": {"conv1": 1.5}, "weights": {"a": 1}, "refine": LeastSquares()},
    {"width": "auto", "flops": 1.5, "stop_at": "auto", "statistics": "file", "statistics_memory": float("inf")},
]


@pytest.mark.parametrize(
    ("name", "value"), [(field.name, value) for field in fields(MergeSettings) for value in WRONG[field.name]]
)
def test_wrong_value_is_an_error_that_names_option_value_and_what_is_allowed(name, value):
    with pytest.raises(ConfigurationError) as error:
        MergeSettings(**{name: value})
    shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    assert f"`{name}` must be {options_of(MergeSettings)[name].allowed}, got {shown}" in str(error.value)


@pytest.mark.parametrize("arguments", RIGHT)
def test_right_values_are_kept(arguments):
    settings = MergeSettings(**arguments)
    given = {name: value for name, value in arguments.items() if value is not None or name != "matcher"}
    assert {name: getattr(settings, name) for name in given} == given


def test_default_matcher_is_average_with_combine():
    assert MergeSettings().matcher == MergeSettings(matcher=None).matcher == GreedyZip()
    assert MergeSettings.of(combine=Ties()).matcher == Average()


def test_all_problems_are_in_one_message():
    wrong = {"stop_at": 3, "positions": 0, "width": "auto", "combine": Ties(), "weights": [1, 2]}
    with pytest.raises(ConfigurationError) as error:
        MergeSettings(**wrong)
    for expected in ("5 problems", "`stop_at`", "`positions`", "`flops` is the budget", "`weights` are for an average"):
        assert expected in str(error.value)
    with pytest.raises(ConfigurationError) as error:  # a wrong value is no problem of other options, too
        MergeSettings(width=NAN, flops=1.0)
    assert "budget" not in str(error.value)


def test_type_checkers_know_the_options_as_they_are_declared():
    declared = {name: each.hint for name, each in spelled_options(MergeSettings).items()}
    assert get_type_hints(MergeOptions) == declared and list(MergeOptions.__annotations__) == list(declared)


def test_every_field_is_documented():
    assert set(entries(inspect.getdoc(MergeSettings))) >= {field.name for field in fields(MergeSettings)}


@pytest.mark.parametrize("taker", [ZipIt.merge, ZipIt.sweep, ZipItCallback, ZipItTrainer.merge, ZipItTrainer.sweep])
def test_every_option_is_a_documented_keyword(taker):
    signature, documented = inspect.signature(taker).parameters, entries(inspect.getdoc(taker))
    own = {"statistics"} if taker in (ZipIt.sweep, ZipItTrainer.sweep) else set()
    for name, each in spelled_options(MergeSettings).items():
        assert signature[name].default == each.default
        assert name in own or documented[name].split() == each.text.split()
    parameters = [name for name in signature if name != "self"]
    assert set(parameters) == documented.keys() & signature.keys() and not {"options", "choices"} & {*documented}


@pytest.mark.parametrize("command", ["merge", "sweep"])
def test_every_option_is_a_flag_with_help(command):
    parsers = {}

    class Parsed(ZipItCLI):
        def parse_arguments(self, parser, args):
            parsers.update(subcommand_parsers(self))
            raise InterruptedError

    with suppress(InterruptedError):
        Parsed(args=["merge"])
    actions = {action.dest: action for action in parsers[command]._actions}
    for name in OPTIONS:
        assert f"--{name}" in actions[name].option_strings and actions[name].help
        assert "``" not in actions[name].help and ":class:" not in actions[name].help
    switches = {name for name in OPTIONS if actions[name].const is True}
    assert switches == {"merge_heads", "verify"}


def test_every_option_that_changes_a_merge_is_a_column_of_a_sweep(tmp_path):
    columns = ResultsFile(tmp_path / "sweep.csv", "digest", ["acc"]).columns
    left_out = {field.name for field in fields(MergeSettings)} - {*columns}
    assert left_out == {"verify", "statistics_memory", "statistics", "also"}


@pytest.mark.parametrize(
    "take",
    [
        ZipItCallback,
        lambda **options: ZipIt(trainer()).merge([], [], **options),
        lambda **options: ZipIt(trainer()).sweep([], [], **options),
        lambda **options: ZipItTrainer(logger=False).merge(None, checkpoints={}, **options),
    ],
)
def test_unknown_option_is_an_error_that_lists_the_options(take):
    with pytest.raises(ConfigurationError, match=r"option `stopat` does not exist\. Did you mean `stop_at`\?") as error:
        take(stopat="layer1")
    assert all(name in str(error.value) for name in OPTIONS)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, change):
    rows = [change(row) for row in rows_of(path)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path):
    """A file of two settings, and the settings."""
    path, settings = tmp_path / "sweep.csv", [MergeSettings("layer1"), MergeSettings("layer1", positions=8)]
    file = ResultsFile(path, "digest", ["acc"])
    for number, each in enumerate(settings):
        file.keep(SweepRow(each, {"acc": float(number)}, 5, 1.0, 3))
    return path, settings


def test_results_without_the_column_of_a_newer_option_count_as_its_default(results):
    path, (first, second) = results
    rewrite(path, lambda row: {name: text for name, text in row.items() if name not in ("start_at", "similarity")})
    file = ResultsFile(path, "digest", ["acc"])
    assert file.find(first).metrics == {"acc": 0.0} and file.find(second).metrics == {"acc": 1.0}
    assert file.find(MergeSettings("layer1", start_at="conv1")) is None
    file.keep(SweepRow(MergeSettings("layer1", start_at="conv1"), {"acc": 2.0}, 5, 1.0, 3))
    assert [row["start_at"] for row in rows_of(path)] == ["none", "none", "conv1"]


def test_results_with_columns_of_another_version_are_kept_with_them(results):
    path, (first, _) = results
    rewrite(path, lambda row: {"rotate": "left", **dict(reversed(row.items()))})
    file = ResultsFile(path, "digest", ["acc"])
    assert file.find(first).metrics == {"acc": 0.0}
    file.keep(SweepRow(MergeSettings("layer2"), {"acc": 2.0}, 5, 1.0, 3))
    assert [(row["stop_at"], row["rotate"]) for row in rows_of(path)] == [
        ("layer1", "left"),
        ("layer1", "left"),
        ("layer2", ""),
    ]


def test_rows_that_differ_in_an_unknown_option_only_are_not_used(results):
    path, (first, second) = results
    rewrite(path, lambda row: {**row, "positions": "none", "rotate": row["positions"]})
    file = ResultsFile(path, "digest", ["acc"])
    assert file.find(first) is None and file.find(second) is None


def test_two_processes_that_write_results_keep_the_rows_of_both(results):
    path = results[0]
    one, other = ResultsFile(path, "digest", ["acc"]), ResultsFile(path, "digest", ["acc"])
    one.keep(SweepRow(MergeSettings("a"), {"acc": 2.0}, 5, 1.0, 3))
    other.keep(SweepRow(MergeSettings("b"), {"acc": 3.0}, 5, 1.0, 3))
    assert [row["stop_at"] for row in rows_of(path)] == ["layer1", "layer1", "a", "b"]
    assert other.find(MergeSettings("a")) is None
    other.read()
    assert other.find(MergeSettings("a")).metrics == {"acc": 2.0}
    assert [file.name for file in path.parent.iterdir()] == ["sweep.csv"]


def test_settings_as_text_tell_settings_apart():
    assert len({tuple(as_columns(MergeSettings(**arguments)).items()) for arguments in RIGHT}) == len(RIGHT)
