"""Which settings a sweep tries: grids are in test_sweep, searches here."""

import sys

import pytest
from helpers.nets import images, settled_pair, trainer

from lightning_zipit import Range, ZipIt
from lightning_zipit._lightning.sweep import Sweep
from lightning_zipit._phases.calibrate import Gathering
from lightning_zipit._sweep.plan import Search
from lightning_zipit._sweep.results import SweepRow, as_columns
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import GreedyZip, Permute
from lightning_zipit.settings import MergeSettings

optuna = pytest.importorskip("optuna")

FIXED = {"merge_heads": False, "verify": False}
DIRECTIONS = ["minimize", "minimize"]


def search(choices, trials=6, study=None, mode="min"):
    return Search({"refine": None, **choices}, FIXED, trials, study, "loss", mode)


class Evaluation:
    """Stands for merging: the loss is best at alpha = 0.7, and narrow networks cost less."""

    def __init__(self):
        self.seen = []

    def __call__(self, settings):
        self.seen.append(settings)
        if settings.stop_at == "broken":
            return SweepRow(settings, error="broken")
        return SweepRow(settings, {"loss": abs(settings.matcher.alpha - 0.7)}, int(1000 * settings.width))


def test_numbers_come_from_their_ranges_and_the_rest_from_lists():
    evaluate = Evaluation()
    choices = {"alpha": Range(0.2, 0.8), "width": Range(0.01, 1.5, log=True), "stop_at": ["x", None], "beta": 0.5}
    rows = search(choices, 30).run(evaluate)
    assert [row.settings for row in rows] == evaluate.seen and len(rows) == 30
    assert {settings.stop_at for settings in evaluate.seen} == {"x", None}
    assert {settings.matcher.beta for settings in evaluate.seen} == {0.5}
    for settings in evaluate.seen:
        alpha, width = settings.matcher.alpha, settings.width
        assert 0.2 <= alpha <= 0.8 and float(f"{alpha:.4g}") == alpha and 0.01 <= width <= 1.5
    assert sum(settings.width < 0.1 for settings in evaluate.seen) > 5  # by its logarithm


def test_a_search_learns_from_what_came_out():
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    losses = [row.metrics["loss"] for row in search({"alpha": Range(0, 1)}, 40, study).run(Evaluation())]
    assert [trial.value for trial in study.trials] == losses
    assert sum(losses[20:]) < 0.6 * sum(losses[:20])


def test_what_is_to_be_tried_together_is_known_before():
    plan = search({"stop_at": ["x", None], "matcher": [Permute(), GreedyZip()], "width": 1.0})
    assert len(plan.settings) == 4 and len(plan) == 6
    ends = search({"alpha": Range(0.2, 0.8), "stop_at": ["x", "y"]}).settings
    assert {(each.stop_at, each.matcher.alpha) for each in ends} == {("x", 0.2), ("x", 0.8), ("y", 0.2), ("y", 0.8)}
    rows = plan.run(lambda settings: SweepRow(settings, {"loss": 1.0}))
    assert len(rows) == len({str(as_columns(row.settings)) for row in rows}) <= 4  # a setting is a row once


@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[:1]])
def test_a_study_of_ones_own_goes_on(directions, tmp_path):
    def load():
        file = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
        storage = optuna.storages.JournalStorage(file)
        return optuna.create_study(directions=directions, storage=storage, study_name="s", load_if_exists=True)

    choices = {"alpha": Range(0, 1), "stop_at": ["x", "broken"]}
    first, second = Evaluation(), Evaluation()
    search(choices, 8, load()).run(first)
    study = load()
    search(choices, 10, study).run(second)
    assert second.seen[:8] == first.seen and len(study.trials) == 10
    for trial, settings in zip(study.trials, second.seen, strict=True):
        assert trial.params["stop_at"] == settings.stop_at
        assert trial.params["alpha"] == pytest.approx(settings.matcher.alpha, rel=1e-3)
        assert (trial.state.name == "FAIL") == (settings.stop_at == "broken")
    with pytest.raises(ConfigurationError, match="`study` has trials with other choices"):
        search({"alpha": Range(0, 0.5)}, 12, study)


def test_what_is_wrong_with_a_search_is_said_before(monkeypatch):
    wrong = optuna.create_study(directions=["maximize", "minimize"])
    with pytest.raises(
        ConfigurationError, match=r"(?s)`trials` must be.*no option has several values.*\['maximize', 'minimize'\]"
    ):
        search({"alpha": 0.1}, 0, wrong)
    with pytest.raises(ConfigurationError, match=r"alpha.*between 0 and 1"):
        search({"alpha": Range(0, 2)})
    for low, high, log in [(1, 1, False), (0, 1, True), (float("nan"), 1, False)]:
        with pytest.raises(ConfigurationError, match="range"):
            Range(low, high, log)
    sweep = ZipIt(trainer()).sweep
    with pytest.raises(ConfigurationError, match="A range of `alpha`, `width` needs `trials`"):
        sweep(settled_pair(8), alpha=Range(0, 1), width=Range(0.5, 1))
    with pytest.raises(ConfigurationError, match="`trials`"):
        sweep(settled_pair(8), study=wrong)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"lightning-zipit\[optuna\]"):
        sweep(settled_pair(8), alpha=Range(0, 1), trials=3)


def test_an_interrupted_search_goes_on_from_its_file_with_one_calibration(tmp_path, monkeypatch):
    models, counts = settled_pair(8), {"add": 0, "_attempt": 0}

    def count(owner, name):
        run = getattr(owner, name)

        def counted(*arguments):
            counts[name] += 1
            return run(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(Gathering, "add")
    count(Sweep, "_attempt")

    def sweep(trials):
        validation = [images(8, classes=5), images(8, classes=7)]
        return ZipIt(trainer()).sweep(
            models,
            images(16, batch_size=8),
            val_dataloaders=validation,
            backbone="net",
            metric="val_loss",
            mode="min",
            results=tmp_path / "sweep.csv",
            trials=trials,
            alpha=Range(0, 1),
            stop_at=["layer1", "layer1.0"],
            refine=None,
        )

    first, second = sweep(2), sweep(4)
    assert counts == {"add": 2, "_attempt": 4}
    assert second.rows[:2] == first.rows and second.best in second.pareto
    assert isinstance(second.best.settings, MergeSettings) and second.merge().tasks == ["a", "b"]
    assert {row.settings.stop_at for row in second.rows} == {"layer1", "layer1.0"}
