from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_zipit import MergeReport
from lightning_zipit.graph import Block, FeatureSpace, Tap
from lightning_zipit.merging import SpaceMap
from lightning_zipit.report import Cost, SpaceReport, measure_cost, report_space


def report_of(labels, num_models, similarity=None, reader="fc"):
    """The report of one space, that is called "conv"."""
    tap = Tap("node", (1,), Block("conv", range(3)), reader) if reader else None
    space = FeatureSpace("conv", len(labels) // num_models, (), (), tap)
    return report_space(space, SpaceMap(torch.tensor(labels), num_models), similarity)


def similarity_of(pairs, size=6):
    """A similarity of 1 with itself, of what ``pairs`` say, and of -0.9 elsewhere."""
    similarity = torch.full((size, size), -0.9, dtype=torch.float64).fill_diagonal_(1)
    for (row, column), value in pairs.items():
        similarity[row, column] = similarity[column, row] = value
    return similarity


@pytest.fixture
def report():
    return MergeReport(
        spaces=(
            SpaceReport("stem.conv1", "layer1.0.conv1", 16, 16, 2, 14, 0.75),
            SpaceReport(
                "encoder.layers.encoder_layer_11.mlp.0", "encoder.layers.encoder_layer_11.mlp.3", 64, 96, 0, 64, 0.5
            ),
            SpaceReport("layer3.0.conv1", "", 32, 32, 0, 32, math.nan),
        ),
        sources={"animals": Cost(2_000_000, 300_000), "vehicles": Cost(3_000_000, 400_000)},
        merged=Cost(2_500_000, 350_000),
    )


def test_pairs_within_and_across_models_are_counted_apart():
    report = report_of([0, 0, 1, 1, 2, 2], 2, similarity_of({(0, 1): 0.9, (2, 3): 0.6, (4, 5): 0.3}))
    assert (report.name, report.tap, report.size) == ("conv", "fc", 3)
    assert (report.within, report.across) == (2, 1)
    assert report.similarity == pytest.approx(0.6)


def test_a_cluster_of_three_counts_once_with_its_three_pairs_and_one_of_one_not_at_all():
    similarity = similarity_of({(0, 5): 0.8, (1, 2): 0.5, (1, 3): 0.4, (2, 3): 0.1})
    report = report_of([0, 1, 1, 1, 2, 0], 2, similarity)
    assert (report.within, report.across) == (0, 2)
    assert report.similarity == pytest.approx((0.8 + 0.5 + 0.4 + 0.1) / 4)


def test_clusters_of_three_models():
    similarity = similarity_of({(0, 2): 0.9, (0, 4): 0.6, (2, 4): 0.6, (1, 3): 0.3})
    report = report_of([0, 1, 0, 1, 0, 2], 3, similarity)
    assert (report.size, report.within, report.across) == (2, 0, 2)
    assert report.similarity == pytest.approx(0.6)


def test_dead_pairs_have_similarity_zero():
    similarity = similarity_of({(0, 3): 0.8})
    similarity[[2, 5]] = similarity[:, [2, 5]] = 0
    assert report_of([0, 1, 2, 0, 3, 2], 2, similarity).similarity == pytest.approx(0.4)


def test_there_is_no_similarity_where_nothing_was_measured_or_matched():
    assert math.isnan(report_of([0, 1, 2, 0, 1, 2], 2).similarity)
    assert math.isnan(report_of([0, 1, 2, 3, 4, 5], 2, similarity_of({})).similarity)
    assert report_of([0, 1, 2, 0, 1, 2], 2, reader=None).tap == ""


def test_a_report_goes_through_plain_data_and_back(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert repr(MergeReport.from_dict(content)) == repr(report)  # NaN does not equal itself, but reads the same
    assert list(content) == ["spaces", "sources", "merged", "notes", "fits"]


def test_a_saved_report_loads_with_weights_only(report, tmp_path):
    torch.save(report.to_dict(), tmp_path / "report.pt")
    loaded = MergeReport.from_dict(torch.load(tmp_path / "report.pt", weights_only=True))
    assert repr(loaded) == repr(report)


def test_a_printed_report_names_every_space_and_its_reader(report):
    text = str(report)
    for space in report.spaces:
        (line,) = [line for line in text.splitlines() if space.name in line]
        assert space.tap in line
        assert str(space.across) in line
    assert "nan" not in text
    assert "merged 2.5 M FLOPs, 350 k parameters" in text
    assert "ensemble 5 M, 700 k" in text


def test_the_ensemble_costs_the_sum_of_its_sources(report):
    assert report.ensemble == Cost(5_000_000, 700_000)


@pytest.mark.parametrize("bias", [True, False])
def test_the_cost_of_a_convolution_and_of_a_linear_layer_is_known(bias):
    conv = nn.Conv2d(3, 8, kernel_size=(3, 5), padding=(1, 2), bias=bias)
    assert measure_cost(conv, torch.zeros(1, 3, 10, 12)) == Cost(2 * 8 * 3 * 3 * 5 * 10 * 12, 8 * 3 * 3 * 5 + 8 * bias)
    linear = nn.Linear(7, 5, bias=bias)
    assert measure_cost(linear, torch.zeros(1, 7)) == Cost(2 * 7 * 5, 7 * 5 + 5 * bias)


def test_the_cost_of_a_network_is_that_of_its_layers():
    layers = [nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)]
    costs = [measure_cost(layer, torch.zeros(1, layer.in_features)) for layer in layers[::2]]
    assert measure_cost(nn.Sequential(*layers), torch.zeros(1, 7)) == costs[0] + costs[1]


def test_measuring_the_cost_leaves_no_gradient():
    network = nn.Linear(7, 5)
    measure_cost(network, torch.zeros(1, 7))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network(torch.zeros(1, 7)).requires_grad
