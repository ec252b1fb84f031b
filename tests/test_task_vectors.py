"""Models that were trained from one checkpoint, merged by what training changed."""

import copy

import pytest
import torch
from helpers.nets import Lit, SmallResNet, images, trainer
from torch import nn

from lightning_zipit import MergeSettings, ZipIt, merge_backbones
from lightning_zipit import functional as F
from lightning_zipit.errors import ArchitectureMismatchError, ConfigurationError
from lightning_zipit.matchers import Average, GreedyZip
from lightning_zipit.task_vectors import Dare, TaskArithmetic, Ties, combine_into

DATA = [torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))]


def fine_tuned(base, seed, amount=0.05):
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return tuned.eval()


def plain_ties(vectors, density):
    """TIES, entry by entry."""
    size = vectors.shape[1]
    keep = -(-density * size // 1)
    trimmed = [
        [value if sorted(map(abs, row), reverse=True).index(abs(value)) < keep else 0.0 for value in row]
        for row in vectors.tolist()
    ]
    merged = []
    for values in zip(*trimmed, strict=True):
        positive = sum(values) > 0
        agreeing = [value for value in values if value and (value > 0) == positive]
        merged.append(sum(agreeing) / len(agreeing) if agreeing and sum(values) else 0.0)
    return torch.tensor(merged)


@pytest.mark.parametrize("density", [0.1, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("models", [1, 2, 5])
def test_ties_is_its_definition(models, density):
    vectors = torch.randn(models, 40, generator=torch.Generator().manual_seed(models))
    torch.testing.assert_close(F.ties(vectors, density), plain_ties(vectors, density))


def test_all_changes_of_one_model_are_that_model():
    vectors = torch.randn(1, 30)
    for how in (TaskArithmetic(1.0), Ties(1.0), Dare(0.0, TaskArithmetic(1.0))):
        torch.testing.assert_close(how(vectors), vectors[0])


def test_what_is_dropped_is_made_up_for_on_average():
    vectors = torch.ones(2, 100_000)
    changed = Dare(0.9, TaskArithmetic(0.5))(vectors)
    assert changed.mean() == pytest.approx(1, abs=0.02)
    assert (changed == 0).float().mean() == pytest.approx(0.81, abs=0.01)
    torch.testing.assert_close(changed, Dare(0.9, TaskArithmetic(0.5))(vectors))


def test_half_of_the_sum_of_two_changes_is_the_average():
    base = SmallResNet().eval()
    nets = {name: fine_tuned(base, seed) for seed, name in enumerate("ab")}
    averaged = merge_backbones(nets, DATA, MergeSettings(matcher=Average()))
    settings = MergeSettings(matcher=Average(), combine=TaskArithmetic(0.5))
    combined = merge_backbones(nets, DATA, settings, base)
    for name, tensor in combined.trunk.state_dict().items():
        torch.testing.assert_close(tensor, averaged.trunk.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_was_not_trained_adds_nothing():
    base = SmallResNet().eval()
    tuned = fine_tuned(base, 1)
    settings = MergeSettings(matcher=Average(), combine=TaskArithmetic(1.0), refine=None)
    merged = merge_backbones({"a": tuned, "b": copy.deepcopy(base)}, DATA, settings, base)
    with torch.no_grad():
        torch.testing.assert_close(merged.heads["a"](*merged.trunk(DATA[0])), tuned(DATA[0]), rtol=1e-4, atol=1e-4)


def test_the_driver_takes_a_base_with_another_head():
    base = Lit(9)
    models = {}
    for seed, name in enumerate("ab"):
        models[name] = Lit(5)
        states = {key: value for key, value in base.state_dict().items() if "linear" not in key}
        models[name].load_state_dict(states, strict=False)
        models[name].net = fine_tuned(models[name].net, seed)
    merged = ZipIt(trainer()).merge(models, images(), backbone="net", base=base, combine=Ties())
    assert merged(DATA[0])["b"].shape == (32, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": Ties(), "matcher": GreedyZip()}, "Use matcher=Average"),
        ({"combine": "ties", "matcher": Average()}, "must be an instance of Combination, such as Ties"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        MergeSettings(**arguments)


def test_base_and_combination_need_each_other():
    base = SmallResNet()
    nets = {"a": fine_tuned(base, 0), "b": fine_tuned(base, 1)}
    with pytest.raises(ConfigurationError, match=r"but got combine=None and a base\. Give both or neither"):
        merge_backbones(nets, DATA, MergeSettings(), base)
    with pytest.raises(ConfigurationError, match="and no base"):
        merge_backbones(nets, DATA, MergeSettings(matcher=Average(), combine=Ties()))


def test_a_base_of_another_architecture_is_refused():
    target, source = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ArchitectureMismatchError, match=r"`0.weight` has shape \(4, 3\).*has it in shape \(5, 3\)"):
        combine_into(target, [source, source], nn.Sequential(nn.Linear(3, 5)), Ties())
    with pytest.raises(ArchitectureMismatchError, match="does not have it"):
        combine_into(target, [source, source], nn.Sequential(), Ties())


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: Ties(0.0), "`density`"), (lambda: Ties(1.1), "`density`"), (lambda: Dare(1.0), "`drop`")],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
