from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from helpers.features import correlations, mixed_features, shuffled_copies
from helpers.plain_zip import plain_greedy_zip

from lightning_zipit import functional as F

ALPHAS = (0.0, 0.1, 0.3, 1.0)
BETAS = (0.0, 0.125, 0.5, 0.7, 1.0)


def uniform(n, seed):
    upper = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1) * 2 - 1
    return upper.triu(1) + upper.triu(1).T


def dead_features(n, seed):
    features = mixed_features(30, n, seed)
    features[:, ::3] = 0
    return correlations(features)


SIMILARITIES = {
    "uniform": uniform,
    "negative": lambda n, seed: -uniform(n, seed).abs(),
    "ties": lambda n, seed: (uniform(n, seed) * 2).round() / 2,
    "all_equal": lambda n, seed: torch.full((n, n), 0.5, dtype=torch.float64),
    "correlated": lambda n, seed: correlations(mixed_features(100, n, seed)),
    "few_samples": lambda n, seed: correlations(mixed_features(3, n, seed)),
    "sparse": lambda n, seed: correlations(mixed_features(12, n, seed).sub(1).relu()),
    "dead": dead_features,
}


def clusters_of(labels):
    return [labels.eq(label).nonzero().flatten().tolist() for label in range(int(labels.max()) + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_models", [2, 3, 4])
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_greedy_zip_equals_the_plain_version(kind, num_models, dtype):
    for seed, (alpha, beta) in enumerate(product(ALPHAS, BETAS)):
        size = 2 + seed % 6
        width = (size, 1, size - 1, size + 1)[seed % 4]
        similarity = SIMILARITIES[kind](num_models * size, seed).to(dtype)
        labels = F.greedy_zip(similarity, num_models, width, alpha, beta)
        expected = plain_greedy_zip(similarity, num_models, width, alpha, beta)
        assert torch.equal(labels, expected), (size, width, alpha, beta)


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_greedy_zip_equals_the_plain_version_on_a_wide_space(num_models):
    similarity = correlations(mixed_features(50, 48, seed=num_models).relu())
    labels = F.greedy_zip(similarity, num_models, 12, 0.1, 0.5)
    assert torch.equal(labels, plain_greedy_zip(similarity, num_models, 12, 0.1, 0.5))


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_greedy_zip_returns_width_clusters_numbered_by_their_lowest_feature(kind):
    similarity = SIMILARITIES[kind](12, seed=1)
    before = similarity.clone()
    for width in range(1, 13):
        labels = F.greedy_zip(similarity, 2, width)
        assert labels.dtype == torch.int64
        lowest = [min(cluster) for cluster in clusters_of(labels)]
        assert len(lowest) == width
        assert lowest == sorted(lowest)
    assert torch.equal(similarity, before)


def test_greedy_zip_takes_the_lowest_row_and_column_among_ties():
    assert F.greedy_zip(torch.ones(6, 6), num_models=2, width=4).tolist() == [0, 0, 1, 1, 2, 3]
    assert F.greedy_zip(torch.ones(6, 6), num_models=2, width=5, beta=0.0).tolist() == [0, 1, 2, 0, 3, 4]


@pytest.mark.parametrize("seed", range(10))
def test_greedy_zip_of_two_models_without_budget_matches_one_to_one(seed):
    labels = F.greedy_zip(uniform(16, seed), num_models=2, width=8, beta=0.0)
    assert sorted(labels[:8].tolist()) == sorted(labels[8:].tolist()) == list(range(8))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_greedy_zip_keeps_to_the_budget_of_each_model(beta):
    similarity = torch.block_diag(torch.full((8, 8), 0.9), torch.full((8, 8), 0.9)) + uniform(16, 0).float() / 100
    labels = F.greedy_zip(similarity, num_models=2, width=8, alpha=1.0, beta=beta)
    for own in labels.chunk(2):
        assert 8 - len(own.unique()) == int(4 * beta)


def test_greedy_zip_ignores_the_diagonal():
    similarity = uniform(12, 3)
    expected = F.greedy_zip(similarity, 2, 6)
    assert torch.equal(F.greedy_zip(similarity.fill_diagonal_(9.0), 2, 6), expected)


@pytest.mark.parametrize("num_models", [2, 3])
def test_permute_recovers_a_hidden_permutation(num_models):
    features, orders = shuffled_copies(mixed_features(200, 16), num_models)
    assert torch.equal(F.permute(correlations(features), num_models), torch.cat(orders))


@pytest.mark.parametrize("seed", range(10))
def test_permute_is_optimal(seed):
    size = 2 + seed % 4
    similarity = uniform(2 * size, seed)
    block = similarity[:size, size:]
    own = F.permute(similarity, 2)[size:]
    best = max(block[list(order), range(size)].sum() for order in permutations(range(size)))
    torch.testing.assert_close(block[own, range(size)].sum(), best)


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_average_matches_by_index(num_models):
    labels = F.average(num_models * 5, num_models)
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(range(5)) * num_models


LABELINGS = {
    "greedy": lambda num_models: F.greedy_zip(uniform(num_models * 6, 5), num_models, 6, alpha=0.5),
    "narrow": lambda num_models: F.greedy_zip(uniform(num_models * 6, 6), num_models, 2),
    "permute": lambda num_models: F.permute(uniform(num_models * 6, 7), num_models),
}


@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("kind", LABELINGS)
def test_merging_averages_each_cluster_and_unmerging_copies_it_back(kind, num_models):
    labels = LABELINGS[kind](num_models)
    width = int(labels.max()) + 1
    merge, unmerge = F.merge_matrices(labels, num_models)
    assert [tuple(m.shape) for m in merge] == [(width, 6)] * num_models
    assert [tuple(u.shape) for u in unmerge] == [(6, width)] * num_models
    values = torch.randn(len(labels), generator=torch.Generator().manual_seed(0))
    means = torch.stack([values[cluster].mean() for cluster in clusters_of(labels)])
    torch.testing.assert_close(torch.cat(merge, 1).sum(1), torch.ones(width))
    torch.testing.assert_close(torch.cat(merge, 1) @ values, means)
    assert torch.equal(torch.cat(unmerge) @ means, means[labels])
    torch.testing.assert_close(torch.cat(merge, 1) @ torch.cat(unmerge), torch.eye(width))


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_merge_and_unmerge_matrices_of_a_permutation_undo_each_other(num_models):
    merge, unmerge = F.merge_matrices(LABELINGS["permute"](num_models), num_models)
    for m, u in zip(merge, unmerge, strict=True):
        torch.testing.assert_close(num_models * m @ u, torch.eye(6))
        torch.testing.assert_close(num_models * u @ m, torch.eye(6))


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_correlation_equals_the_correlation_of_torch(dtype, digits, scale):
    features = mixed_features(40, 12).to(dtype)
    features[:, [2, 7]] = 3.0
    covariance = features.T.cov() * scale
    before = covariance.clone()
    correlation = F.correlation(covariance)
    assert correlation.dtype == dtype
    torch.testing.assert_close(correlation, features.T.corrcoef().nan_to_num(0.0), rtol=0, atol=digits)
    assert torch.equal(covariance, before)


def test_dead_features_have_no_correlation_not_even_with_themselves():
    covariance = mixed_features(40, 6).T.cov()
    covariance[2] = covariance[:, 2] = 0
    correlation = F.correlation(covariance)
    assert not correlation[2].any()
    assert not correlation[:, 2].any()
    assert correlation.diagonal().tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_correlation_of_collinear_features_stays_between_minus_one_and_one(dtype):
    factors = torch.linspace(-3, 3, 101, dtype=dtype)
    correlation = F.correlation(torch.outer(factors, factors) * 0.1)
    assert correlation.abs().max() == 1
    torch.testing.assert_close(correlation, torch.outer(factors.sign(), factors.sign()))


@pytest.mark.parametrize(
    "name, call",
    [
        ("covariance", lambda: F.correlation(torch.ones(2, 3))),
        ("covariance", lambda: F.correlation(torch.ones(4))),
        ("similarity", lambda: F.greedy_zip(torch.ones(4, 2), 2, 2)),
        ("similarity", lambda: F.greedy_zip(torch.eye(4).fill_diagonal_(float("nan")), 2, 2)),
        ("similarity", lambda: F.greedy_zip(torch.eye(4).index_fill(0, torch.tensor(1), float("nan")), 2, 2)),
        ("similarity", lambda: F.greedy_zip(torch.full((4, 4), float("inf")), 2, 2)),
        ("num_models", lambda: F.greedy_zip(torch.eye(5), 2, 2)),
        ("num_models", lambda: F.greedy_zip(torch.eye(4), 0, 2)),
        ("width", lambda: F.greedy_zip(torch.eye(4), 2, 0)),
        ("width", lambda: F.greedy_zip(torch.eye(4), 2, 5)),
        ("alpha", lambda: F.greedy_zip(torch.eye(4), 2, 2, alpha=-0.1)),
        ("alpha", lambda: F.greedy_zip(torch.eye(4), 2, 2, alpha=float("nan"))),
        ("beta", lambda: F.greedy_zip(torch.eye(4), 2, 2, beta=1.5)),
        ("similarity", lambda: F.permute(torch.ones(4), 2)),
        ("num_models", lambda: F.permute(torch.eye(5), 2)),
        ("labels", lambda: F.merge_matrices(torch.zeros(2, 2, dtype=torch.int64), 2)),
        ("labels", lambda: F.merge_matrices(torch.zeros(5, dtype=torch.int64), 2)),
        ("num_models", lambda: F.merge_matrices(torch.zeros(4, dtype=torch.int64), 0)),
    ],
)
def test_error_names_the_bad_argument(name, call):
    with pytest.raises(ValueError, match=f"\\b{name}\\b"):
        call()


def test_unit_similarity_is_that_of_the_best_matching_of_two_units():
    covariance = mixed_features(80, 12).T.cov()
    similarity, members = F.correlation(covariance), torch.tensor([[0, 3, 5], [1, 2, 4]])
    units = F.unit_similarity(similarity, members, num_models=2)
    assert units.shape == (4, 4) and torch.equal(units, units.T)
    torch.testing.assert_close(units.diagonal(), torch.ones(4, dtype=units.dtype))
    block = similarity[members[0]][:, members[1] + 6]  # the first unit of the first model, the second of the second
    best = max(block[range(3), list(order)].mean().item() for order in permutations(range(3)))
    assert units[0, 3].item() == pytest.approx(best)


def test_unit_similarity_does_not_depend_on_the_order_inside_units():
    similarity = F.correlation(mixed_features(80, 12).T.cov())
    members = torch.tensor([[0, 3, 5], [1, 2, 4]])
    shuffled = torch.tensor([[5, 0, 3], [2, 1, 4]])
    torch.testing.assert_close(
        F.unit_similarity(similarity, members, 2), F.unit_similarity(similarity, shuffled, 2), rtol=0, atol=1e-12
    )
