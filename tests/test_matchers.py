from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from helpers.features import correlations, mixed_features, shuffled_copies
from helpers.plain_zip import plain_greedy_zip

from lightning_zipit import FeatureStatistics
from lightning_zipit import functional as F
from lightning_zipit.matchers import (
    Agglomerative,
    Average,
    CycleConsistent,
    DualSpace,
    GreedyZip,
    KMeans,
    Matcher,
    Optimal,
    Permute,
    WeightMatching,
)

SIZE = 24


def dead(features):
    features[:, ::4] = 0
    return features


def duplicated(features):
    features[:, 8:16] = features[:, :8]
    features[:, 16:20] = features[:, :4]
    return features


MODELS = {
    "generic": lambda: mixed_features(300, SIZE),
    "dead": lambda: dead(mixed_features(300, SIZE)),
    "few_samples": lambda: mixed_features(10, SIZE),
    "hardly_active": lambda: mixed_features(10, SIZE).sub(2).relu(),
    "duplicated": lambda: duplicated(mixed_features(300, SIZE)),
    "all_of_it": lambda: dead(duplicated(mixed_features(10, SIZE).sub(1).relu())),
    "nothing_active": lambda: torch.zeros(10, SIZE),
}


def measured(features, num_models):
    """The similarity that a merge would see: of single precision features, gathered in batches."""
    statistics = FeatureStatistics([SIZE] * num_models)
    for rows in features.float().split(100):
        statistics.update(rows.chunk(num_models, dim=1))
    return F.correlation(statistics.compute().covariance)


def assert_one_of_each_model(labels, num_models):
    for own in labels.chunk(num_models):
        assert sorted(own.tolist()) == list(range(len(own)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "matcher, num_models",
    [(GreedyZip(), 2), (GreedyZip(alpha=0.3, beta=0.5), 2), (GreedyZip(alpha=1.0), 3), (GreedyZip(beta=0.0), 3)],
    ids=str,
)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_zip_pairs_features_up_with_their_copies(model, matcher, num_models, seed):
    features, _ = shuffled_copies(MODELS[model](), num_models, seed)
    labels = matcher(measured(features, num_models), num_models)
    assert_one_of_each_model(labels, num_models)
    first = features[:, labels[:SIZE].argsort()]  # the first model's feature of every cluster
    assert torch.equal(first[:, labels], features)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize(
    "matcher",
    [GreedyZip(), GreedyZip(alpha=0.5, beta=0.125), GreedyZip(alpha=1.0, beta=0.5), GreedyZip(alpha=0.0)],
    ids=str,
)
def test_greedy_zip_equals_its_definition_without_ties(matcher, num_models, seed):
    similarity = correlations(mixed_features(200, num_models * SIZE, seed))
    expected = plain_greedy_zip(similarity, num_models, SIZE, matcher.alpha, matcher.beta)
    assert torch.equal(matcher(similarity, num_models), expected)


@pytest.mark.parametrize("seed", range(10))
def test_greedy_zip_leaves_the_width_of_one_model_whatever_is_dead(seed):
    generator = torch.Generator().manual_seed(seed)
    features = mixed_features(50, 3 * SIZE, seed) * (torch.rand(3 * SIZE, generator=generator) > seed / 9)
    labels = GreedyZip()(correlations(features), 3)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(SIZE))


@pytest.mark.parametrize("matcher", [GreedyZip(), GreedyZip(beta=0.0), KMeans(), Agglomerative()], ids=str)
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_any_width_is_left_whatever_is_dead(matcher, num_models):
    generator = torch.Generator().manual_seed(num_models)
    for share in (0.0, 0.4, 1.0):
        alive = torch.rand(num_models * SIZE, generator=generator) > share
        similarity = correlations(mixed_features(50, num_models * SIZE) * alive)
        for width in range(1, num_models * SIZE + 1):
            assert matcher(similarity, num_models, width).unique().tolist() == list(range(width))
        for width in (0, num_models * SIZE + 1):
            with pytest.raises(ValueError, match="`width` must lie between 1 and"):
                matcher(similarity, num_models, width)


def test_greedy_zip_does_not_merge_live_features_for_the_sake_of_dead_ones():
    features = mixed_features(50, 2 * SIZE)
    features[:, [1, 5, SIZE, SIZE + 2, SIZE + 3]] = 0
    labels = GreedyZip()(correlations(features), 2)
    dead = labels[[1, 5]].tolist()
    assert sorted(labels[[SIZE, SIZE + 2]].tolist()) == sorted(dead)
    assert labels.bincount()[dead].tolist() == [2, 2]


def test_matching_leaves_the_similarity_as_it_was():
    similarity = correlations(dead(mixed_features(50, 2 * SIZE)))
    before = similarity.clone()
    for matcher in (GreedyZip(), Permute(), Average()):
        matcher(similarity, 2)
        assert torch.equal(similarity, before)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_greedy_zip_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        GreedyZip(**{name: value})
    with pytest.raises(ValueError, match=name):
        replace(GreedyZip(), **{name: value})


@pytest.mark.parametrize("num_models", [2, 3])
def test_average_matches_by_index_and_permute_finds_copies(num_models):
    features, orders = shuffled_copies(mixed_features(50, SIZE), num_models)
    similarity = correlations(features)
    assert Average()(similarity, num_models).tolist() == list(range(SIZE)) * num_models
    assert torch.equal(Permute()(similarity, num_models), torch.cat(orders))


@pytest.mark.parametrize("model", MODELS)
def test_permute_matches_one_to_one_whatever_is_dead(model):
    features, _ = shuffled_copies(MODELS[model](), 2)
    assert_one_of_each_model(Permute()(correlations(features), 2), 2)


def test_matchers_compare_by_value():
    assert GreedyZip() == GreedyZip(alpha=0.1, beta=1.0)
    assert GreedyZip() != GreedyZip(beta=0.5)
    assert Permute() == Permute() != Average()
    assert len({GreedyZip(), GreedyZip(0.1), GreedyZip(0.2), Permute(), Permute(), Average()}) == 4


@pytest.mark.parametrize("matcher", [GreedyZip(alpha=0.3, beta=0.5), Permute(), Average()], ids=str)
def test_repr_of_a_matcher_is_its_constructor_call(matcher):
    assert eval(repr(matcher)) == matcher
    assert repr(GreedyZip()) == "GreedyZip(alpha=0.1, beta=1.0)"


def test_a_matcher_of_ones_own_only_needs_to_be_callable():
    class Reverse(Matcher):
        def __call__(self, similarity, num_models):
            return torch.arange(len(similarity)).flip(0) % (len(similarity) // num_models)

    assert Reverse()(torch.eye(4), 2).tolist() == [1, 0, 1, 0]
    with pytest.raises(TypeError):
        Matcher()


def pairings(features):
    """Every way to pair features up."""
    if not features:
        yield []
        return
    first, *others = features
    for partner in others:
        rest = [feature for feature in others if feature != partner]
        yield from ([(first, partner), *pairs] for pairs in pairings(rest))


@pytest.mark.parametrize("seed", range(5))
def test_optimal_pairs_have_the_highest_total_similarity_of_all(seed):
    similarity = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double()
    similarity = similarity + similarity.T
    labels = Optimal()(similarity, 2)
    assert labels.bincount().tolist() == [2] * 4
    total = sum(similarity[tuple((labels == label).nonzero().flatten())].item() for label in range(4))
    assert total == pytest.approx(max(sum(similarity[pair].item() for pair in pairs) for pairs in pairings(range(8))))


def test_optimal_pairs_are_for_two_models():
    with pytest.raises(ValueError, match="2 models"):
        Optimal()(torch.eye(6), 3)


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("matcher", [KMeans(), KMeans(seed=1)], ids=str)
def test_k_means_finds_copies(matcher, num_models):
    features, _ = shuffled_copies(mixed_features(300, SIZE), num_models, 0)
    labels = matcher(measured(features, num_models), num_models)
    assert labels.bincount(minlength=SIZE).min() >= 1 and int(labels.max()) == SIZE - 1
    together = (labels[:, None] == labels[None, :]).double()
    assert (measured(features, num_models)[together > 0] > 0.5).all()


def test_k_means_has_no_empty_cluster_for_equal_features():
    for similarity in (torch.ones(12, 12), torch.zeros(12, 12), torch.eye(12)):
        labels = KMeans()(similarity, 3)
        assert sorted(labels.unique().tolist()) == [0, 1, 2, 3] and labels[0] == 0


def bottom_up(similarity, count, linkage):
    """Agglomerative clustering as it is defined: look at all pairs of clusters, join the most similar, repeat."""
    of_two = {"average": torch.mean, "complete": torch.min, "single": torch.max}[linkage]
    clusters = [[feature] for feature in range(len(similarity))]
    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        a, b = max(pairs, key=lambda pair: of_two(similarity[clusters[pair[0]]][:, clusters[pair[1]]]).item())
        clusters[a] += clusters.pop(b)
    return sorted(sorted(cluster) for cluster in clusters)


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_agglomerative_clusters_are_those_of_the_definition(num_models, linkage):
    similarity = correlations(mixed_features(50, num_models * 8))
    labels = Agglomerative(linkage)(similarity, num_models)
    found = [(labels == label).nonzero().flatten().tolist() for label in range(8)]
    assert sorted(found) == bottom_up(similarity, 8, linkage) and found[0][0] == 0


def total_of(similarity, labels, num_models):
    """The similarity of all features of different models that have become one."""
    orders = [own.argsort() for own in labels.chunk(num_models)]
    blocks = similarity.unflatten(0, (num_models, -1)).unflatten(2, (num_models, -1))
    pairs = [(a, b) for a in range(num_models) for b in range(a + 1, num_models)]
    return sum(blocks[a, orders[a], b, orders[b]].sum().item() for a, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_cycle_consistent_matching_is_the_best_of_all_or_nearly(seed):
    similarity = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed)).double()
    similarity = similarity + similarity.T
    labels = CycleConsistent()(similarity, 3)
    assert_one_of_each_model(labels, 3)
    every = [torch.tensor([*range(4), *a, *b]) for a in permutations(range(4)) for b in permutations(range(4))]
    totals = sorted(total_of(similarity, other, 3) for other in every)
    own = total_of(similarity, labels, 3)
    assert own >= total_of(similarity, Permute()(similarity, 3), 3)
    assert totals.index(pytest.approx(own)) >= 0.9 * len(totals)


def test_cycle_consistent_matching_finds_copies_and_is_permute_for_two():
    features, _ = shuffled_copies(mixed_features(300, SIZE), 4, 0)
    labels = CycleConsistent()(measured(features, 4), 4)
    assert torch.equal(features[:, labels[:SIZE].argsort()][:, labels], features)
    similarity = correlations(mixed_features(50, 2 * SIZE))
    assert torch.equal(CycleConsistent()(similarity, 2), Permute()(similarity, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualSpace(tau=1.5), "tau"),
        (lambda: DualSpace(rounds=0), "rounds"),
        (lambda: DualSpace(matcher=WeightMatching()), "one space at a time"),
        (lambda: WeightMatching(tau=0.5), "DualSpace"),
        (lambda: Agglomerative("nearest"), "linkage"),
        (lambda: Agglomerative()(torch.full((4, 4), float("nan")), 2), "NaN"),
        (lambda: CycleConsistent()(torch.full((4, 4), float("nan")), 2), "NaN"),
    ],
)
def test_other_matchers_refuse_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
