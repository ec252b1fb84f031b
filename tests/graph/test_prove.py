"""The proof finds wrong rules in trunk and heads, in small spaces, and in any dtype."""

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, register_rule, trace
from lightning_zipit._common.calls import Call
from lightning_zipit.errors import VerificationError
from lightning_zipit.graph.prove import cycle, find_failing, random_permutations


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 33])
def test_a_cycle_has_no_fixed_point(size):
    for seed in range(20):
        permutation = cycle(size, torch.Generator().manual_seed(seed))
        assert sorted(permutation.tolist()) == list(range(size))
        assert (permutation != torch.arange(size)).all()


def _generated(generators):
    """Return the group that some permutations generate, by brute force."""
    found, new = set(), {tuple(range(len(generators[0])))}
    while new:
        found |= new
        new = {tuple(g[i] for i in p) for p in new for g in generators} - found
    return found


@pytest.mark.parametrize(("size", "count"), [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)])
def test_the_two_permutations_of_a_proof_generate_all_permutations(size, count):
    for seed in range(5):
        pair = [cycle(size, torch.Generator().manual_seed(seed), second).tolist() for second in (False, True)]
        assert len(_generated(pair)) == count


def test_permutations_of_heads_and_their_features_have_no_fixed_point():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    graph = trace(nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)), example_input=torch.randn(2, 5, 3))
    for second in (False, True):
        for name, permutation in random_permutations(graph, torch.Generator().manual_seed(0), second).items():
            assert graph.spaces[name].size > 1 and (permutation != torch.arange(len(permutation))).all()


def takes_for_positions(name):
    """Wrong rule, which records a parameter of features as positional."""

    def rule(ctx, module, x):
        ctx.positional(ctx.parameter(name))
        return x

    return rule


class PerGroup(nn.Module):
    """Multiplies each group of channels by a factor."""

    def __init__(self, channels, groups):
        super().__init__()
        self.groups, self.factor = groups, nn.Parameter(torch.rand(groups) + 0.5)

    def forward(self, x):
        return x * self.factor.repeat_interleave(x.shape[1] // self.groups)[:, None, None]


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_proof_finds_a_rule_that_ignores_a_factor_per_group(groups):
    register_rule(PerGroup, takes_for_positions("factor"))
    channels = 2 * groups
    net = nn.Sequential(
        *(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 1, groups=groups), PerGroup(channels, groups)),
        *(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )
    x = torch.randn(4, 3, 8, 8)
    assert find_failing({"": net.eval()}, {"": trace(net, example_input=x)}, {"": Call.of(x)})
    with pytest.raises(VerificationError, match="1 groups"):
        trace(net, verify=x)


class Roll(nn.Module):
    def forward(self, x):
        return x.roll(1, 1)


@pytest.mark.parametrize("size", [3, 4, 6])
def test_proof_finds_a_rule_that_ignores_a_cyclic_shift(size):
    register_rule(Roll, lambda ctx, module, x: x)
    net = nn.Sequential(nn.Linear(5, size), Roll(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
    with pytest.raises(VerificationError):
        trace(net, verify=torch.randn(4, 5))


class Ordered(nn.Module):
    """Adds to each feature its index."""

    def forward(self, x):
        return x + torch.arange(x.shape[-1])


def test_head_with_a_wrong_rule_unmerges_its_input():
    register_rule(Ordered, lambda ctx, module, x: x)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Ordered(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    assert trace(net, "1", example_input=torch.randn(4, 5)).crossings[0].absorbed
    graph = trace(net, "1", verify=torch.randn(4, 5))
    assert not graph.crossings[0].absorbed and any("a head" in why for why in graph.barriers.values())
    other = nn.Sequential(
        *(type(each)(each.in_features, each.out_features) if isinstance(each, nn.Linear) else each for each in net)
    )
    with torch.no_grad():  # the same function, with the features that pass into the head in another order
        other.load_state_dict(net.state_dict())
        order = torch.tensor([3, 0, 4, 1, 5, 2])
        other[0].weight.copy_(net[0].weight[order]), other[0].bias.copy_(net[0].bias[order])
    x = torch.randn(64, 5)
    merged = merge_backbones({"a": net, "b": net}, [x], MergeSettings(stop_at="1", refine=None))
    for head in merged.heads.values():
        torch.testing.assert_close(head(*merged.trunk(x)), net(x))
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(stop_at="1", refine=None))
    for task, network in {"a": net, "b": other}.items():
        torch.testing.assert_close(merged.heads[task](*merged.trunk(x)), network(x))


class ClampByParameter(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.low, self.mid, self.last = (
            nn.Linear(6, 8),
            nn.Parameter(torch.rand(8)),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        self.act, self.how = nn.ReLU(), how

    def forward(self, x):
        x = self.act(self.first(x))
        x = torch.clamp(x, min=self.low) if self.how == "clamp" else (x + 0.1) ** self.low
        return self.last(self.mid(x).relu())


@pytest.mark.parametrize("how", ["clamp", "power"])
@torch.no_grad()
def test_a_head_with_a_parameter_for_each_feature_is_right(how):
    net = ClampByParameter(how)
    other = ClampByParameter(how)
    other.load_state_dict(net.state_dict())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    for tensor in (other.first.weight, other.first.bias, other.low):
        tensor.copy_(tensor[order].clone())
    other.mid.weight.copy_(net.mid.weight[:, order])
    x = torch.randn(256, 6)
    torch.testing.assert_close(other(x), net(x))
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(stop_at="act", refine=None))
    for head in merged.heads.values():
        torch.testing.assert_close(head(*merged.trunk(x)), net(x), rtol=1e-4, atol=1e-5)


class Casts(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.a, self.b, self.out, self.wrong = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), wrong
        self.mix = PerGroupOfFeatures() if wrong else nn.Identity()

    def forward(self, x):
        return self.out(self.b(self.mix(self.a(x).relu().float())).relu())


class PerGroupOfFeatures(nn.Module):
    def forward(self, x):
        return x * torch.arange(1, x.shape[-1] + 1)


def test_a_network_that_casts_to_single_precision_is_proved_in_it():
    x = torch.randn(4, 6)
    assert not trace(Casts(wrong=False), verify=x).barriers
    register_rule(PerGroupOfFeatures, lambda ctx, module, x: x)
    with pytest.raises(VerificationError):
        trace(Casts(wrong=True), verify=x)


def test_proof_covers_parameters_with_equal_entries():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    register_rule(Scaled, takes_for_positions("scale"))
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Scaled(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(net)
    assert find_failing({"": net}, {"": graph}, {"": Call.of(torch.randn(4, 5))})


def test_a_head_of_any_task_is_proved():
    class Reversed(nn.Module):
        def forward(self, x):
            return x.flip(-1)

    register_rule(Reversed, lambda ctx, module, x: x)

    def net(middle):
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), middle, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()

    nets, x = {"a": net(nn.Identity()), "b": net(Reversed())}, torch.randn(64, 5)
    merged = merge_backbones(nets, [x], MergeSettings(stop_at="1", refine=None))
    assert not merged.graphs["b"].crossings[0].absorbed
