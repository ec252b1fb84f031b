"""NaN and Inf never end up in a merged network, and never keep a merge from ending: the error says where they are."""

import pytest
import torch
from helpers.nets import SmallResNet, settle
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.errors import CalibrationError
from lightning_zipit.refine import LeastSquares
from lightning_zipit.refine.finite import check_results
from lightning_zipit.refine.normal_equations import NormalEquations

REFINEMENTS = ("batch_norm", "repair", "least_squares")


class TurnsBad:
    """Batches that hold NaN or Inf from the second pass on."""

    def __init__(self, batches, value):
        self.batches, self.value, self.passes = batches, value, 0

    def __iter__(self):
        self.passes += 1
        for x in self.batches:
            x = x.clone()
            if self.passes > 1:
                x[0] = self.value
            yield x


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return {task: settle(SmallResNet(), torch.randn(32, 3, 16, 16)) for task in "ab"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("refine", REFINEMENTS)
def test_nan_in_data_of_refinement_is_an_error(nets, refine, value):
    data = TurnsBad(torch.randn(16, 3, 16, 16).split(8), value)
    with pytest.raises(CalibrationError, match=r"NaN or Inf .*`trunk\.(conv1|bn1)`.*'a'.*'b'.*precision"):
        merge_backbones(nets, data, MergeSettings(refine=refine))


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_error_names_the_task_with_nan(nets, refine):
    """Each has a head of its own; one overflows on its own images, which are not calibrated on."""
    good, wild = torch.randn(16, 3, 16, 16), TurnsBad(torch.randn(16, 3, 16, 16).split(8), 1e30)
    with torch.no_grad():
        nets["b"].layer2[0].conv1.weight.mul_(1e30)
        nets["b"].layer2[0].bn1.running_var.mul_(1e30)
    settings = MergeSettings("layer1", refine=refine)
    with pytest.raises(CalibrationError) as caught:
        merge_backbones(nets, [good.split(8), wild], settings)
    assert "task 'b'" in str(caught.value) or "heads.b." in str(caught.value)
    assert "'a'" not in str(caught.value) and "heads.a." not in str(caught.value)


def test_overflow_in_the_merged_network_is_an_error():
    """Half precision holds what sources compute, and not what comes of weights that were fitted to it."""
    torch.manual_seed(0)
    nets = {
        task: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).half().eval()
        for task in "ab"
    }
    with torch.no_grad():
        for net in nets.values():
            net[0].weight.mul_(1e-3), net[0].bias.zero_(), net[2].weight.mul_(2e4)
            net[4].weight.fill_(3e4)
    x = torch.randn(32, 4).half()
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        merge_backbones(nets, [x * 30], MergeSettings(refine=LeastSquares(ridge=1e-9)))


def test_normal_equations_with_nan_are_an_error():
    equations = NormalEquations(1, 3, 2, torch.device("cpu"))
    x = torch.randn(1, 20, 3)
    x[0, 3, 1] = float("nan")
    equations.add(x, torch.randn(1, 20, 2))
    assert not equations.totals.isfinite().all()
    with pytest.raises(CalibrationError, match="no solution"):
        equations.centred().solve(torch.zeros(1, 2, 3), 1e-3)


def test_values_that_were_not_finite_before_refinement_are_ignored():
    module, refined = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for each in (module, refined):
        each.register_buffer("mask", torch.full((2,), float("-inf")))
    check_results({"trunk": module}, {"trunk": refined})
    refined.running_var[1] = float("nan")
    with pytest.raises(CalibrationError, match=r"`trunk\.running_var`"):
        check_results({"trunk": module}, {"trunk": refined})
