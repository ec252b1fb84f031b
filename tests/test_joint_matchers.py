"""Matchers of users that look at all spaces and at weights, and answers that cannot be used."""

import pytest
import torch
from architectures import relative_error
from helpers.nets import HandWrittenViT, PlainNet, SmallResNet, settle

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit import functional as F
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.matchers import GreedyZip, Match, Matcher, Permute, WeightMatching
from lightning_zipit.paths import AllHeads


class OnePass(Matcher):
    """Matches each space by its weights, in the order of those that are matched already."""

    joint = True
    needs_data = False

    def __call__(self, similarity, num_models):
        return F.permute(similarity, num_models)

    def match(self, spaces):
        labels, found = {}, {}
        for family in spaces.families:
            rows = {name: spaces.weights(name, labels) for name in family}
            cosines = {name: None if each is None else F.correlation(each @ each.T) for name, each in rows.items()}
            found |= spaces.match_family(family, self, cosines)
            labels |= {name: found[name].features for name in family}
        return found


def images(size=16):
    return torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(0))


def merged_copies(make, matcher, **how):
    """A merge of a network with a permuted copy of itself."""
    torch.manual_seed(0)
    net = settle(make(), images())
    graph = trace(net, example_input=images()[:1])
    permuted = permute_spaces(net, graph, random_permutations(graph))
    merged = merge_backbones({"a": net, "b": permuted}, [images()], MergeSettings(matcher=matcher, refine=None, **how))
    return merged, net


@torch.no_grad()
def test_a_joint_matcher_of_a_user_finds_a_permuted_copy_by_its_weights():
    merged, net = merged_copies(PlainNet, OnePass())
    assert relative_error(AllHeads(merged.trunk, merged.heads)(images()), net(images())) < 1e-3
    assert all(space.samples == 0 for space in merged.report.spaces)  # it needs no data


class Watching(Matcher):
    """Notes what it is given, and matches each family by itself."""

    def __init__(self, joint):
        self.calls, self.joint = [], joint

    def __call__(self, similarity, num_models):
        return F.permute(similarity, num_models)

    def match(self, spaces):
        self.calls.append([list(family) for family in spaces.families])
        for name, space in spaces.items():
            known = spaces.similarity(name)
            assert (known is None) == (space.tap is None)
            assert known is None or known.shape == (2 * space.size, 2 * space.size)
            assert spaces.width(name) == space.size and spaces.num_models == 2
        return super().match(spaces)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("make", [SmallResNet, HandWrittenViT])
def test_only_joint_matchers_get_all_spaces_at_once(make, joint):
    watching = Watching(joint)
    merged, _ = merged_copies(make, watching)
    expected, _ = merged_copies(make, Permute())
    assert all(map(torch.equal, merged.trunk.state_dict().values(), expected.trunk.state_dict().values()))
    assert [repr(space) for space in merged.report.spaces] == [repr(space) for space in expected.report.spaces]
    given = [family for call in watching.calls for family in call]
    assert sorted(name for family in given for name in family) == sorted(space.name for space in merged.report.spaces)
    assert (len(watching.calls) == 1) == joint
    assert joint or all(len(call) == 1 for call in watching.calls)


class Answer(Matcher):
    """Permutes, but for the answers that a test changes."""

    joint = True

    def __init__(self, change):
        self.change = change

    def __call__(self, similarity, num_models):
        return F.permute(similarity, num_models)

    def match(self, spaces):
        found = dict(super().match(spaces))
        self.change(found, spaces)
        return found


def drop(found, spaces):
    del found[next(iter(spaces))]


def shorten(found, spaces):
    name = next(iter(spaces))
    found[name] = Match(found[name].features[1:])


def leave_out(found, spaces):
    name = next(iter(spaces))
    found[name] = Match(found[name].features.clamp(max=spaces[name].size - 2))


def break_units(found, spaces):
    name = next(name for name, space in spaces.items() if space.units)
    found[name] = Match(found[name].features.roll(1))


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (PlainNet, drop, "no matching for the spaces"),
        (PlainNet, shorten, r"int64 of shape"),
        (PlainNet, leave_out, "every number from 0 to"),
        (HandWrittenViT, break_units, "its own unit was matched"),
    ],
)
def test_invalid_matching_is_refused_with_the_space_name(make, change, message):
    with pytest.raises(ConfigurationError, match=message):
        merged_copies(make, Answer(change))


class Few(Matcher):
    """Leaves fewer features than one model has."""

    def __call__(self, similarity, num_models):
        return torch.arange(len(similarity)) % 3


def test_matching_with_too_few_features_is_refused():
    with pytest.raises(ConfigurationError, match=r"Few.*every number from 0 to"):
        merged_copies(PlainNet, Few())


@pytest.mark.parametrize(
    ("matcher", "traits"),
    [
        (Permute(), {"any_width": False, "joint": False, "needs_data": True}),
        (GreedyZip(), {"any_width": True, "joint": False, "needs_data": True}),
        (WeightMatching(matcher=GreedyZip()), {"any_width": True, "joint": True, "needs_data": False}),
        (OnePass(), {"any_width": False, "joint": True, "needs_data": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_traits_of_a_matcher_are_its_attributes(matcher, traits):
    assert {name: getattr(matcher, name) for name in traits} == traits
