"""Canonical correlation analysis against other ways to compute it."""

import pytest
import scipy.linalg
import torch
from helpers.features import mixed_features

from lightning_zipit import functional as F
from lightning_zipit.functional import align, canonical_correlations, mixed_similarity
from lightning_zipit.matchers import CCA

SIZE = 6


def covariance_of(*features):
    return torch.cat(features, 1).T.cov()


def mixing(seed=0):
    """A random matrix that is far from singular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, SIZE, generator=generator).double() + 4 * torch.eye(SIZE).double()


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_canonical_correlations_are_those_of_the_generalised_eigenvalue_problem(gamma):
    covariance = covariance_of(mixed_features(200, 2 * SIZE))
    found = canonical_correlations(covariance, gamma)
    own = [covariance[part, part] for part in (slice(SIZE), slice(SIZE, None))]
    own = [each + gamma * each.diagonal().mean() * torch.eye(SIZE) for each in own]
    across = covariance.clone()
    across[:SIZE, :SIZE] = across[SIZE:, SIZE:] = 0
    values = scipy.linalg.eigh(across.numpy(), torch.block_diag(*own).numpy(), eigvals_only=True)
    torch.testing.assert_close(found, torch.from_numpy(values[::-1][:SIZE].copy()), atol=1e-6, rtol=0)


def test_canonical_correlations_are_those_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.cross_decomposition")
    features = mixed_features(400, 2 * SIZE, seed=1)
    first, second = features[:, :SIZE], features[:, SIZE:]
    pairs = decomposition.CCA(SIZE, tol=1e-12, max_iter=20000).fit_transform(first.numpy(), second.numpy())
    scores = covariance_of(*map(torch.from_numpy, pairs))
    expected = F.correlation(scores)[:SIZE, SIZE:].diagonal()
    torch.testing.assert_close(canonical_correlations(covariance_of(first, second)), expected, atol=1e-6, rtol=0)


def test_aligned_features_have_canonical_correlations_and_the_covariance_of_the_first_model():
    features = mixed_features(300, 2 * SIZE)
    covariance = covariance_of(features)
    (identity, onto), (_, back) = align(covariance, 2, gamma=1e-12)
    assert torch.equal(identity, torch.eye(SIZE).double())
    torch.testing.assert_close(onto @ back, torch.eye(SIZE).double())
    aligned = covariance_of(features[:, :SIZE], features[:, SIZE:] @ onto.T)
    torch.testing.assert_close(aligned[SIZE:, SIZE:], aligned[:SIZE, :SIZE], rtol=1e-6, atol=1e-8)
    values, vectors = torch.linalg.eigh(aligned[:SIZE, :SIZE])
    whitening = vectors / values.sqrt()
    agreement = whitening.T @ aligned[:SIZE, SIZE:] @ whitening  # symmetric: no turn could make its trace higher
    torch.testing.assert_close(agreement, agreement.T, atol=1e-7, rtol=0)
    found = torch.linalg.eigvalsh(agreement).flip(0)
    torch.testing.assert_close(found, canonical_correlations(covariance), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", [1e-9, 0.1, 10.0])
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_copies_are_aligned_by_the_identity_and_shuffled_ones_by_their_order(num_models, gamma):
    features = mixed_features(300, SIZE)
    features[:, 2] = 0  # dead
    orders = [torch.arange(SIZE), *(torch.randperm(SIZE) for _ in range(num_models - 1))]
    for used in ([torch.arange(SIZE)] * num_models, orders):
        maps, inverses = align(covariance_of(*(features[:, order] for order in used)), num_models, gamma)
        for order, onto, back in zip(used, maps, inverses, strict=True):
            expected = torch.nn.functional.one_hot(order, SIZE).T.double()
            torch.testing.assert_close(onto, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(back, expected.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_models", [2, 4])
def test_mixed_copies_are_aligned_by_the_inverse(num_models):
    features = mixed_features(300, SIZE)
    matrices = [torch.eye(SIZE).double(), *map(mixing, range(1, num_models))]
    maps, inverses = align(covariance_of(*(features @ each.T for each in matrices)), num_models, gamma=1e-12)
    for matrix, onto, back in zip(matrices, maps, inverses, strict=True):
        torch.testing.assert_close(onto, torch.linalg.inv(matrix), atol=1e-5, rtol=0)
        torch.testing.assert_close(back, matrix, atol=1e-5, rtol=0)


def test_more_models_agree_better_than_with_the_first_alone():
    features = mixed_features(60, 4 * SIZE, seed=3)
    covariance = covariance_of(features)

    def total(maps):
        aligned = F.correlation(
            covariance_of(*(own @ each.T for own, each in zip(features.split(SIZE, 1), maps, strict=True)))
        )
        return sum(aligned[a * SIZE + f, b * SIZE + f] for f in range(SIZE) for a in range(4) for b in range(a))

    pairs = [
        align(
            covariance_of(features[:, :SIZE], features[:, own * SIZE : (own + 1) * SIZE]),
            2,
            0.01,
        )[0][1]
        for own in range(1, 4)
    ]
    assert total(align(covariance, 4, 0.01)[0]) > total([torch.eye(SIZE).double(), *pairs]) + 0.5


def test_agreement_and_losses_are_those_of_the_features():
    features = mixed_features(200, 3 * SIZE)
    features[:, 4] = 1
    maps = CCA(0.1)(covariance_of(features), 3)
    own = features.split(SIZE, 1)
    given = [each @ merge.T for each, merge in zip(own, maps.merge, strict=True)]
    matched, losses = mixed_similarity(covariance_of(features), *maps)
    scores = F.correlation(covariance_of(*given))
    blocks = scores.unflatten(0, (3, SIZE)).unflatten(2, (3, SIZE))
    expected = torch.cat([blocks[a, :, b].diagonal() for a, b in ((0, 1), (0, 2), (1, 2))])
    constant = torch.tensor([4, SIZE + 4])  # with the second model, and the third
    torch.testing.assert_close(matched, expected[~torch.isin(torch.arange(3 * SIZE), constant)])
    for number, back in enumerate(maps.unmerge):
        lost = (own[number] - sum(given) @ back.T).var(0)
        alive = own[number].var(0) > 0
        torch.testing.assert_close(losses[number], (lost[alive] / own[number].var(0)[alive]).mean())


def test_of_labels_the_losses_are_those_of_zipping():
    covariance = F.correlation(covariance_of(mixed_features(200, 2 * SIZE)))
    labels = F.permute(covariance, 2)
    merge, unmerge = F.merge_matrices(labels, 2)
    matched, losses = mixed_similarity(covariance, merge, unmerge)
    torch.testing.assert_close(losses, F.zip_losses(covariance, labels, 2), atol=1e-6, rtol=0)
    pairs = (labels[:SIZE, None] == labels[SIZE:]).nonzero()
    torch.testing.assert_close(matched.sort().values, covariance[pairs[:, 0], SIZE + pairs[:, 1]].sort().values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CCA(gamma=0), "gamma"),
        (lambda: CCA()(torch.eye(5), 2), "num_models"),
        (lambda: CCA()(torch.full((4, 4), float("nan")), 2), "NaN"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
