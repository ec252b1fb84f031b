"""Merges are right by oracles that share no code with the package.

Merges of unlike networks are those of a dense implementation of the paper. A network merged with copies whose units
were put into another order by hand keeps its function. The tests are in one file so that a process captures each
network once.
"""

from __future__ import annotations

import pytest
import torch
from helpers.dense_cases import CASES
from helpers.dense_zip import Case, merge_dense, record, zip_labels
from helpers.nets import settle
from helpers.permuted import permuted_copy, random_orders
from torch import nn
from torch.nn import BatchNorm2d

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.matchers import GreedyZip, Matcher


def unlike_sources(case: Case, num_models: int, x: torch.Tensor) -> list[nn.Module]:
    """Networks of unlike weights, whose norms have scales and statistics of their own, and no feature that is dead."""
    sources = []
    while len(sources) < num_models:
        network = case.make().double().eval()
        for tensor in network.state_dict().values():
            if tensor.ndim == 1:  # biases, and what norms have
                tensor.copy_(torch.rand_like(tensor) + 0.2)
            elif tensor.ndim:
                tensor.normal_(std=(tensor[0].numel() / 2) ** -0.5)
        found = record(case, case.end, network, x).values()
        if all((features.std(1) > 0.01).all() for features in found):
            sources.append(network)
    return sources


class ByNumberInUnits(Matcher):
    """Another matcher, but for groups and heads and what they hold, which are known by how many they are."""

    def __init__(self, matcher: Matcher, case: Case):
        sizes = [(case.sizes[space], units) for space, units in case.units.items()]
        self.matcher, self.by_number = matcher, {n for size, units in sizes for n in (units, size // units)}

    def __call__(self, similarity, num_models):
        size = len(similarity) // num_models
        if size in self.by_number:
            return torch.arange(size).repeat(num_models)
        return self.matcher(similarity, num_models)


class Given(Matcher):
    """Labels that depend on the number of features alone: at random, with clusters within a model and across."""

    def __call__(self, similarity, num_models):
        return given(len(similarity) // num_models, num_models)


def given(size: int, num_models: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    if size <= 3:  # groups and heads, and what they hold
        return torch.cat([torch.randperm(size, generator=generator) for _ in range(num_models)])
    others = torch.randint(size, ((num_models - 1) * size,), generator=generator)
    return torch.cat([torch.arange(size), others])[torch.randperm(num_models * size, generator=generator)]


def given_labels(case: Case, space: str, num_models: int) -> torch.Tensor:
    """Those that the matcher gives to a space; with groups or heads, to these first and then to what they hold."""
    if space not in case.units:
        return given(case.sizes[space], num_models)
    units, size = case.units[space], case.sizes[space] // case.units[space]
    of_units, within = given(units, num_models).reshape(num_models, units), given(size, num_models)
    within = within.reshape(num_models, size)
    return (of_units[:, :, None] * size + within[:, None, :]).flatten()


@torch.no_grad()
def assert_merges_to(merged, expected, x):
    handed = merged.trunk(x)
    handed = handed if isinstance(handed, tuple) else (handed,)
    for head, network in zip(merged.heads.values(), expected, strict=True):
        torch.testing.assert_close(head(*handed), network(x), rtol=1e-5, atol=1e-6)


def merge(sources, x, **settings):
    """Without the proof: the oracle is the judge."""
    return merge_backbones(
        {f"task {number}": source for number, source in enumerate(sources)},
        [x],
        MergeSettings(refine=None, verify=False, **settings),
    )


@pytest.mark.parametrize(
    "num_models, middle",
    [pytest.param(2, False, id="two whole"), pytest.param(3, True, id="three cut", marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("name", CASES)
def test_a_given_matching_is_merged_as_in_the_paper(name, num_models, middle):
    case, x = CASES[name], CASES[name].example()
    sources, cut = unlike_sources(case, num_models, x), case.cut if middle else case.end
    labels = {space: given_labels(case, space, num_models) for space in case.spaces(cut)}
    merged = merge(sources, x, stop_at=cut.module if middle else None, matcher=Given())
    assert_merges_to(merged, merge_dense(case, cut, sources, labels), x)


@pytest.mark.parametrize(
    "num_models, alpha, beta, middle",
    [
        pytest.param(2, 0.1, 1.0, False, id="two whole"),
        pytest.param(2, 1.0, 0.0, True, id="two cut", marks=pytest.mark.nightly),
        pytest.param(3, 0.5, 0.5, False, id="three whole"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_features_are_matched_as_in_the_paper(name, num_models, alpha, beta, middle):
    case, x = CASES[name], CASES[name].example()
    sources, cut = unlike_sources(case, num_models, x), case.cut if middle else case.end
    labels = zip_labels(case, cut, sources, x, alpha, beta)
    matcher = ByNumberInUnits(GreedyZip(alpha, beta), case)
    merged = merge(sources, x, stop_at=cut.module if middle else None, matcher=matcher)
    assert_merges_to(merged, merge_dense(case, cut, sources, labels), x)


@pytest.mark.parametrize("width", [0.75, 1.5])
@pytest.mark.parametrize("name", ["mlp", "plain cnn", "depthwise", "concatenation"])
def test_so_they_are_where_the_merged_network_has_another_width(name, width):
    case, x = CASES[name], CASES[name].example()
    sources = unlike_sources(case, 2, x)
    labels = zip_labels(case, case.end, sources, x, 0.1, 1.0, width)
    merged = merge(sources, x, matcher=GreedyZip(0.1, 1.0), width=width)
    assert_merges_to(merged, merge_dense(case, case.end, sources, labels), x)


NORMED = {name for name, case in CASES.items() if any(isinstance(part, BatchNorm2d) for part in case.make().modules())}
WHOLE = [(None, "whole"), ("least_squares", "whole"), ("batch_norm", "whole")]
CUT = [("least_squares", "cut"), ("repair", "cut")]
SELDOM = [(None, "cut"), ("repair", "whole"), ("batch_norm", "cut")]
REFINED = [
    pytest.param(name, refine, end, marks=pytest.mark.nightly if (refine, end) in SELDOM else ())
    for name in CASES
    for refine, end in WHOLE + CUT + SELDOM
    if refine != "batch_norm" or name in NORMED
]


@torch.no_grad()
def trained(case, x):
    """A network whose norms have scales, and the statistics of some data."""
    network = case.make().double()
    for tensor in network.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) / 4)
    return settle(network, x)


@torch.no_grad()
def error(merged, expected, x):
    """The largest deviation of an output, relative to how much outputs vary."""
    handed = merged.trunk(x)
    handed = handed if isinstance(handed, tuple) else (handed,)
    scale = (expected - expected.mean(0)).abs().max()
    return max(((head(*handed) - expected).abs().max() / scale).item() for head in merged.heads.values())


@pytest.mark.parametrize(("name", "refine", "end"), REFINED)
def test_a_copy_permuted_by_hand_merges_to_the_same_function(name, refine, end):
    case, x = CASES[name], CASES[name].example()
    network = trained(case, x)
    generator = torch.Generator().manual_seed(1)
    copies = [permuted_copy(case, network, random_orders(case, generator)) for _ in range(2 if refine is None else 1)]
    with torch.no_grad():
        expected = network(x)
        for other in copies:
            torch.testing.assert_close(other(x), expected, msg="the copy is none: mend the case")
    sources = {f"task {number}": source for number, source in enumerate([network, *copies])}
    stop_at = case.cut.module if end == "cut" else None
    settings = MergeSettings(stop_at, GreedyZip(alpha=1.0), refine, verify=False)
    assert error(merge_backbones(sources, [x], settings), expected, x) < (1e-3 if refine else 1e-9)
