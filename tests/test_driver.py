"""Merging with a Trainer: the driver and the callback."""

import copy
import csv
import gc
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.nets import Lit, LitWhole, PlainNet, Wrap, images, settle, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import FeatureStatistics, MergeSettings, MultiHeadModule, ZipIt, ZipItCallback, ZipItModule
from lightning_zipit.errors import ArchitectureMismatchError, CalibrationError, ConfigurationError
from lightning_zipit.matchers import Average, GreedyZip, Permute


def pair(num_classes=(5, 7)):
    models = [Lit(count) for count in num_classes]
    for seed, model in enumerate(models):
        settle(model.net, torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return dict(zip(("a", "b", "c", "d"), models, strict=False))


def loaders(count=2):
    return [images(seed=seed) for seed in range(count)]


def outputs(module, seed=9):
    with torch.no_grad():
        return module.eval()(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def equal(first, second):
    return all(torch.equal(first[task], second[task]) for task in first)


def test_driver_and_callback_give_the_same_network():
    models = pair()
    driven = ZipIt(trainer()).merge(models, dataloaders=loaders(), backbone="net", stop_at="layer1")
    module = ZipItModule(models, backbone="net", dataloaders=loaders())
    trainer(callbacks=[ZipItCallback(stop_at="layer1")]).predict(module)
    assert equal(outputs(driven), outputs(module.merged))
    assert {task: output.shape for task, output in outputs(driven).items()} == {"a": (8, 5), "b": (8, 7)}


def test_sources_modes_and_random_state_stay_as_they_were():
    models = pair()
    models["a"].train()
    models["b"].net.layer1.train()
    modes = [module.training for model in models.values() for module in model.modules()]
    states = [copy.deepcopy(model.state_dict()) for model in models.values()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in models["a"].modules()]
    random_states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run = trainer()
    ZipIt(run).merge(models, dataloaders=loaders(), backbone="net")
    with pytest.raises(CalibrationError):
        ZipIt(run).merge(models, dataloaders=[[{"nothing": 1}]] * 2, backbone="net")
    assert [module.training for model in models.values() for module in model.modules()] == modes
    for model, state in zip(models.values(), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in models["a"].modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (np.random.get_state()[1] == random_states[1]).all() and random.getstate() == random_states[2]
    assert not any(isinstance(callback, ZipItCallback) for callback in run.callbacks)


def test_merging_a_model_with_its_copy_and_new_statistics_keeps_the_function():
    model = pair()["a"]
    data = images(count=32)
    x = torch.cat([batch[0] for batch in data])
    settle(model.net, x)
    batches = DataLoader(x, 32)
    merged = ZipIt(trainer()).merge({"a": model, "b": copy.deepcopy(model)}, dataloaders=batches, backbone="net")
    with torch.no_grad():
        expected, found = model.net(x), merged(x)
    assert all((output - expected).abs().max() < 1e-4 * expected.abs().max() for output in found.values())


@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_models(count):
    models = pair((5, 6, 7, 4)[:count])
    merged = ZipIt(trainer()).merge(models, dataloaders=loaders(count), backbone="net", stop_at="layer1.0")
    assert [output.shape[1] for output in outputs(merged).values()] == [5, 6, 7, 4][:count]
    copies = {str(index): copy.deepcopy(models["a"]) for index in range(count)}
    matcher = GreedyZip(alpha=1.0, beta=0.0)  # a low alpha keeps clusters of three apart
    same = ZipIt(trainer()).merge(copies, dataloaders=images(), backbone="net", matcher=matcher, refine=None)
    expected = models["a"].net.eval()(torch.ones(2, 3, 16, 16))
    assert all(
        torch.allclose(output, expected, rtol=1e-4, atol=1e-5) for output in same(torch.ones(2, 3, 16, 16)).values()
    )


def test_batch_norm_of_the_trunk_sees_all_data_and_of_a_head_its_own():
    models = pair((5, 5))
    merge = {"backbone": "net", "stop_at": "layer1", "refine": "batch_norm"}
    one = ZipIt(trainer()).merge(models, dataloaders=[images(seed=0), images(seed=1)], **merge)
    scaled = [(2 * batch[0], batch[1]) for batch in images(seed=1)]
    third = ZipIt(trainer()).merge(models, dataloaders=[images(seed=0), scaled], matcher=Average(), **merge)
    plain = ZipIt(trainer()).merge(models, dataloaders=[images(seed=0), images(seed=1)], matcher=Average(), **merge)
    changed, before = third.state_dict(), plain.state_dict()

    def differs(part):
        return any(
            not torch.equal(changed[name], before[name])
            for name in before
            if name.startswith(part) and "running" in name
        )

    assert differs("trunk") and differs("heads.b")
    norm = one.trunk.get_submodule("bn1")
    batches = [batch[0] for loader in loaders() for batch in loader]
    maps = [one.trunk.get_submodule("conv1")(x) for x in batches]
    mean = torch.stack([activation.mean((0, 2, 3)) for activation in maps]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5) and norm.num_batches_tracked == len(batches)
    assert one.heads["a"].get_submodule("layer2.0.bn1").num_batches_tracked == len(batches) // 2
    assert norm.momentum == models["a"].net.bn1.momentum


def test_a_merge_leaves_no_statistics_to_the_garbage_collector(tmp_path):
    def held():
        return sum(each.comoment.numel() for each in gc.get_objects() if isinstance(each, FeatureStatistics))

    models = pair()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # gathers, and then reads what was gathered
            ZipIt(trainer()).merge(models, loaders(), backbone="net", statistics=tmp_path / "s.safetensors")
            assert not held()
    finally:
        gc.enable()


def test_networks_without_batch_norm_take_one_pass():
    models = {"a": Wrap(PlainNet()), "b": Wrap(PlainNet(3))}
    module = ZipItModule(models, "net")
    trainer(callbacks=[ZipItCallback(refine="batch_norm")]).predict(module, loaders())
    assert module.merged(torch.randn(2, 3, 16, 16))["b"].shape == (2, 3)


def test_loaders_given_to_predict_for_two_passes_are_told_where_to_go():
    with pytest.raises(ConfigurationError, match="ZipItModule\\(dataloaders="):
        trainer(callbacks=[ZipItCallback()]).predict(ZipItModule(pair(), "net"), loaders())


def test_the_whole_forward_can_be_the_backbone():
    models = {"a": LitWhole(), "b": LitWhole(4)}
    run = trainer()
    merged = ZipIt(run).merge(models, dataloaders=[images(classes=3), images(classes=3)])
    results = run.test(merged, [images(classes=3), images(classes=4)], verbose=False)
    assert {key for result in results for key in result} == {"a/loss", "b/loss"}
    assert not [name for name in merged.state_dict() if name.startswith("sources")]


def test_a_sequence_of_models_makes_numbered_tasks():
    merged = ZipIt(trainer()).merge(list(pair().values()), dataloaders=images(), backbone="net", refine=None)
    assert merged.tasks == ["task_0", "task_1"]


@pytest.mark.parametrize(
    "arguments",
    [{"fast_dev_run": True}, {"limit_predict_batches": 1}, {"inference_mode": False}, {"precision": "bf16-mixed"},
     {"precision": "64-true"}, {"precision": "bf16-true"}, {"enable_progress_bar": True}],
    ids=lambda arguments: next(iter(arguments)) + "=" + str(next(iter(arguments.values()))),
)  # fmt: skip
def test_trainer_options(arguments):
    models = pair()
    merged = ZipIt(trainer(**arguments)).merge(models, dataloaders=loaders(), backbone="net")
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())
    assert all(output.isfinite().all() for output in outputs(merged).values())
    merged(torch.randn(2, 3, 16, 16))["a"].sum().backward()
    merged.load_state_dict(merged.state_dict())


def test_a_datamodule_gives_its_training_data_in_a_fixed_order():
    class Data(LightningDataModule):
        def setup(self, stage):
            self.loader = DataLoader(images().dataset, 16, shuffle=True)

        def train_dataloader(self):
            return self.loader

    models = pair()
    merges = [ZipIt(trainer()).merge(models, datamodule=Data(), backbone="net") for _ in range(2)]
    by_hand = ZipIt(trainer()).merge(models, dataloaders=images(), backbone="net")
    assert equal(outputs(merges[0]), outputs(merges[1])) and equal(outputs(merges[0]), outputs(by_hand))


def test_merged_heads_give_every_task_the_same_output():
    merged = ZipIt(trainer()).merge(pair((5, 5)), dataloaders=images(), backbone="net", merge_heads=True)
    found = outputs(merged)
    assert torch.equal(found["a"], found["b"]) and not list(merged.heads.parameters())


def test_zip_and_permute_beat_the_average_on_a_permuted_task():
    model = pair((5, 5))["a"]
    x = torch.randn(64, 3, 16, 16)
    from lightning_zipit import trace
    from lightning_zipit.graph import permute_spaces
    from lightning_zipit.graph.prove import random_permutations

    graph = trace(model.net)
    other = copy.deepcopy(model)
    other.net = permute_spaces(model.net, graph, random_permutations(graph))
    errors = {}
    for matcher in (Average(), Permute(), GreedyZip()):
        merged = ZipIt(trainer()).merge(
            [model, other], dataloaders=DataLoader(x, 32), backbone="net", matcher=matcher, refine=None
        )
        with torch.no_grad():
            errors[type(matcher).__name__] = (merged(x)["task_0"] - model.net(x)).abs().max()
    assert errors["GreedyZip"] < 1e-3 and errors["Permute"] < 1e-3 < errors["Average"]


def test_the_report_counts_clusters_and_costs():
    how = {"stop_at": "layer1", "refine": "batch_norm"}
    report = ZipIt(trainer()).merge(pair(), dataloaders=loaders(), backbone="net", **how).report
    assert [space.name for space in report.spaces] == ["conv1", "layer1.0.conv1", "layer1.1.conv1"]
    assert report.sources["a"].flops < report.merged.flops < report.ensemble.flops
    assert all(0 < space.across <= space.size for space in report.spaces)
    assert all(space.chance < space.similarity and space.lowest < space.similarity for space in report.spaces)
    assert all(space.samples == 2 * 48 * 16 * 16 and len(space.losses) == 2 for space in report.spaces)
    norms = ("trunk.bn1", *(f"trunk.layer1.{block}.bn{number}" for block in (0, 1) for number in (1, 2)))
    assert set(norms) < set(report.shifts) and any(name.startswith("heads.b.layer2") for name in report.shifts)
    assert all(0 < shift.mean < 10 and 0.01 < shift.variance < 10 for shift in report.shifts.values())
    assert max(shift.mean for shift in report.shifts.values()) > 0.05


@pytest.mark.parametrize("shown", ["enable_progress_bar", "enable_model_summary", None])
def test_the_report_is_printed_and_logged_unless_the_trainer_is_silent(shown, capsys, tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(logger=logger, **({shown: True} if shown else {}))
    merged = ZipIt(run).merge(pair(), dataloaders=loaders(), backbone="net", stop_at="layer1")
    assert capsys.readouterr().out.count(merged.report.summary()) == (shown is not None)
    (row,) = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    assert float(row["zipit/flops"]) == merged.report.merged.flops
    assert {name.removeprefix("zipit/"): float(value) for name, value in row.items() if "zipit" in name} == (
        pytest.approx(merged.report.metrics())
    )


# What goes wrong


def merge(models, dataloaders=None, **arguments):
    return ZipIt(trainer()).merge(models, dataloaders or images(), **{"backbone": "net", **arguments})


def test_all_problems_that_are_known_up_front_come_in_one_message():
    models = pair()
    bad = {"a.b": models["a"], "keys": models["b"], "c": models["b"], "d": nn.Linear(1, 1)}
    with pytest.raises(ConfigurationError) as error:
        merge(bad, [images()])
    message = str(error.value)
    assert "'a.b'" in message and "'keys'" in message and "same model" in message
    assert "must be a LightningModule" in message and "1 loaders for 4 tasks" in message


def test_no_models_and_one_model_are_errors():
    with pytest.raises(ConfigurationError, match="No models"):
        merge({})
    with pytest.raises(ConfigurationError, match="at least two"):
        merge({"a": Lit()})


def test_different_architectures_name_the_first_difference():
    with pytest.raises(
        ArchitectureMismatchError, match=r"'a' and 'b' differ: parameter `conv1.weight`.*\(8, 3, 3, 3\)"
    ):
        merge({"a": Lit(), "b": Lit(width=4)})
    other = Lit()
    other.net.layer1[0].conv1.dilation = other.net.layer1[0].conv1.padding = (2, 2)
    with pytest.raises(ArchitectureMismatchError, match=r"`layer1.0.conv1` \(Conv2d\) has padding=\(1, 1\) in"):
        merge({"a": Lit(), "b": other})


def test_a_missing_backbone_and_a_misspelt_stop_at_are_errors():
    with pytest.raises(ConfigurationError, match=r"'nett' is not a submodule of Lit.*net, accuracy"):
        merge(pair(), backbone="nett")
    with pytest.raises(ConfigurationError, match="Did you mean 'layer2'"):
        merge(pair(), stop_at="layer22")


def test_an_empty_loader_is_an_error():
    with pytest.raises(ConfigurationError, match="empty"):
        merge(pair(), [images(), images(count=0)])
    with pytest.raises(CalibrationError, match="No calibration batch"):
        merge({"a": Wrap(PlainNet()), "b": Wrap(PlainNet())}, [iter([]), iter([])])


def test_a_batch_without_an_input_says_how_to_name_it():
    batches = [{"pixels": batch[0]} for batch in images()]
    with pytest.raises(CalibrationError, match=r"keys \['pixels'\].*get_input"):
        merge(pair(), [batches, batches])
    merge(pair(), [batches, batches], get_input=lambda batch: batch["pixels"])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_space_and_task(value, verify):
    models = pair()
    with torch.no_grad():
        models["b"].net.layer1[0].bn1.bias[0] = value
    with pytest.raises(CalibrationError, match=r"task 'b' at feature space 'layer1.0.conv1'"):
        merge(models, verify=verify)


def test_a_bad_refine_or_matcher_is_an_error():
    with pytest.raises(ConfigurationError, match="batch_norm"):
        ZipItCallback(refine="nothing")
    with pytest.raises(ConfigurationError, match="Matcher"):
        ZipItCallback(matcher="zip")


def test_a_zipit_module_without_a_callback_says_what_is_missing():
    with pytest.raises(ConfigurationError, match="ZipItCallback"):
        trainer().predict(ZipItModule(pair(), "net", loaders()))


def test_the_merged_module_is_a_multi_head_module():
    merged = merge(pair())
    assert isinstance(merged, MultiHeadModule) and list(merged.heads) == ["a", "b"]


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_whatever_the_precision_the_matching_is_much_the_same_and_the_weights_keep_their_type(precision):
    models = pair()
    expected = ZipIt(trainer()).merge(models, dataloaders=loaders(), backbone="net", refine=None)
    merged = ZipIt(trainer(precision=precision)).merge(models, dataloaders=loaders(), backbone="net", refine=None)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    similarities = [[space.similarity for space in module.report.spaces] for module in (merged, expected)]
    assert np.allclose(*similarities, atol=0.05)
    if precision == "64-true":
        assert equal(outputs(merged), outputs(expected))
    refined = ZipIt(trainer(precision=precision)).merge(models, dataloaders=loaders(), backbone="net")
    assert all(output.isfinite().all() for output in outputs(refined).values())


def compiled(model, how):
    model = copy.deepcopy(model)
    if how == "the model":
        return torch.compile(model, backend="eager")
    if how == "a model that was tested":
        compiled = torch.compile(model, backend="eager")
        trainer().test(compiled, images(), verbose=False)
        return compiled
    if how == "the backbone":
        model.net = torch.compile(model.net, backend="eager")
    if how == "a part of it":
        model.net.layer1 = torch.compile(model.net.layer1, backend="eager")
    if how == "in place":
        model.net.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "how",
    [
        "the model",
        pytest.param("a model that was tested", marks=pytest.mark.nightly),
        "the backbone",
        "a part of it",
        "in place",
    ],
)
def test_compiled_models_merge_as_they_would_uncompiled(how):
    models = pair()
    sources = {"a": compiled(models["a"], how), "b": models["b"]}
    merged = ZipIt(trainer()).merge(sources, dataloaders=loaders(), backbone="net", stop_at="layer1")
    expected = ZipIt(trainer()).merge(models, dataloaders=loaders(), backbone="net", stop_at="layer1")
    assert equal(outputs(merged), outputs(expected))
    tested = [trainer().test(module, loaders(), verbose=False) for module in (merged, expected)]
    assert tested[0] == tested[1]


def test_a_compiled_merged_module_gives_the_same_outputs():
    merged = merge(pair())
    assert equal(outputs(torch.compile(merged, backend="aot_eager", fullgraph=True)), outputs(merged))


def test_a_loader_that_every_process_would_shuffle_by_itself_is_an_error():
    module = ZipItModule(pair(), "net", [images(), DataLoader(images().dataset, 16, shuffle=True)])
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ConfigurationError, match=r"of task 'b' shuffles.*shuffle=False"):
        module.prepare(MergeSettings())
    module._trainer = SimpleNamespace(world_size=1)
    module.prepare(MergeSettings())


def test_a_loader_that_can_be_gone_through_once_only_is_an_error_that_says_so():
    once = [iter(list(loader)) for loader in loaders()]
    with pytest.raises(CalibrationError, match="last pass"):
        merge(pair(), once)


@pytest.mark.parametrize("refine", [None, "batch_norm"])
def test_statistics_that_need_several_passes_give_the_same_network(refine):
    models = pair()
    whole = ZipIt(trainer()).merge(models, dataloaders=loaders(), backbone="net", refine=refine)
    module = ZipItModule(models, backbone="net", dataloaders=loaders())
    run = trainer(callbacks=[ZipItCallback(refine=refine, statistics_memory=6e-6)])
    counted = []
    module.calibrate = module.prepare
    module.prepare = lambda *arguments: (module.calibrate(*arguments), counted.append(module.pipeline.passes))
    run.predict(module)
    assert counted[0] > 3
    assert equal(outputs(whole), outputs(module.merged))


def test_no_memory_for_statistics_is_an_error():
    with pytest.raises(ConfigurationError, match="statistics_memory"):
        MergeSettings(statistics_memory=0)


class Cumulative(nn.Module):
    """An operator that no rule knows, in the middle of a network."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.conv3, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.cumsum(self.conv2(self.conv1(x).relu()).relu(), 1)
        return self.fc(self.conv3(x).relu().mean((2, 3)))


@torch.no_grad()
def test_what_follows_an_operator_without_a_rule_stays_per_task_and_is_correct(tmp_path):
    nets = {"a": Cumulative(), "b": Cumulative()}
    nets["b"].load_state_dict(nets["a"].state_dict())
    order = torch.randperm(8)
    nets["b"].conv1.weight.copy_(nets["a"].conv1.weight[order])
    nets["b"].conv1.bias.copy_(nets["a"].conv1.bias[order])
    nets["b"].conv2.weight.copy_(nets["a"].conv2.weight[:, order])
    models = {task: Wrap(net.eval()) for task, net in nets.items()}
    run = trainer()
    with pytest.warns(UserWarning, match=r"stays per task.*`cumsum`"):
        merged = ZipIt(run).merge(models, dataloaders=loaders(), backbone="net")
    x = torch.randn(4, 3, 16, 16)
    for task, output in merged(x).items():
        torch.testing.assert_close(output, nets[task](x))
    assert "`cumsum`" in merged.report.notes[0] and "Kept per task" in str(merged.report)
    assert not any(name.startswith("conv3") for name, _ in merged.trunk.named_parameters())
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models=models)
    assert equal(outputs(merged), outputs(loaded)) and loaded.report.notes == merged.report.notes
