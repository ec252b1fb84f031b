"""Statistics in a file: reused, resumed, added up, and refused where they do not belong."""

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.nets import Lit, Wrap, images, settled_pair, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import CalibrationStatistics, MergeSettings, ZipIt, merge_backbones
from lightning_zipit._calibration import statistics_file
from lightning_zipit._phases.calibrate import Gathering
from lightning_zipit.errors import CalibrationError, ConfigurationError, StatisticsError, ZipItError
from lightning_zipit.matchers import WeightMatching


@pytest.fixture(scope="module")
def models():
    return settled_pair()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "statistics.safetensors"


def loaders(seed=0):
    return [images(seed=seed), images(40, seed=seed + 1)]


def merge(models, path, data=None, **arguments):
    data = loaders() if data is None else data
    return ZipIt(trainer()).merge(models, data or None, backbone="net", statistics=path, **arguments)


def same(first, second, **tolerance):
    pairs = [(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items()]
    return all(torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b) for a, b in pairs)


class Interrupted:
    """A loader whose batches end in an error the first time."""

    def __init__(self, loader, after):
        self.batches, self.after = list(loader), after

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.after:
                self.after = None
                raise OSError("the disk has gone")
            yield batch


def test_statistics_file_replaces_calibration(models, path, monkeypatch):
    gathered = merge(models, path, refine="batch_norm")
    written = path.read_bytes()
    monkeypatch.setattr(Gathering, "add", lambda *_: pytest.fail("there was another calibration"))
    assert same(merge(models, path, refine="batch_norm"), gathered)
    monkeypatch.undo()
    assert same(merge(models, path, [], refine=None), merge(models, None, refine=None))  # without any data
    assert path.read_bytes() == written and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("refine", ["batch_norm", "least_squares"])
def test_refinement_needs_data_despite_statistics_file(models, path, refine):
    merge(models, path, refine=refine)
    with pytest.raises(CalibrationError, match="refine=None"):
        merge(models, path, [], refine=refine)


def test_statistics_file_works_with_another_matcher_and_renamed_tasks(models, path):
    merge(models, path, refine=None)
    renamed = dict(zip("xy", models.values(), strict=True))
    assert list(merge(renamed, path, [], refine=None).heads) == ["x", "y"]


def test_interrupted_calibration_resumes(models, path, monkeypatch):
    whole = merge(models, None)
    monkeypatch.setattr(statistics_file, "SAVE_EVERY", 0)
    data = [loaders()[0], Interrupted(loaders()[1], after=2)]
    with pytest.raises(OSError, match="gone"):
        merge(models, path, data)
    (part,) = path.parent.iterdir()
    assert CalibrationStatistics.load(part).seen == {0: 48, 1: 32}

    counted = []
    update = statistics_file.FeatureStatistics.update

    def counting(self, features, **how):
        counted.append(features)
        update(self, features, **how)

    monkeypatch.setattr(statistics_file.FeatureStatistics, "update", counting)
    resumed = merge(models, path, data)
    spaces = len(resumed.report.spaces)
    assert len(counted) == spaces  # one batch was left, of 8 samples
    assert same(resumed, whole, atol=1e-6) and [*path.parent.iterdir()] == [path]


def test_resuming_refuses_other_batches(models, path, monkeypatch):
    monkeypatch.setattr(statistics_file, "SAVE_EVERY", 0)
    with pytest.raises(OSError, match="gone"):
        merge(models, path, [loaders()[0], Interrupted(loaders()[1], after=2)])
    with pytest.raises(StatisticsError, match="same batch size"):
        merge(models, path, [images(batch_size=20), images(40, batch_size=20)])


def test_resuming_refuses_another_number_of_processes(models, path):
    (path.parent / "statistics.part-1-of-4.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"part-1-of-4.*another number of processes"):
        merge(models, path)


def test_statistics_file_refuses_other_weights(models, path):
    merge(models, path)
    written = path.read_bytes()
    other = {"a": models["a"], "b": Lit(7)}
    with pytest.raises(StatisticsError, match=r"other networks.*'b'"):
        merge(other, path)
    assert path.read_bytes() == written


def test_statistics_file_refuses_another_stop_at(models, path):
    merge(models, path, stop_at="layer1")
    with pytest.raises(StatisticsError, match=r"stop_at"):
        merge(models, path, stop_at="layer2")


def test_statistics_file_refuses_other_positions(models, tmp_path):
    for name, positions in (("all", None), ("four", 4), ("more", 4)):
        merge(models, tmp_path / f"{name}.safetensors", refine=None, positions=positions)
    for name, found, wanted in (("all", "None", 4), ("four", "4", None), ("four", "4", 5)):
        written = (tmp_path / f"{name}.safetensors").read_bytes()
        with pytest.raises(StatisticsError, match=rf"positions={found}, but this merge has positions={wanted}.*delete"):
            merge(models, tmp_path / f"{name}.safetensors", refine=None, positions=wanted)
        assert (tmp_path / f"{name}.safetensors").read_bytes() == written
    whole, four, more = (
        CalibrationStatistics.load(tmp_path / f"{name}.safetensors") for name in ("all", "four", "more")
    )
    with pytest.raises(StatisticsError, match=r"positions None cannot be added to .* positions 4.*same"):
        whole + four
    (four + more).save(tmp_path / "sum.safetensors")
    merge(models, tmp_path / "sum.safetensors", [], refine=None, positions=4)


def test_resuming_refuses_other_positions(models, path, monkeypatch):
    monkeypatch.setattr(statistics_file, "SAVE_EVERY", 0)
    data = [loaders()[0], Interrupted(loaders()[1], after=2)]
    with pytest.raises(OSError, match="gone"):
        merge(models, path, data, positions=4)
    with pytest.raises(StatisticsError, match="positions=4, but this merge has positions=None"):
        merge(models, path, data)
    merge(models, path, data, positions=4)


def test_statistics_without_proof_need_verify_false(models, path):
    merge(models, path, refine=None, verify=False)
    with pytest.raises(StatisticsError, match=r"verify=False.*delete the file"):
        merge(models, path, [], refine=None)
    merge(models, path, [], refine=None, verify=False)
    proved = path.with_name("proved.safetensors")
    merge(models, proved, refine=None)
    merge(models, proved, [], refine=None, verify=False)
    assert not (CalibrationStatistics.load(path) + CalibrationStatistics.load(proved)).verified


def test_statistics_file_refuses_other_operators(path):
    """The weights are the same, and what changes nothing in eval mode may be another."""

    def networks(slope=0.1, chance=0.5, momentum=0.1):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.LeakyReLU(slope), nn.Dropout(chance)]
        return {task: nn.Sequential(*layers, nn.Linear(4, 2)).eval() for task in "ab"}

    how = MergeSettings(statistics=path, refine=None)
    merge_backbones(networks(), torch.randn(2, 8, 3), how)
    merge_backbones(networks(chance=0.2, momentum=0.3), [], how)
    with pytest.raises(StatisticsError, match=r"differ for the tasks 'a', 'b'"):
        merge_backbones(networks(slope=0.2), [], how)


def test_statistics_file_refuses_an_earlier_format(path, small, monkeypatch):
    """They do not say of how many positions they are."""
    known = CalibrationStatistics.load(small)
    monkeypatch.setattr(statistics_file, "FORMAT", 2)
    known.save(path)
    monkeypatch.undo()
    with pytest.raises(StatisticsError, match=r"has format 2, but this version reads format 4.*Delete the file"):
        CalibrationStatistics.load(path)


def test_statistics_of_two_sites_can_be_added(models, tmp_path):
    everything = [
        torch.utils.data.ConcatDataset(pair)
        for pair in zip(*([x.dataset for x in loaders(seed)] for seed in (0, 5)), strict=True)
    ]
    for name, data in {
        "here": loaders(),
        "there": loaders(5),
        "all": [DataLoader(dataset, 16) for dataset in everything],
    }.items():
        merge(models, tmp_path / f"{name}.safetensors", data, refine=None)
    here, there, joint = (
        CalibrationStatistics.load(tmp_path / f"{name}.safetensors") for name in ("here", "there", "all")
    )
    added = here + there
    assert added.count == joint.count == here.count + there.count
    for tap, statistics in joint.statistics.items():
        expected, moments = statistics.moments(), added.statistics[tap].moments()
        assert torch.allclose(moments.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    added.save(tmp_path / "added.safetensors")
    merged = merge(models, tmp_path / "added.safetensors", [], refine=None)
    assert same(merged, merge(models, tmp_path / "all.safetensors", [], refine=None))


def test_adding_statistics_refuses_other_networks(models, tmp_path):
    merge(models, tmp_path / "a.safetensors", refine=None)
    merge({"a": Lit(5), "b": Lit(7)}, tmp_path / "b.safetensors", refine=None)
    first, second = (CalibrationStatistics.load(tmp_path / f"{name}.safetensors") for name in "ab")
    with pytest.raises(StatisticsError, match="networks"):
        first + second


def test_unusable_statistics_file_fails_before_calibration(models, path):
    data = loaders()[0].dataset
    with pytest.raises(ConfigurationError, match=r"shuffles.*interrupted"):
        merge(models, path, [DataLoader(data, 16, shuffle=True)] * 2)
    with pytest.raises(ConfigurationError, match=r"Raise .statistics_memory."):
        merge(models, path, statistics_memory=1e-6)
    with pytest.raises(ConfigurationError, match=r"folder .* of `statistics` does not exist"):
        merge(models, path.parent / "nowhere" / "file.safetensors")
    assert not [*path.parent.iterdir()]


def test_statistics_file_stores_input_and_barriers(path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.second(self.first(x).relu())
            return self.last(torch.cumsum(x, 1).relu())

    models = {task: Wrap(Odd()) for task in "ab"}
    data = DataLoader(torch.randn(32, 6), 8)
    gathered = merge(models, path, data, refine=None)
    known = CalibrationStatistics.load(path)
    assert known.example_of("ab").tensors[0].shape == (1, 6) and list(known.barriers) == ["cumsum"]
    assert same(merge(models, path, [], refine=None), gathered)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    torch.manual_seed(0)
    networks = {task: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for task in "ab"}
    merge_backbones(networks, [torch.randn(16, 3)], MergeSettings(statistics=path))
    return path


def test_file_of_another_kind_is_refused_without_executing_it(tmp_path, small):
    target = tmp_path / "executed"
    contents = {
        "empty": b"",
        "text": b"no statistics",
        "pickle": pickle.dumps(Payload(target)),
        "truncated": small.read_bytes()[:-9],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StatisticsError, match=name):
            CalibrationStatistics.load(tmp_path / name)
    torch.save(Payload(target), tmp_path / "checkpoint")
    with pytest.raises(StatisticsError, match="checkpoint"):
        CalibrationStatistics.load(tmp_path / "checkpoint")
    with pytest.raises(StatisticsError, match="does not exist"):
        CalibrationStatistics.load(tmp_path / "missing")
    assert not target.exists()


@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.nightly)])
def test_damaged_statistics_file_is_refused(tmp_path, small, times):
    content, path, chance = small.read_bytes(), tmp_path / "damaged.safetensors", random.Random(0)
    for _ in range(times):
        path.write_bytes(damaged := damage(content, chance))
        if damaged != content:
            with pytest.raises(ZipItError):
                CalibrationStatistics.load(path)


def damage(content, chance):
    """Bytes cut off, changed, taken out, or put in."""
    damaged, place = bytearray(content), chance.randrange(len(content))
    kind = chance.choice(["cut", "change", "remove", "insert"])
    if kind == "cut":
        del damaged[place:]
    elif kind == "change":
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(content))] = chance.randrange(256)
    elif kind == "remove":
        del damaged[place : place + chance.randint(1, 100)]
    else:
        damaged[place:place] = chance.randbytes(chance.randint(1, 50))
    return bytes(damaged)


def network():
    """Two layers, and behind them one that no rule knows."""

    class Unknown(nn.Module):
        def forward(self, x):
            return torch.logcumsumexp(x, 1)

    layers = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), Unknown()]
    return nn.Sequential(*layers, nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.filterwarnings("ignore:A part of the trunk")
def test_statistics_for_several_cuts_equal_separate_calibrations(path):
    networks, x = {"a": network(), "b": network()}, [torch.randn(40, 3)]
    tried = [
        MergeSettings("0", WeightMatching()),
        *(MergeSettings(stop_at, refine=refine) for stop_at in ("2", None) for refine in (None, "least_squares")),
    ]
    for settings in tried:
        alone = merge_backbones(networks, x, settings)
        served = replace(settings, statistics=path, also=(*tried, MergeSettings("nothere")))
        found = merge_backbones(networks, x, served)
        assert same(alone.trunk, found.trunk) and same(alone.heads["b"], found.heads["b"])
        assert alone.graphs["a"].barriers == found.graphs["a"].barriers
    known = CalibrationStatistics.load(path)
    assert not known.barriers_of("2") and known.barriers_of(None) and known.barriers == known.barriers_of("0")
    assert (known + known).cuts == known.cuts
