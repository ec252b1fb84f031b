"""The line between two networks of one task."""

import pytest
import torch
from architectures import relative_error
from helpers.nets import PlainNet, SmallResNet, settle

from lightning_zipit import MergeSettings, interpolate, trace
from lightning_zipit import functional as F
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations

X = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_between_a_network_and_its_permuted_copy_there_is_no_barrier():
    net = settle(SmallResNet(), X)
    graph = trace(net, merge_heads=True)
    other = permute_spaces(net, graph, random_permutations(graph, torch.Generator().manual_seed(0)))
    for network in interpolate([net, other], [X], [0.3, 0.5]):
        assert isinstance(network, SmallResNet) and relative_error({"": network.eval()(X)}, net(X)) < 1e-3


@torch.no_grad()
def test_the_line_is_straight_and_ends_at_the_two_networks():
    nets = [PlainNet().eval(), PlainNet().eval()]
    start, point, end = interpolate(nets, [X], [0, 0.2, 1])
    for network, net in ((start, nets[0]), (end, nets[1])):
        assert relative_error({"": network(X)}, net(X)) < 1e-4
    for name, tensor in point.state_dict().items():
        torch.testing.assert_close(tensor, torch.lerp(start.state_dict()[name], end.state_dict()[name], 0.2))


def test_the_barrier_is_the_highest_loss_less_the_mean_of_the_ends():
    assert F.loss_barrier([1.0, 5.0, 4.0, 2.0]) == 3.5
    assert F.loss_barrier([1.0, 2.0]) == 0.5
    with pytest.raises(ValueError, match="`losses`"):
        F.loss_barrier([1.0])


@pytest.mark.parametrize(
    ("count", "shares", "settings", "message"),
    [
        (3, [0.5], None, "two networks, got 3"),
        (2, [0.5, 1.5], None, r"between 0 and 1, got \[1.5\]"),
        (2, [0.5], MergeSettings(stop_at="features.0"), "merges whole"),
    ],
)
def test_interpolation_refuses_bad_arguments(count, shares, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        list(interpolate([PlainNet() for _ in range(count)], [X], shares, settings))
