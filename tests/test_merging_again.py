"""Merged modules as sources of a merge."""

import copy

import pytest
import torch
from architectures import relative_error
from helpers.nets import Lit, LitWhole, images, settle, trainer

from lightning_zipit import MultiHeadModule, ZipIt
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average, Permute
from lightning_zipit.refine import BatchNorm, LeastSquares

X = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(5))
MERGE = {"backbone": "net", "stop_at": "layer1", "matcher": Permute(), "refine": None}


def models(names, model_class=Lit):
    made = {name: model_class(3 + number) for number, name in enumerate(names)}
    for model in made.values():
        settle(model.net if model_class is Lit else model, X)
    return made


def merge(sources, **arguments):
    return ZipIt(trainer()).merge(sources, images(), **(MERGE | arguments)).eval()


@pytest.fixture(scope="module")
def abcd():
    torch.manual_seed(0)
    made = models("abcd")
    return made, merge({name: made[name] for name in "ab"}), merge({name: made[name] for name in "cd"})


@torch.no_grad()
@pytest.mark.parametrize(("stop_at", "indexed"), [(None, False), ("layer1.0.bn1", True)])
def test_with_all_the_weight_a_merged_module_keeps_its_functions(stop_at, indexed):
    made = models("abcd")
    pairs = {names: merge({name: made[name] for name in names}, stop_at=stop_at) for names in ("ab", "cd")}
    assert hasattr(pairs["cd"].heads["c"], "unmerge") == indexed  # else weights read the merged features
    states = {names: copy.deepcopy(pair.state_dict()) for names, pair in pairs.items()}
    again = merge(pairs, stop_at=stop_at, weights={"ab": 0, "cd": 1})
    assert again.tasks == ["a", "b", "c", "d"]
    assert all(relative_error({task: again(X)[task]}, output) < 1e-4 for task, output in pairs["cd"](X).items())
    for names, pair in pairs.items():
        assert all(torch.equal(tensor, states[names][name]) for name, tensor in pair.state_dict().items())


@torch.no_grad()
def test_three_models_one_after_the_other_average_as_at_once(abcd):
    made, *_ = abcd
    how = {"matcher": Average()}
    at_once = merge({name: made[name] for name in "abc"}, **how)
    pair = merge({name: made[name] for name in "ab"}, **how)
    later = merge({"ab": pair, "c": made["c"]}, **how)  # counts by its tasks, two to one
    for name, tensor in at_once.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], tensor, msg=name)
    assert any("ab 2, c 1" in note for note in later.report.notes)
    assert {"losses/ab", "losses/c"} < set(later.report.to_rows()[0])
    assert type(later.report).from_dict(later.report.to_dict()) == later.report


@torch.no_grad()
def test_the_result_is_tested_saved_read_and_merged_again(abcd, tmp_path):
    _, ab, cd = abcd
    run = trainer()
    loaders = [images(seed=seed, classes=3) for seed in range(4)]
    again = ZipIt(run).merge({"ab": ab, "cd": cd}, loaders, **(MERGE | {"refine": "batch_norm"})).eval()
    keys = {key for result in run.test(again, loaders, verbose=False) for key in result}
    assert keys == {f"{task}/{name}" for task in "abcd" for name in ("test_acc", "test_loss")}
    run.save_checkpoint(tmp_path / "abcd.ckpt")
    read = MultiHeadModule.load_from_checkpoint(tmp_path / "abcd.ckpt")
    assert all(torch.equal(output, again(X)[task]) for task, output in read(X).items())
    third = merge({"abcd": read, "e": models("e")["e"]})
    assert third.tasks == [*"abcde"] and third.report.merged.flops < third.report.ensemble.flops


@torch.no_grad()
def test_layers_are_fitted_to_modules_that_were_merged_before():
    made, stop_at = models("abcd"), "layer1.0.bn1"
    pairs = {names: merge({name: made[name] for name in names}, stop_at=stop_at) for names in ("ab", "cd")}
    how = LeastSquares(positions=None, ridge=1e-6, pre_activations=False)
    again = merge(pairs, stop_at=stop_at, refine=how, weights=[0, 1])
    assert all(relative_error({task: again(X)[task]}, output) < 3e-2 for task, output in pairs["cd"](X).items())


@torch.no_grad()
def test_a_whole_forward_is_merged_again(tmp_path):
    made = models("abcd", LitWhole)
    whole = {"backbone": "", "stop_at": None}
    pairs = {names: merge({name: made[name] for name in names}, **whole) for names in ("ab", "cd")}
    run = trainer()
    again = ZipIt(run).merge(pairs, images(), **(MERGE | whole | {"weights": [1, 0]})).eval()
    assert all(relative_error({task: again(X)[task]}, output) < 1e-4 for task, output in pairs["ab"](X).items())
    run.test(again, [images(classes=3) for _ in "abcd"], verbose=False)
    run.save_checkpoint(tmp_path / "abcd.ckpt")
    read = MultiHeadModule.load_from_checkpoint(tmp_path / "abcd.ckpt")
    assert all(torch.equal(output, again(X)[task]) for task, output in read(X).items())


def test_what_cannot_be_merged_again_is_refused(abcd):
    made, ab, _ = abcd
    with pytest.raises(ConfigurationError, match=r"Models 'ab' and 'a' both have a task 'a'"):
        merge({"ab": ab, "a": made["c"]})
    per_task = merge({name: made[name] for name in "cd"}, refine=BatchNorm(per_task=True))
    with pytest.raises(ConfigurationError) as found:
        merge({"ab": ab, "cd": per_task}, stop_at=None)
    for problem in ("'ab': it was merged with stop_at='layer1', and", "'cd': its trunk has a batch norm for each task"):
        assert problem in str(found.value)
