"""Sweeps: many merges from one calibration."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from helpers.nets import Lit, images, settled_pair, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_zipit import JointAccuracy, MergeSettings, ZipIt
from lightning_zipit._phases.calibrate import Gathering
from lightning_zipit._sweep.plan import grid
from lightning_zipit._sweep.results import SweepResult, SweepRow, pareto_front, to_text
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.matchers import Average, GreedyZip, Matcher, Permute
from lightning_zipit.pipeline import Pipeline
from lightning_zipit.refine import LeastSquares

VALIDATION = {"a": images(16, classes=5, seed=5), "b": images(16, classes=7, seed=6)}
DATA = images(16, batch_size=8)
BASIC = {"backbone": "net", "metric": "val_loss", "mode": "min", "val_dataloaders": VALIDATION}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models():
    return settled_pair(8)


@pytest.fixture
def seen(monkeypatch):
    """How many batches were calibrated and validated with so far."""
    counts = {"calibrated": 0, "validated": 0}
    add, validate = Gathering.add, Lit.validation_step

    def counted(name, function):
        def run(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(Gathering, "add", counted("calibrated", add))
    monkeypatch.setattr(Lit, "validation_step", counted("validated", validate))
    return counts


def sweep(models, data=DATA, run=None, **arguments):
    return ZipIt(run or trainer()).sweep(models, data, **{**BASIC, **arguments})


def same(first, second):
    second = second.state_dict()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.state_dict().items())


def records():
    with open("sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


class Failing(Matcher):
    broken = True

    def __call__(self, similarity, num_models):
        if self.broken:
            raise ValueError("no match,\nat all [/x]")
        return Permute()(similarity, num_models)


def test_every_row_is_the_merge_of_its_settings_and_there_is_one_calibration(models, seen):
    result = sweep(models, stop_at=["layer1", None], refine=[None, LeastSquares(positions=8)])
    assert seen["calibrated"] == len(DATA) and len(result.rows) == 4
    row = result.rows[1]
    alone = ZipIt(trainer()).merge(models, DATA, backbone="net", stop_at="layer1", refine=LeastSquares(positions=8))
    assert same(alone, result.merge(row))
    run = trainer()
    run.validate(alone, VALIDATION, verbose=False)
    assert row.metrics["b/val_loss"] == float(run.callback_metrics["b/val_loss"])
    assert row.metrics["val_loss"] == (row.metrics["a/val_loss"] + row.metrics["b/val_loss"]) / 2
    assert row.flops == alone.report.merged.flops and result.ensemble.flops == alone.report.ensemble.flops
    assert result.best.metrics["val_loss"] == min(row.metrics["val_loss"] for row in result.rows)


def test_a_sweep_goes_on_where_it_was_interrupted(models, seen, monkeypatch):
    finish = Pipeline.finish

    def interrupted(pipeline):
        if pipeline.settings.matcher == GreedyZip(0.5):
            raise SystemExit
        return finish(pipeline)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Pipeline, "finish", interrupted)
        sweep(models, alpha=[0.1, 0.5, 1.0], refine=None)
    assert [record["network"] for record in records()] == ["ensemble", "merged"]
    before = dict(seen)
    result = sweep(models, alpha=[0.1, 0.5, 1.0], refine=None)
    assert seen["calibrated"] == before["calibrated"] and seen["validated"] - before["validated"] == 2 * len(VALIDATION)
    again = sweep(models, alpha=[0.1, 0.5, 1.0], refine=None)
    assert seen["validated"] - before["validated"] == 2 * len(VALIDATION)
    assert again.rows == result.rows and again.ensemble == result.ensemble


def test_a_finished_sweep_gathers_the_statistics_of_new_settings_only(models, seen):
    first = sweep(models, stop_at=["layer1.0"], refine=None)
    assert seen["calibrated"] == len(DATA)
    more = {"stop_at": ["layer1.0", "layer1"], "refine": [None, "least_squares"]}
    with pytest.raises(ConfigurationError, match="No calibration data"):
        sweep(models, None, **more)
    result = sweep(models, **more)
    assert seen["calibrated"] == 2 * len(DATA) and not any(row.error for row in result.rows)
    assert result.rows[0] == first.rows[0] and len(records()) == 5
    assert sorted(path.name for path in Path().iterdir()) == ["sweep.2.safetensors", "sweep.csv", "sweep.safetensors"]
    for row in result.rows:  # from either file
        settings = row.settings
        alone = ZipIt(trainer()).merge(models, DATA, backbone="net", stop_at=settings.stop_at, refine=settings.refine)
        assert same(alone, result.merge(row))
    before = dict(seen)
    assert sweep(models, **more, alpha=[0.1, 0.5]).rows[0] == first.rows[0]
    assert seen["calibrated"] == before["calibrated"]


def test_a_file_of_other_models_or_columns_is_refused(models, seen):
    sweep(models, refine=None)
    before, text = dict(seen), Path("sweep.csv").read_text()
    with pytest.raises(ConfigurationError, match=r"sweep\.csv lacks the columns .*'val_acc'"):
        sweep(models, refine=None, metric="val_acc")
    with torch.no_grad():
        models["b"].net.linear.bias += 1
    with pytest.raises(ConfigurationError, match=r"sweep\.csv belongs to other models"):
        sweep(models, refine=None, statistics="other.safetensors")
    assert Path("sweep.csv").read_text() == text and seen == before


def test_what_is_wrong_is_known_before_any_data_is_touched(models, seen):
    with pytest.raises(ConfigurationError) as problems:
        ZipIt(trainer()).sweep(
            models, images(), backbone="net", stop_at=["layer7", "layer1", "layer8"], results="no/such/folder.csv"
        )
    for expected in ("layer7", "layer8", "`metric`", "`val_dataloaders`", "no/such"):
        assert expected in str(problems.value)
    with pytest.raises(ConfigurationError, match=r"(?s)`width`.*empty list.*alpha.*between 0 and 1"):
        sweep(models, alpha=[0.1, 2.0], width=[])
    with pytest.raises(ConfigurationError, match="Permute cannot change the number of features"):
        sweep(models, matcher=[Permute(), GreedyZip()], width=[1.0, 1.2])
    with pytest.raises(ConfigurationError, match="shuffles"):
        sweep(models, torch.utils.data.DataLoader(DATA.dataset, 8, shuffle=True))
    with pytest.raises(ConfigurationError, match="statistics_memory"):
        sweep(models, statistics_memory=1e-6)
    assert seen == {"calibrated": 0, "validated": 0}
    with pytest.raises(ConfigurationError, match=r"'a', 'b' does not log the metric 'val_lost'.*a/val_loss"):
        sweep(models, metric="val_lost")
    assert seen["calibrated"] == 0


def test_a_setting_that_fails_is_a_row_and_is_tried_again(models, monkeypatch):
    result = sweep(models, matcher=[Failing(), Permute()], refine=None)
    assert [row.error for row in result.rows] == ["ValueError: no match,\nat all [/x]", ""]
    assert records()[0]["error"] == "ValueError: no match, at all [/x]"
    assert result.best == result.rows[1] and result.pareto == (result.rows[1],)
    assert "1 failed" in str(result) and result.to_table(result.rows).row_count == 2
    monkeypatch.setattr(Failing, "broken", False)
    again = sweep(models, matcher=[Failing(), Permute()], refine=None)
    assert again.rows[0].metrics == again.rows[1].metrics == result.rows[1].metrics and len(records()) == 3
    monkeypatch.setattr(Failing, "broken", True)
    with pytest.raises(ValueError, match="no match"):
        sweep(models, matcher=Failing(), refine=None, results="all_fail.csv")
    with pytest.raises(CalibrationError, match="get_input"):
        sweep(models, [{"nothing": torch.ones(4)}] * 2, refine=[None, "batch_norm"], results="bad.csv")


def test_joint_accuracy_and_a_trainer_as_it_was(models, monkeypatch):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DATA

        def val_dataloader(self):
            return list(VALIDATION.values())

    classes = {"a": [9, 7, 5, 3, 1], "b": [0, 2, 4, 6, 8, 10, 12]}
    data, bar = Data(), TQDMProgressBar()
    run = trainer(enable_progress_bar=True, callbacks=[bar])
    callbacks, state = list(run.callbacks), torch.get_rng_state()
    result = ZipIt(run).sweep(models, datamodule=data, backbone="net", classes=classes, stop_at=["layer1"], refine=None)
    assert run.callbacks == callbacks and run.datamodule is None and data.trainer is None
    assert torch.equal(torch.get_rng_state(), state)
    metric, merged = JointAccuracy(classes), result.merge()
    for task, loader in VALIDATION.items():
        for x, y in loader:
            metric.update(merged(x), torch.tensor(classes[task])[y])
    assert result.best.metrics == {name: pytest.approx(value.item()) for name, value in metric.compute().items()}
    assert result.metric == "joint"
    monkeypatch.setattr(Lit, "validation_step", lambda *_: None)
    with pytest.raises(ConfigurationError, match="task 'a' 5 classes, but"):
        sweep(models, classes=classes, metric=None, val_dataloaders=[VALIDATION["b"]] * 2, results="global.csv")


def test_a_grid_is_every_combination_once():
    found = grid({"stop_at": ["x", None], "alpha": [0.1, 0.1, 0.3], "beta": 0.5, "combine": None}, verify=False)
    assert [(each.stop_at, each.matcher) for each in found] == list(
        itertools.product(["x", None], [GreedyZip(0.1, 0.5), GreedyZip(0.3, 0.5)])
    )
    with pytest.raises(ConfigurationError, match="cannot be combined with `matcher`"):
        grid({"matcher": [Average()], "alpha": [0.1]})


def test_the_front_is_what_no_other_point_beats():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        costs = torch.randint(0, 6, (12,), generator=generator).tolist()
        values = torch.randint(0, 6, (12,), generator=generator).float().tolist()
        values[3] = float("nan")
        front = pareto_front(costs, values)

        def beats(one, other, costs=costs, values=values):
            better = costs[one] < costs[other] or values[one] > values[other]
            return better and costs[one] <= costs[other] and values[one] >= values[other]

        best = [point for point in range(12) if point != 3 and not any(beats(other, point) for other in range(12))]
        assert {(costs[i], values[i]) for i in front} == {(costs[i], values[i]) for i in best}
        assert len(front) == len({costs[i] for i in front}) and front == sorted(front, key=lambda i: costs[i])


def test_a_plot_shows_every_row_and_the_front():
    rows = tuple(
        SweepRow(MergeSettings(s), {"acc": v}, f) for s, f, v in [("x", 2, 0.5), ("x", 3, 0.4), (None, 1, 0.1)]
    )
    result = SweepResult(
        (*rows, SweepRow(MergeSettings("y"), error="failed")), "acc", "max", SweepRow(None, {"acc": 1.0}, 9)
    )
    _, axes = result.plot()
    assert sum(len(points.get_offsets()) for points in axes.collections) == 4
    assert axes.lines[0].get_ydata().tolist() == [0.1, 0.5]
    assert {"stop_at x", "stop_at none", "ensemble"} <= {text.get_text() for text in axes.get_legend().texts}


def test_shares_of_a_sweep_make_one_file_from_one_calibration(models, seen):
    matchers = [GreedyZip(0.1), Failing(), Permute()]
    first = sweep(models, matcher=matchers, refine=None, share="1/2")
    assert [row.settings.matcher for row in first.rows] == [matchers[0], matchers[2]] and first.missing == 1
    assert "1 are not finished yet" in str(first) and len(records()) == 3
    calibrated = seen["calibrated"]
    second = sweep(models, matcher=matchers, refine=None, share="2/2", results=Path("sweep.csv"))
    assert seen["calibrated"] == calibrated and second.missing == 0
    assert [row.error[:10] for row in second.rows] == ["", "ValueError", ""]
    assert sorted(path.name for path in Path().iterdir()) == ["sweep.csv", "sweep.safetensors"]
    validated = seen["validated"]
    whole = sweep(models, matcher=matchers[::2], refine=None)
    assert whole.rows == second.rows[::2] == first.rows and whole.ensemble == second.ensemble
    assert seen["validated"] == validated and len(records()) == 4


def test_what_a_share_has_left_is_taken_in_by_a_whole_sweep(models, seen):
    matchers = [GreedyZip(0.1), Permute()]
    part = sweep(models, matcher=matchers, refine=None, share="2/2")
    validated = seen["validated"]
    assert sweep(models, matcher=matchers[1:], refine=None).rows == part.rows
    assert seen["validated"] == validated and not list(Path().glob("*.part-*"))


def test_shares_that_there_are_not_are_refused(models, seen):
    for share in ("0/2", "3/2", "2", "a/b", "-1/2"):
        with pytest.raises(ConfigurationError, match="from 1/8 to 8/8"):
            sweep(models, share=share)
    with pytest.raises(ConfigurationError, match="devices=1"):
        sweep(models, share="1/2", run=trainer(devices=2, strategy="ddp"))
    with pytest.raises(ConfigurationError, match=r"`trials`.*`study`"):
        sweep(models, share="1/2", trials=3)
    assert seen == {"calibrated": 0, "validated": 0}


class Weighted(Permute):
    """A matcher of a user's own, with a large tensor."""

    def __init__(self, weights):
        object.__setattr__(self, "weights", weights)


def test_options_that_differ_in_one_entry_of_a_large_tensor_are_told_apart():
    first, second = torch.ones(3000), torch.ones(3000)
    second[1000] = 2
    assert to_text(Weighted(first)) == to_text(Weighted(first.clone())) != to_text(Weighted(second))
