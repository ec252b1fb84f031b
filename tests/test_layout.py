"""Images whose channels come last: the same statistics and merges, for networks that take them."""

import pytest
import torch
from helpers.nets import SmallResNet
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._calibration.layout import Layout, channels_last, prefer_channels_last
from lightning_zipit._common.calls import Call

IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Viewing(nn.Module):
    """A network whose features before the linear layer are a view that only contiguous images have."""

    def __init__(self, flatten):
        super().__init__()
        self.conv1, self.conv2, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 144, 5)
        self.flatten = flatten

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.linear(x.flatten(1) if self.flatten else x.view(-1, 8 * 144))


def is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("positions", [None, 9])
def test_statistics_do_not_depend_on_the_layout(positions):
    networks = {task: SmallResNet().eval() for task in "ab"}
    graph, found = trace(networks["a"]), []
    for images in (IMAGES, channels_last(IMAGES)):
        calibration = Calibration(graph, networks, positions=positions)
        with torch.no_grad():
            for x in images.split(7):
                calibration.update(Call.of(x))
        found.append({space: calibration.take(space) for space in graph.spaces})
    for name, moments in found[0].items():
        if moments is not None:
            assert found[1][name].count == moments.count
            torch.testing.assert_close(found[1][name].covariance, moments.covariance, rtol=1e-4, atol=1e-5)


def test_channels_last_is_used_where_it_is_faster_and_equal():
    layout = Layout()
    laid_out = layout(Call.of(IMAGES), {"a": Viewing(flatten=True)})
    assert is_last(laid_out.tensors[0]) and torch.equal(laid_out.tensors[0], IMAGES)
    views = {"a": Call.of(IMAGES), "b": Call.of(IMAGES.mean(1, keepdim=True).expand(-1, 3, -1, -1))}
    laid_out = Layout()(views, {task: Viewing(flatten=True) for task in "ab"}).values()
    assert all(is_last(view.tensors[0]) for view in laid_out)


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (Viewing(flatten=False), IMAGES),
        (nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=4)), IMAGES),
        (nn.Sequential(nn.Conv2d(3, 8, 3)).double(), IMAGES.double()),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), IMAGES),
        (nn.Conv1d(3, 4, 3), IMAGES.flatten(2)),
    ],
    ids=["views", "groups", "double", "no convolutions", "no images"],
)
def test_other_inputs_keep_their_layout(network, x):
    call = Call.of(x)
    assert Layout()(call, {"a": network}) is call


@pytest.mark.parametrize("refine", [None, "batch_norm", "least_squares", "repair"])
def test_network_that_needs_contiguous_images_merges_equally(refine):
    twins = []
    for flatten in (True, False):
        torch.manual_seed(0)
        networks = {task: Viewing(flatten).eval() for task in "ab"}
        merged = merge_backbones(networks, IMAGES.split(10), MergeSettings(refine=refine))
        twins.append(merged.heads["b"](*merged.trunk(IMAGES)))
    torch.testing.assert_close(*twins, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "x", [torch.zeros_like(IMAGES), IMAGES * float("nan"), IMAGES * 1e30], ids=["0", "NaN", "large"]
)
def test_layout_does_not_depend_on_the_values_of_a_batch(x):
    assert prefer_channels_last(Call.of(x), {"a": Viewing(flatten=True)})
    assert not prefer_channels_last(Call.of(x), {"a": Viewing(flatten=False)})
