"""The merged module: its steps, its logs, its checkpoints."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import Lit, PlainNet, Wrap, images, trainer
from helpers.processes import run as run_processes

from lightning_zipit import Ensemble, MultiHeadModule, ZipIt
from lightning_zipit.errors import CheckpointError, ConfigurationError


@pytest.fixture(scope="module")
def merged():
    torch.manual_seed(0)
    data = [images(seed=0), images(seed=1, classes=7)]
    return ZipIt(trainer()).merge({"a": Lit(5), "b": Lit(7)}, dataloaders=data, backbone="net", stop_at="layer1.0")


X = torch.randn(4, 3, 16, 16)


def equal(first, second):
    with torch.no_grad():
        one, other = first.eval()(X), second.eval()(X)
    return all(torch.equal(one[task], other[task]) for task in one)


def test_each_task_runs_its_own_step_and_logs_under_its_name(merged):
    results = trainer().test(merged, [images(), images(classes=7)], verbose=False)
    assert [sorted(result) for result in results] == [["a/test_acc", "a/test_loss"], ["b/test_acc", "b/test_loss"]]
    x, y = next(iter(images(count=16, classes=7)))
    with torch.no_grad():
        accuracy = (merged(x, task="b").argmax(-1) == y).float().mean()
    (result,) = trainer().test(merged, {"b": images(count=16, classes=7)}, verbose=False)
    assert result["b/test_acc"] == pytest.approx(accuracy.item())


def test_validation_and_prediction_run_too(merged):
    results = trainer().validate(merged, {"b": images(classes=7), "a": images()}, verbose=False)
    assert [list(result) for result in results] == [["b/val_loss", "b/val_acc"], ["a/val_loss", "a/val_acc"]]
    predictions = trainer().predict(merged, [images(), images(classes=7)])
    assert torch.equal(predictions[1][0], merged(images(classes=7).dataset.tensors[0][:16], task="b").argmax(-1))


def test_logging_is_as_before_after_a_step(merged):
    trainer().test(merged, [images(), images(classes=7)], verbose=False)
    assert all("log" not in source.__dict__ and source._trainer is None for source in merged.sources.values())


@pytest.mark.parametrize(
    ("loaders", "message"),
    [([1], "1 dataloader for 2 tasks"), ([1, 1, 1], "3 dataloaders"), ({"a": 1, "z": 1}, "'z'.*the tasks are")],
)
def test_a_mismatch_between_loaders_and_tasks_is_an_error(merged, loaders, message):
    loaders = {task: images() for task in loaders} if isinstance(loaders, dict) else [images() for _ in loaders]
    with pytest.raises(ConfigurationError, match=message):
        trainer().test(merged, loaders, verbose=False)


def test_epoch_hooks_and_batch_transfers_are_those_of_the_sources():
    class WithHooks(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0 + self.hparams.num_classes, batch[1]

        def test_step(self, batch, batch_idx):
            self.seen = batch[0]

        def on_test_epoch_end(self):
            self.log("seen", self.seen.mean())

    data = [images(), images()]
    merged = ZipIt(trainer()).merge({"a": WithHooks(3), "b": WithHooks(4)}, data, backbone="net", refine=None)
    results = trainer().test(merged, data, verbose=False)
    assert {key: value for result in results for key, value in result.items()} == {"a/seen": 3.0, "b/seen": 4.0}


def test_the_trunk_runs_once_for_all_heads_and_nothing_hooks_it(merged):
    calls = []
    handle = merged.trunk.register_forward_hook(lambda *_: calls.append(1))
    merged(X)
    handle.remove()
    assert len(calls) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_every_parameter_is_used(merged):
    module = copy.deepcopy(merged)
    sum(output.sum() for output in module(X).values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_copies_and_pickles_are_whole_and_apart(merged):
    twin = copy.deepcopy(merged)
    assert equal(merged, twin) and equal(merged, pickle.loads(pickle.dumps(merged)))
    with torch.no_grad():
        next(twin.trunk.parameters()).add_(1)
    assert not equal(merged, twin)
    with torch.no_grad():
        assert torch.equal(twin.sources["a"](X), twin(X, task="a"))
        assert torch.equal(merged.sources["a"](X), merged(X, task="a"))


@pytest.mark.parametrize("part", ["head", "trunk", "heads"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@torch.no_grad()
def test_steps_run_the_part_that_took_the_place_of_another(merged, part, copied):
    module = copied(merged)
    if part == "head":
        module.heads["a"] = Halved(module.heads["a"])
    elif part == "trunk":
        module.trunk = Halved(module.trunk)
    else:
        module.heads = torch.nn.ModuleDict({task: Halved(head) for task, head in module.heads.items()})
    x, y = next(iter(images(count=16)))
    losses = [F.cross_entropy(each(x, task="a"), y).item() for each in (module, merged)]
    assert abs(losses[0] - losses[1]) > 1e-3
    for each, expected in zip((module, merged, copied(module)), (*losses, losses[0]), strict=True):
        (result,) = trainer().test(each, {"a": images(count=16)}, verbose=False)
        assert result["a/test_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigurationError, match="was replaced"):
        module.split()


class Halved(torch.nn.Module):
    """Stands for whatever a part becomes."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *inputs):
        outputs = self.part(*inputs)
        return tuple(output / 2 for output in outputs) if isinstance(outputs, tuple) else outputs / 2


def test_it_exports(merged):
    exported = torch.export.export(merged.eval(), (X,))
    with torch.no_grad():
        assert torch.allclose(exported.module()(X)["b"], merged(X)["b"], atol=1e-5)


def test_heads_do_not_write_into_what_they_share():
    merged = ZipIt(trainer()).merge(
        [Wrap(PlainNet()), Wrap(PlainNet())], images(), backbone="net", stop_at="features.0"
    )
    together = merged(X)
    assert torch.equal(together["task_1"], merged(X, task="task_1"))


def test_a_saved_module_comes_back_the_same(merged, tmp_path):
    run = trainer()
    run.test(merged, [images(), images(classes=7)], verbose=False)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    torch.load(tmp_path / "merged.ckpt", weights_only=True)
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert equal(merged, loaded) and loaded.report == merged.report and loaded.tasks == ["a", "b"]
    again = trainer()
    again.test(loaded, [images(), images(classes=7)], verbose=False)
    again.save_checkpoint(tmp_path / "again.ckpt")
    assert equal(merged, MultiHeadModule.load_from_checkpoint(tmp_path / "again.ckpt"))


def read(path):
    merged = MultiHeadModule.load_from_checkpoint(path, trust=["helpers"])
    print(merged(torch.ones(1, 3, 16, 16))["task_1"].sum().item())


def test_it_can_be_saved_right_after_merging_and_read_in_another_process(tmp_path):
    run = trainer()
    merged = ZipIt(run).merge([Lit(5), Lit(5)], dataloaders=images(), backbone="net", refine=None)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    (found,) = run_processes(read, [("merged.ckpt",)], tmp_path)
    expected = merged(torch.ones(1, 3, 16, 16))["task_1"].sum().item()
    assert found.code == 0 and float(found.printed) == pytest.approx(expected, rel=1e-5), found.errors


def test_sources_without_hyperparameters_need_models(tmp_path):
    run = trainer()
    merged = ZipIt(run).merge({"a": Wrap(PlainNet()), "b": Wrap(PlainNet())}, images(), backbone="net")
    run.save_checkpoint(tmp_path / "merged.ckpt")
    with pytest.raises(CheckpointError, match=r"save_hyperparameters.*models="):
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    models = {"a": Wrap(PlainNet()), "b": Wrap(PlainNet())}
    assert equal(merged, MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models=models))


class SquareView(PlainNet):
    """What its last view means depends on the size of the input."""

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(self.features(x), 6)
        return self.short(x.view(-1, 12))

    def __init__(self):
        super().__init__()
        self.short = torch.nn.Linear(12, 5)


def test_a_network_that_only_its_input_explains_merges_and_comes_back(tmp_path):
    run = trainer()
    merged = ZipIt(run).merge([Wrap(SquareView()), Wrap(SquareView())], images(), backbone="net")
    run.save_checkpoint(tmp_path / "merged.ckpt")
    models = [Wrap(SquareView()), Wrap(SquareView())]
    assert equal(merged, MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models=models))


def test_a_class_that_cannot_be_imported_needs_models(tmp_path):
    class Local(Lit):
        pass

    run = trainer()
    ZipIt(run).merge([Local(), Local()], images(), backbone="net", refine=None)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    with pytest.raises(CheckpointError, match=r"imported.*models="):
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")


def test_what_is_no_checkpoint_of_a_merged_module_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"The checkpoint file .* does not exist"):
        MultiHeadModule.load_from_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(CheckpointError, match="cannot be read"):
        MultiHeadModule.load_from_checkpoint(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a merged module"):
        MultiHeadModule.load_from_checkpoint(tmp_path / "other.ckpt")


def test_an_ensemble_has_the_interface_of_the_merged_module():
    models = {"a": Lit(5), "b": Lit(7)}
    ensemble = Ensemble(models, backbone="net")
    with torch.no_grad():
        assert torch.equal(ensemble(X)["b"], models["b"].eval()(X))
        assert torch.equal(ensemble(X, task="a"), models["a"].eval()(X))
    results = trainer().test(ensemble, [images(), images(classes=7)], verbose=False)
    assert "b/test_acc" in results[1]
