"""Two gloo processes merge and sweep as one process does; Lightning starts the second one."""

import csv

import pytest
import torch
from helpers.ddp import CLASSES, classified, loaders, merge, models, start
from helpers.nets import images, trainer

from lightning_zipit import CalibrationStatistics, JointAccuracy, MultiHeadModule, ZipIt
from lightning_zipit.refine import LeastSquares


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def one(folder):
    return merge(trainer(), 1, folder / "one.safetensors")


@pytest.fixture(scope="module")
def two(folder):
    messages = start("ddp_script.py", folder).stderr
    return *(torch.load(folder / f"2-{rank}.pt", weights_only=True) for rank in (0, 1)), messages


@pytest.fixture(scope="module")
def two_more(folder):
    return start("ddp_script.py", folder, "more").stderr


def test_both_ranks_have_the_same_network(two):
    first, second, _ = two
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    assert first["spaces"] == second["spaces"]


def test_two_processes_merge_as_one_does(one, two):
    first, *_ = two
    assert [space.across for space in one.report.spaces] == [space["across"] for space in first["spaces"]]
    for name, tensor in one.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, first["state"][name], atol=1e-6), name


def test_two_processes_gather_the_statistics_of_one(folder, one, two):
    same_statistics(folder, "one", "two", 5e-6)  # single precision rounds products of that many samples by up to 2e-6


@pytest.mark.nightly
def test_two_processes_gather_the_statistics_of_one_in_double_precision(folder, two_more):
    merge(trainer(precision="64-true"), 1, folder / "one-64.safetensors")
    same_statistics(folder, "one-64", "two-64", 1e-12)


def same_statistics(folder, one, two, tolerance):
    first, second = (CalibrationStatistics.load(folder / f"{name}.safetensors").statistics for name in (one, two))
    assert first.keys() == second.keys()
    for tap in first:
        mine, other = first[tap].moments(), second[tap].moments()
        assert mine.count == other.count
        scale = mine.covariance.abs().max()
        assert (mine.covariance - other.covariance).abs().max() <= tolerance * scale


def test_statistics_of_batch_norm_are_those_of_all_samples_of_both(one, two):
    first, *_ = two
    batches = {name: int(tensor) for name, tensor in first["state"].items() if "num_batches" in name}
    assert set(batches.values()) == {14, 12, 14 + 12}  # head a, head b, trunk; 27 and 26 samples make seven batches
    for name, tensor in one.state_dict().items():
        if name.endswith("running_mean"):  # behind the first norm, what is normalised by itself are other batches
            tolerance = 1e-5 if name.endswith("trunk.bn1.running_mean") else 0.1
            assert torch.allclose(tensor, first["state"][name], atol=tolerance), name


@pytest.mark.nightly
def test_two_processes_merge_behind_stems_as_one_does(folder, two_more):
    alone = merge(trainer(), 1, start_at="bn1").state_dict()
    first, second = (torch.load(folder / f"stems-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(name.startswith("stems.b.") for name in alone) and alone.keys() == first.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, first[name], atol=1e-6), name


def test_two_processes_fit_layers_as_one_does(folder, two):
    fitted = merge(trainer(), 1, refine=LeastSquares(positions=9)).state_dict()
    first, second = (torch.load(folder / f"fitted-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(torch.allclose(tensor, first[name], rtol=1e-5, atol=1e-6) for name, tensor in fitted.items())


@pytest.mark.nightly
def test_two_processes_sweep_as_one_does(folder, two_more):
    first, second = (torch.load(folder / f"swept-{rank}.pt", weights_only=True) for rank in (0, 1))
    with open(folder / "swept.csv", newline="") as file:
        written = [(int(row["total_flops"]), float(row["joint"])) for row in csv.DictReader(file)]
    assert first == second and written == [(flops, metrics["joint"]) for metrics, flops in first]
    alone = ZipIt(trainer()).sweep(
        models(),
        loaders(1),
        val_dataloaders=[images(16), images(16)],
        backbone="net",
        metric="val_acc",
        classes={"a": range(5), "b": range(5, 12)},
        refine=None,
        results=folder / "alone.csv",
    )
    (row,) = alone.rows
    assert first[1] == (pytest.approx(row.metrics), row.flops)


def test_the_joint_accuracy_of_two_processes_is_that_of_all_samples(folder, two):
    alone, (first, second) = JointAccuracy(CLASSES), (torch.load(folder / f"accuracy-{rank}.pt") for rank in (0, 1))
    alone.update(*classified(0))
    alone.update(*classified(1))
    assert first == second == alone.compute()


@pytest.mark.nightly
def test_two_processes_search_as_one(folder, two_more):
    first, second = (torch.load(folder / f"searched-{rank}.pt", weights_only=True) for rank in (0, 1))
    with open(folder / "searched.csv", newline="") as file:
        written = [row["matcher"] for row in csv.DictReader(file)]
    assert first == second and written == ["", *(matcher for matcher, _ in first)] and len(first) == 3


def test_samples_that_are_counted_twice_or_not_at_all_are_an_error_on_every_rank(two):
    *_, messages = two
    for rank in (0, 1):
        assert (
            f"rank {rank}: The processes have seen 106 samples of calibration loader 0, but its data set has 53"
            in messages
        )
        assert (
            f"rank {rank}: The processes have seen 54 samples of calibration loader 0, but its data set has 53"
            in messages
        )
        assert f"rank {rank}: A process received no calibration batch" in messages


@pytest.mark.nightly
def test_data_that_turns_bad_on_one_rank_is_an_error_on_every_rank(two_more):
    messages = two_more
    for rank in (0, 1):
        assert f"rank {rank}: NaN or Inf in the inputs of batch norm `trunk.bn1`" in messages
        assert f"rank {rank}: NaN or Inf at `trunk.conv1` in the values of the source of task 'a'" in messages


@pytest.mark.nightly
def test_sharding_strategies_test_a_merged_module_but_do_not_merge(two_more):
    assert "ModelParallelStrategy shards parameters" in two_more
    assert "DTensor" in two_more


@pytest.mark.nightly
def test_processes_that_are_spawned_hand_the_merged_module_over(folder, two):
    run = trainer(devices=2, strategy="ddp_spawn")
    merge(run, 2)
    run.save_checkpoint(folder / "spawned.ckpt", weights_only=True)
    spawned = MultiHeadModule.load_from_checkpoint(folder / "spawned.ckpt")
    assert all(torch.equal(tensor, spawned.state_dict()[name]) for name, tensor in two[0]["state"].items())
    assert spawned.report.spaces


@pytest.mark.nightly
def test_processes_that_are_spawned_test_a_merged_module(one):
    results = trainer(devices=2, strategy="ddp_spawn").test(one, [images(), images(seed=1)], verbose=False)
    assert [sorted(result) for result in results] == [["a/test_acc", "a/test_loss"], ["b/test_acc", "b/test_loss"]]
