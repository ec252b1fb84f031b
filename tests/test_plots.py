"""Every plot is drawn; what is in it is looked up in matplotlib's objects."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from lightning_zipit import JointAccuracy, MergeReport, plots
from lightning_zipit import functional as F
from lightning_zipit._matching.measure import SpaceReport
from lightning_zipit._merging.cost import Cost
from lightning_zipit.errors import ConfigurationError

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture
def report():
    spaces = (
        SpaceReport("conv1", "conv2", 4, 4, 1, 2, 0.8, 0.5, 0.1),
        SpaceReport("pinned", "", 4, 4, 0, 4, math.nan),
        SpaceReport("conv2", "fc", 4, 8, 0, 4, 0.4, -0.2, 0.0),
    )
    return MergeReport(spaces, {"a": Cost(2, 1), "b": Cost(2, 1)}, Cost(3, 1))


def heights(ax, label):
    (bars,) = [bars for bars in ax.containers if bars.get_label() == label]
    return [bar.get_height() for bar in bars]


def lines(ax):
    return {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}


def test_a_similarity_is_drawn_in_the_order_of_its_clusters():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator)
    x[:, 4:7] = x[:, [2, 0, 0]] + 0.1 * torch.randn(50, 3, generator=generator)
    similarity = torch.corrcoef(x.T)
    labels = F.greedy_zip(similarity, 2, 4)
    fig, ax = plots.plot_similarity(similarity, labels, ["a", "b"])
    fig.canvas.draw()
    order, bounds = plots.cluster_order(similarity, labels, 2)
    assert sorted(order.tolist()) == list(range(8)) and bounds["alone"][1] == 8
    drawn = torch.as_tensor(ax.images[0].get_array())
    assert torch.equal(drawn, similarity[order][:, order])
    changes = (labels[order][1:] != labels[order][:-1]).sum()
    assert changes == 3  # the features of a cluster lie side by side
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2, 2)])
def test_plot_similarity_refuses_labels_of_wrong_length(labels):
    with pytest.raises(ValueError, match="labels"):
        plots.plot_similarity(torch.eye(4), labels, ["a", "b"])


def test_clusters_are_stacked_to_the_whole_of_every_space(report):
    fig, ax = plots.plot_clusters(report)
    fig.canvas.draw()
    assert heights(ax, "alone") == [0.25, 0, 0.5]
    assert [sum(parts) for parts in zip(*(heights(ax, kind) for kind in plots.KINDS), strict=True)] == [1, 1, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "pinned", "conv2"]


def test_similarity_by_depth_is_the_reports(report):
    fig, ax = plots.plot_depth(report)
    fig.canvas.draw()
    assert lines(ax)["mean"][::2] == [0.8, 0.4] and lines(ax)["lowest"][::2] == [0.5, -0.2]
    assert math.isnan(lines(ax)["mean"][1])


def test_accuracy_over_cost_joins_the_rows_of_one_name_and_marks_references():
    rows = [("zip", 2e6, 0.7), ("permute", 1e6, 0.5), ("zip", 1e6, 0.6)]
    fig, ax = plots.plot_tradeoff(rows, {"a": (1e6, 0.4), "ensemble": (2e6, 0.8)})
    fig.canvas.draw()
    assert lines(ax)["zip"] == [0.6, 0.7] and lines(ax)["permute"] == [0.5]
    assert {text.get_text() for text in ax.texts} == {"a", "ensemble"}


def test_the_agreement_of_a_permuted_network_is_a_clear_diagonal():
    generator = torch.Generator().manual_seed(0)
    features, order = torch.randn(20, 6, 3, 3, generator=generator), torch.randperm(6, generator=generator)
    agreement = F.agreement(features, features[:, order])
    assert torch.allclose(agreement[order, torch.arange(6)], torch.ones(6, dtype=torch.float64))
    targets = torch.argsort(order)
    for given in (None, targets):
        fig, ax = plots.plot_agreement(agreement, given)
        fig.canvas.draw()
        assert torch.as_tensor(ax.images[0].get_array()).diagonal().min() > 0.99


def test_agreement_refuses_different_samples():
    with pytest.raises(ValueError, match="samples"):
        F.agreement(torch.zeros(3, 2), torch.zeros(4, 2))


def test_plots_use_given_axes(report):
    fig, (left, right) = plt.subplots(1, 2)
    assert plots.plot_clusters(report, left) == (fig, left)
    assert plots.plot_agreement(torch.eye(3), ax=right) == (fig, right)


def test_accuracies_are_drawn():
    metric = JointAccuracy({"a": [0, 1], "b": [2, 3]})
    metric.update({"a": torch.eye(2), "b": torch.zeros(2, 2)}, torch.tensor([0, 1]))
    fig, ax = metric.plot()
    fig.canvas.draw()
    assert set(lines(ax)) >= {"joint", "a", "b", "mean"}


def test_without_matplotlib_the_error_names_the_extra(report, monkeypatch):
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"lightning-zipit\[plots\]"):
        plots.plot_clusters(report)
