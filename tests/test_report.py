from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import nn

from lightning_zipit import MergeReport
from lightning_zipit import functional as F
from lightning_zipit._calibration.statistics import Moments
from lightning_zipit._lightning.announce import log_report
from lightning_zipit._matching.maps import SpaceMap
from lightning_zipit._matching.measure import Sampled, SpaceReport, measure_space
from lightning_zipit._merging.cost import Cost, measure_cost
from lightning_zipit.errors import CheckpointError
from lightning_zipit.graph import Block, FeatureSpace, Tap
from lightning_zipit.refine import NormShift
from lightning_zipit.refine.batch_norm import measure_shifts, statistics_of


def report_of(labels, num_models, similarity=None, reader="fc"):
    """The report of one space, that is called "conv"."""
    tap = Tap("node", (1,), Block("conv", range(3)), reader) if reader else None
    space = FeatureSpace("conv", len(labels) // num_models, (), (), tap)
    return measure_space(space, SpaceMap(torch.tensor(labels), num_models), similarity)


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
            SpaceReport("stem.conv1", "layer1.0.conv1", 16, 16, 2, 13, 0.75, -0.25, 0.2, 0.1, (0.1, 0.3), 640, (0, 5)),
            SpaceReport(
                "encoder.layers.encoder_layer_11.mlp.0", "encoder.layers.encoder_layer_11.mlp.3", 64, 96, 0, 64, 0.5
            ),
            SpaceReport("layer3.0.conv1", "", 32, 32, 0, 32, math.nan),
        ),
        sources={"animals": Cost(2_000_000, 300_000), "vehicles": Cost(3_000_000, 400_000)},
        merged=Cost(2_500_000, 350_000),
        shifts={"trunk.bn1": NormShift(0.5, 0.25), "heads.animals.bn": NormShift(0.1, 0.75)},
    )


def test_pairs_within_and_across_models_are_counted_apart():
    report = report_of([0, 0, 1, 1, 2, 2], 2, similarity_of({(0, 1): 0.9, (2, 3): 0.6, (4, 5): 0.3}))
    assert (report.name, report.tap, report.size) == ("conv", "fc", 3)
    assert (report.within, report.across, report.alone) == (2, 1, 0)
    assert (report.similarity, report.lowest) == (pytest.approx(0.6), 0.3)


def test_a_cluster_of_three_counts_once_with_its_three_pairs_and_one_of_one_not_at_all():
    similarity = similarity_of({(0, 5): 0.8, (1, 2): 0.5, (1, 3): 0.4, (2, 3): 0.1})
    report = report_of([0, 1, 1, 1, 2, 0], 2, similarity)
    assert (report.within, report.across, report.alone) == (0, 2, 1)
    assert report.similarity == pytest.approx((0.8 + 0.5 + 0.4 + 0.1) / 4)
    assert report.lowest == pytest.approx(0.1)


def test_clusters_of_three_models():
    similarity = similarity_of({(0, 2): 0.9, (0, 4): 0.6, (2, 4): 0.6, (1, 3): 0.3})
    report = report_of([0, 1, 0, 1, 0, 2], 3, similarity)
    assert (report.size, report.within, report.across) == (2, 0, 2)
    assert report.similarity == pytest.approx(0.6)


def test_dead_pairs_have_similarity_zero():
    similarity = similarity_of({(0, 3): 0.8})
    similarity[[2, 5]] = similarity[:, [2, 5]] = 0
    assert report_of([0, 1, 2, 0, 3, 2], 2, similarity).similarity == pytest.approx(0.4)


def test_similarity_is_nan_without_measurement_or_pairs():
    assert math.isnan(report_of([0, 1, 2, 0, 1, 2], 2).similarity)
    assert math.isnan(report_of([0, 1, 2, 3, 4, 5], 2, similarity_of({})).similarity)
    assert report_of([0, 1, 2, 0, 1, 2], 2, reader=None).tap == ""


def test_report_round_trip_through_dict(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert repr(MergeReport.from_dict(content)) == repr(report)  # NaN does not equal itself, but reads the same
    assert list(content) == ["spaces", "sources", "merged", "notes", "fits", "shifts", "models"]


def test_a_report_of_an_older_checkpoint_is_read(report):
    content = report.to_dict()
    del content["shifts"]
    content["spaces"] = [
        {name: space[name] for name in ("name", "tap", "size", "width", "within", "across", "similarity")}
        for space in content["spaces"]
    ]
    old = MergeReport.from_dict(content)
    assert old.spaces[0].alone == 1 and math.isnan(old.spaces[0].lowest) and old.shifts == {}
    assert "stem.conv1" in str(old) and "stem.conv1" in old.to_csv()


def test_report_round_trip_through_json_file(report, tmp_path):
    report.save(tmp_path / "report.json")

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert repr(MergeReport.load(tmp_path / "report.json")) == repr(report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"spaces": [{"name": "conv"}], "sources": {}, "merged": {}}'])
def test_load_refuses_a_file_that_is_not_a_report(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"other\.json"):
        MergeReport.load(tmp_path / "other.json")


def test_a_report_as_csv_has_a_row_per_space_and_a_column_per_model(report):
    rows = list(csv.DictReader(report.to_csv().splitlines()))
    assert [row["name"] for row in rows] == [space.name for space in report.spaces]
    assert (rows[0]["alone"], rows[0]["losses/vehicles"], rows[0]["dead/vehicles"]) == ("1", "0.3", "5")
    assert rows[2]["similarity"] == rows[2]["losses/animals"] == ""


def test_loggers_get_finite_numbers_and_the_spaces_as_a_table_or_as_text(report):
    class WithTable:
        def log_metrics(self, metrics, step):
            self.metrics = metrics

        def log_table(self, key, columns, data, step):
            self.table = [dict(zip(columns, row, strict=True)) for row in data]

    class WithText(WithTable):
        log_table = property()  # as if there were none
        texts = ()
        experiment = property(lambda self: self)

        def add_text(self, tag, text, step):
            self.texts += (text,)

    table, text = WithTable(), WithText()
    for logger in (table, text):
        log_report(logger, report)
        assert all(map(math.isfinite, logger.metrics.values()))
        assert logger.metrics["zipit/flops"] == 2_500_000 and logger.metrics["zipit/variance_ratio"] == 0.5
    assert [row["name"] for row in table.table] == [space.name for space in report.spaces]
    assert "stem.conv1" in text.texts[0]


def test_losses_of_models_are_what_clusters_lose_of_their_features_and_add_up():
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3:9] += 2 * x[:, :1]
    similarity = torch.corrcoef(x.T)
    labels = F.greedy_zip(similarity, 3, 5)
    features = (x - x.mean(0)) / x.std(0)
    means = torch.stack([features[:, labels == cluster].mean(1) for cluster in range(5)], 1)
    lost = (features - means[:, labels]).var(0).view(3, 4).mean(1)
    losses = F.zip_losses(similarity, labels, 3)
    assert torch.allclose(losses, lost)
    assert float(losses.mean()) == pytest.approx(F.zip_loss(similarity, labels))


def test_chance_is_the_mean_over_random_deals_of_each_models_features():
    x = torch.randn(60, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :3] += 2 * x[:, 9:]
    similarity = torch.corrcoef(x.T)
    labels = torch.tensor([0, 0, 1, 2, 3, 0, 1, 2, 4, 3])
    together = (labels[:, None] == labels).fill_diagonal_(False)
    generator, deals = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        order = torch.cat([torch.randperm(5, generator=generator) + start for start in (0, 5)])
        deals.append(similarity[order][:, order][together].mean())
    mean, deviation = F.by_chance(similarity, labels, 2)
    assert mean == pytest.approx(float(torch.stack(deals).mean()), abs=0.01)
    assert deviation == pytest.approx(float(torch.stack(deals).std()), rel=0.5)


def test_a_covariance_is_reported_as_a_correlation():
    correlation = similarity_of({(0, 3): 0.8, (1, 4): 0.6, (2, 5): 0.1})
    scale = torch.arange(1.0, 7)
    plain, scaled = (
        report_of([0, 1, 2, 0, 1, 2], 2, known) for known in (correlation, correlation * scale * scale[:, None])
    )
    assert plain.similarity == pytest.approx(scaled.similarity) == pytest.approx(0.5)
    assert plain.losses == pytest.approx(scaled.losses)


def test_constant_features_are_counted_for_each_model():
    covariance = torch.diag(torch.tensor([1.0, 0, 2, 0, 0, 3]))
    assert Sampled.of(Moments(7, torch.zeros(6), covariance), 2) == Sampled(7, (1, 2))


def test_a_shift_of_batch_norm_is_measured_in_deviations_and_as_a_ratio():
    before, after = nn.BatchNorm1d(2, eps=0), nn.BatchNorm1d(2, eps=0)
    before.running_var.copy_(torch.tensor([4.0, 1.0]))
    after.running_mean.copy_(torch.tensor([1.0, -1.5]))
    after.running_var.copy_(torch.tensor([1.0, 1.0]))
    shifts = measure_shifts(*(statistics_of({"trunk": nn.Sequential(norm)}) for norm in (before, after)))
    assert list(shifts) == ["trunk.0"]
    assert (shifts["trunk.0"].mean, shifts["trunk.0"].variance) == (pytest.approx(1.0), pytest.approx(0.5))


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
    sentences = " ".join(text.split())
    assert "by at most 0.50 (`trunk.bn1`)" in sentences and "at least 0.25 times (`trunk.bn1`)" in sentences
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
