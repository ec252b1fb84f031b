from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers.features import correlations, mixed_features
from helpers.processes import run as run_processes

from lightning_zipit import FeatureStatistics, Moments
from lightning_zipit import functional as F

SIZES = (5, 4, 3)


def gather(features: torch.Tensor, batch: int = 64, **kwargs: torch.dtype) -> FeatureStatistics:
    statistics = FeatureStatistics(SIZES, **kwargs)
    for rows in features.split(batch):
        statistics.update(rows.split(SIZES, dim=1))
    return statistics


def dense_moments(features: torch.Tensor) -> Moments:
    return Moments(len(features), features.double().mean(0), features.double().T.cov())


def assert_same(actual: Moments, expected: Moments, digits: float) -> None:
    """Equal counts, and means and covariances within ``digits`` of the features' deviations."""
    assert actual.count == expected.count
    deviation = expected.covariance.diagonal().sqrt()
    tolerance = digits * (deviation + expected.mean.abs())
    assert ((actual.mean - expected.mean).abs() <= tolerance).all()
    assert ((actual.covariance - expected.covariance).abs() <= digits * torch.outer(deviation, deviation)).all()


@pytest.fixture
def features():
    return mixed_features(400, sum(SIZES)) + 3


@pytest.mark.parametrize("batch", [1, 7, 500, 600])
@pytest.mark.parametrize(
    "mean, deviation", [(0, 1), (10, 1e-3), (1e4, 1), (1e4, 1e-2), (1e6, 1)], ids=lambda value: f"{value:g}"
)
def test_correlations_are_those_of_a_dense_float64_computation(mean, deviation, batch):
    features = mixed_features(600, sum(SIZES)) * deviation + mean
    features[:, 3] = mean
    single = features.float()
    correlation = F.correlation(gather(single, batch).compute().covariance)
    torch.testing.assert_close(correlation, correlations(single), rtol=0, atol=1e-5)
    correlation = F.correlation(gather(features, batch, dtype=torch.float64).compute().covariance)
    torch.testing.assert_close(correlation, correlations(features), rtol=0, atol=1e-12)


def test_single_precision_features_keep_double_precision_when_asked():
    features = (mixed_features(1200, sum(SIZES)) + 1e4).float()
    moments = gather(features, 100, dtype=torch.float64).compute()
    assert_same(moments, dense_moments(features), 1e-12)


def test_fewer_samples_than_features_use_float64():
    features = (mixed_features(10, sum(SIZES)) + 1e2).float()
    assert_same(gather(features).compute(), dense_moments(features), 1e-12)


def test_a_large_batch_is_taken_in_pieces(features, monkeypatch):
    whole = gather(features, 400).compute()
    monkeypatch.setattr("lightning_zipit._calibration.statistics.AT_ONCE", 90 * sum(SIZES))
    assert_same(gather(features, 400).compute(), whole, 1e-12)


def test_moments_are_double_and_symmetric(features):
    moments = gather(features.float()).compute()
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert torch.equal(moments.covariance, moments.covariance.T)
    assert_same(moments, dense_moments(features), 1e-5)


def test_a_feature_with_one_value_has_no_variance(features):
    features[:, 1], features[:, 7] = 0.1, -1e6 / 3
    for batch in (1, 7, 400):
        covariance = gather(features.float(), batch).compute().covariance
        assert not covariance[[1, 7]].any()


def test_copies_of_a_feature_correlate_fully_on_few_samples():
    features = mixed_features(4, sum(SIZES)).relu().float()
    features[:, 5:9] = features[:, :4]
    correlation = F.correlation(gather(features, 2).compute().covariance)
    alive = features[:, :4].var(0) > 0
    torch.testing.assert_close(correlation[range(4), range(5, 9)], alive.double(), rtol=0, atol=1e-12)


def test_statistics_of_two_halves_add_up_to_the_whole(features):
    left, right = gather(features[:150]), gather(features[150:])
    whole = dense_moments(features)
    assert_same((left + right).compute(), whole, 1e-12)
    assert_same((right + left).compute(), whole, 1e-12)
    assert_same(left.compute(), dense_moments(features[:150]), 1e-12)
    left.merge_state(right)
    assert_same(left.compute(), whole, 1e-12)


def test_states_of_another_site_can_be_merged(features):
    here, there = gather(features[:150]), gather(features[150:])
    here.merge_state(there.metric_state)
    assert_same(here.compute(), dense_moments(features), 1e-12)


def test_adding_statistics_without_samples_changes_nothing(features):
    statistics, empty = gather(features), FeatureStatistics(SIZES)
    for joint in (statistics + empty, empty + statistics):
        assert_same(joint.compute(), dense_moments(features), 1e-12)


def test_only_statistics_of_the_same_sizes_add_up(features):
    statistics = gather(features)
    with pytest.raises(ValueError, match="same sizes"):
        statistics + FeatureStatistics([12])
    with pytest.raises(ValueError, match="same sizes"):
        statistics.merge_state(FeatureStatistics([12]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # torchmetrics does not save the number of updates
def test_loaded_statistics_can_be_updated(features, tmp_path):
    torch.save(gather(features[:150]).state_dict(), tmp_path / "statistics.pt")
    statistics = FeatureStatistics(SIZES)
    statistics.load_state_dict(torch.load(tmp_path / "statistics.pt", weights_only=True))
    assert_same(statistics.compute(), dense_moments(features[:150]), 1e-12)
    statistics.update(features[150:].split(SIZES, dim=1))
    assert_same(statistics.compute(), dense_moments(features), 1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copied_and_pickled_statistics_can_be_updated(features, duplicate):
    statistics = gather(features[:150])
    other = duplicate(statistics)
    other.update(features[150:].split(SIZES, dim=1))
    assert_same(other.compute(), dense_moments(features), 1e-12)
    assert_same(statistics.compute(), dense_moments(features[:150]), 1e-12)


def test_only_the_comoment_has_matrix_size():
    statistics = FeatureStatistics([8, 8]).to("cpu")
    assert sum(default.untyped_storage().nbytes() for default in statistics._defaults.values()) < 8 * 16 * 16


def test_reset_clears_statistics(features):
    statistics = gather(features + 1e4)
    statistics.reset()
    statistics.update(features.split(SIZES, dim=1))
    assert_same(statistics.compute(), dense_moments(features), 1e-12)


@pytest.mark.parametrize(
    "cast",
    [lambda s: s.half(), lambda s: s.float(), lambda s: s.set_dtype(torch.float16)],
    ids=["half", "float", "set_dtype"],
)
def test_states_stay_float64_after_casts(features, cast):
    statistics = cast(gather(features[:150]))
    statistics.update(features[150:].split(SIZES, dim=1))
    assert {state.dtype for state in statistics.metric_state.values()} == {torch.float64}
    assert_same(statistics.compute(), dense_moments(features), 1e-12)


def test_statistics_gathered_in_inference_mode_stay_usable(features):
    statistics = FeatureStatistics(SIZES)
    with torch.inference_mode():
        statistics.update(features[:150].split(SIZES, dim=1))
        assert_same(statistics.compute(), dense_moments(features[:150]), 1e-12)
    assert not any(state.is_inference() for state in statistics.metric_state.values())
    statistics.update(features[150:].split(SIZES, dim=1))
    moments = statistics.compute()
    assert_same(moments, dense_moments(features), 1e-12)
    weight = torch.ones(sum(SIZES), dtype=torch.float64, requires_grad=True)
    (moments.covariance @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, moments.covariance.sum(0))


def test_statistics_ignore_autocast(features):
    expected = gather(features.float()).compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gather(features.float()).compute()
    assert torch.equal(actual.covariance, expected.covariance)
    assert torch.equal(actual.mean, expected.mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features_are_accepted(features, dtype):
    features = features.to(dtype)
    assert_same(gather(features).compute(), dense_moments(features), 1e-6)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_restored(features, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        gather(features)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [(8, 5), (8, 4)],
        [(8, 5), (8, 3), (8, 4)],
        [(8, 5), (8, 4), (7, 3)],
        [(8, 5), (8, 4), (8, 3), (8, 3)],
        [(8, 5), (8, 4), (8,)],
        [(8, 5, 1), (8, 4, 1), (8, 3, 1)],
    ],
    ids=str,
)
def test_statistics_refuse_features_of_wrong_shape(features, shapes):
    statistics = gather(features)
    with pytest.raises(ValueError, match="features"):
        statistics.update([torch.zeros(shape) for shape in shapes])
    assert_same(statistics.compute(), dense_moments(features), 1e-12)


@pytest.mark.parametrize("arguments", [([],), ([3, 0],), ([3], torch.float16), ([3], torch.int64)], ids=str)
def test_statistics_refuse_bad_constructor_arguments(arguments):
    with pytest.raises(ValueError, match=r"sizes|dtype"):
        FeatureStatistics(*arguments)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_moments_without_samples_are_an_error():
    statistics = FeatureStatistics(SIZES)
    with pytest.raises(ValueError, match="no samples"):
        statistics.compute()
    statistics.update([torch.zeros(0, size) for size in SIZES])
    with pytest.raises(ValueError, match="no samples"):
        statistics.compute()


def test_one_sample_is_its_own_mean():
    sample = torch.arange(12.0)[None]
    moments = gather(sample).compute()
    assert moments.count == 1
    assert torch.equal(moments.mean, sample[0].double())
    assert not moments.covariance.any()


SHARDS = {"uneven": [(0, 300), (300, 400)], "one_empty": [(0, 400), (400, 400)], "first_empty": [(0, 0), (0, 400)]}


def shifted_features() -> torch.Tensor:
    """Features whose mean drifts from one process to the other, one of them dead."""
    features = mixed_features(400, sum(SIZES)) + 1e4 + torch.linspace(0, 10, 400, dtype=torch.float64)[:, None]
    features[:, 2] = 7
    return features


def gather_shards(rank: int, folder: str) -> None:
    """One of two processes: gather the own shard, compute on both, go on gathering and compute again."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    moments = {}
    for name, shards in SHARDS.items():
        features = shifted_features()[slice(*shards[rank])]
        statistics = gather(features, dtype=torch.float64)
        moments[name] = tuple(statistics.compute())
        own = statistics.metric_state["count"].item()
        assert own == len(features), "computing leaves each process with its own samples"
        statistics.update(features.split(SIZES, dim=1))
        moments[f"{name} twice"] = tuple(statistics.compute())
    torch.save(moments, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def moments_of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes = run_processes(gather_shards, [(0, str(folder)), (1, str(folder))], folder)
    assert [process.code for process in processes] == [0, 0], processes
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("times", [1, 2])
def test_moments_of_two_processes_equal_those_of_one(moments_of_two_processes, shards, times):
    name = shards if times == 1 else f"{shards} twice"
    first, second = (Moments(*moments[name]) for moments in moments_of_two_processes)
    assert first.count == second.count
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.covariance, second.covariance)
    assert_same(first, gather(shifted_features().repeat(times, 1), dtype=torch.float64).compute(), 1e-12)
