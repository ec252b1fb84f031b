from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as tnf
from helpers.nets import images, settled_pair, trainer

from lightning_zipit import Ensemble, JointAccuracy, ZipIt
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.functional import fit_temperatures

CLASSES = {"animals": [0, 3, 5], "vehicles": [4, 1], "plants": [2, 6, 7, 8]}


def batch(samples=200, seed=0, classes=9):
    generator = torch.Generator().manual_seed(seed)
    outputs = {task: 3 * torch.randn(samples, len(own), generator=generator) for task, own in CLASSES.items()}
    return outputs, torch.randint(classes, (samples,), generator=generator)


def by_hand(outputs, target):
    """The metric in numpy, one sample after the other."""
    target, logits = target.numpy(), {task: output.double().numpy() for task, output in outputs.items()}
    joint, own = [], {task: [] for task in CLASSES}
    for sample, label in enumerate(target):
        scores = {}
        for task, classes in CLASSES.items():
            exponentials = np.exp(logits[task][sample])
            scores |= dict(zip(classes, exponentials / exponentials.sum(), strict=True))
            if label in classes:
                own[task].append(classes[logits[task][sample].argmax()] == label)
        joint.append(max(scores, key=scores.get) == label)
    tasks = {task: np.mean(hits) for task, hits in own.items()}
    return {"joint": np.mean(joint), **tasks, "mean": np.mean(list(tasks.values()))}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert float(actual[name]) == pytest.approx(float(value), abs=1e-6), name


@pytest.fixture
def metric():
    return JointAccuracy(CLASSES)


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_computed_by_hand(metric, seed):
    metric.update(*batch(seed=seed))
    assert_same(metric.compute(), by_hand(*batch(seed=seed)))


@pytest.mark.parametrize("size", [1, 7, 200])
def test_joint_accuracy_adds_up_over_batches(metric, size):
    outputs, target = batch()
    for rows in torch.arange(200).split(size):
        metric.update({task: output[rows] for task, output in outputs.items()}, target[rows])
    assert_same(metric.compute(), by_hand(outputs, target))


def test_a_batch_passed_forward_gives_its_own_accuracies_and_adds_up(metric):
    first, second = batch(seed=1), batch(seed=2)
    assert_same(metric(*first), by_hand(*first))
    assert_same(metric(*second), by_hand(*second))
    outputs = {task: torch.cat([first[0][task], second[0][task]]) for task in CLASSES}
    assert_same(metric.compute(), by_hand(outputs, torch.cat([first[1], second[1]])))


def test_the_softmax_inside_each_head_decides_not_the_size_of_its_logits():
    metric = JointAccuracy({"a": [0, 1], "b": [2, 3]})
    metric.update({"a": torch.tensor([[90.0, 90.5]]), "b": torch.tensor([[3.0, -3.0]])}, torch.tensor([2]))
    assert metric.compute()["joint"] == 1


def test_a_sample_of_a_foreign_class_does_not_enter_a_tasks_accuracy(metric):
    outputs, target = batch()
    metric.update(outputs, target)
    before = metric.compute()
    foreign = torch.tensor([4, 1] * 10)
    metric.update({task: torch.randn(20, len(own)) for task, own in CLASSES.items()}, foreign)
    after = metric.compute()
    assert after["animals"] == before["animals"]
    assert after["plants"] == before["plants"]


def test_a_task_without_samples_does_not_enter_the_mean(metric):
    outputs, _ = batch(4)
    outputs["animals"] = torch.tensor([[1.0, 0, 0]]).repeat(4, 1)
    metric.update(outputs, torch.tensor([0, 0, 0, 3]))
    accuracies = metric.compute()
    assert accuracies["animals"] == accuracies["mean"] == 0.75
    assert accuracies["vehicles"] == accuracies["plants"] == 0


def test_outputs_of_other_tasks_are_ignored(metric):
    outputs, target = batch()
    metric.update(outputs | {"other": torch.full((200, 3), 100.0)}, target)
    assert_same(metric.compute(), by_hand(outputs, target))


def test_half_precision_logits_are_compared_in_single_precision():
    metric = JointAccuracy({"a": [0, 1], "b": [2, 3]})
    logits = torch.tensor([[8.0, 0.0]]).bfloat16()
    metric.update({"a": logits, "b": logits + torch.tensor([[0.0, -1.0]]).bfloat16()}, torch.tensor([2]))
    assert metric.compute()["joint"] == 1


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"animals": torch.zeros(2, 3), "vehicles": torch.zeros(2, 2)},
        {"animals": torch.zeros(2, 3), "vehicles": torch.zeros(2, 2), "plants": torch.zeros(2, 3)},
    ],
    ids=["none", "missing", "narrow"],
)
def test_joint_accuracy_refuses_missing_tasks_and_wrong_shapes(metric, outputs):
    metric.update(*batch())
    with pytest.raises(ValueError, match="plants" if outputs else "animals"):
        metric.update(outputs, torch.tensor([0, 1]))
    assert_same(metric.compute(), by_hand(*batch()))


def test_joint_accuracy_refuses_empty_classes():
    with pytest.raises(ValueError, match="classes"):
        JointAccuracy({})


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.double(), lambda m: m.set_dtype(torch.float64)])
def test_joint_accuracy_does_not_depend_on_the_dtype(metric, cast):
    outputs, target = batch()
    metric.update({task: output[:100] for task, output in outputs.items()}, target[:100])
    metric = cast(metric)
    metric.update({task: output[100:] for task, output in outputs.items()}, target[100:])
    assert_same(metric.compute(), by_hand(outputs, target))


def test_the_counts_of_two_metrics_add_up(metric):
    first, second = batch(seed=1), batch(50, seed=2)
    metric.update(*first)
    other = JointAccuracy(CLASSES)
    other.update(*second)
    metric.merge_state(other)
    outputs = {task: torch.cat([first[0][task], second[0][task]]) for task in CLASSES}
    assert_same(metric.compute(), by_hand(outputs, torch.cat([first[1], second[1]])))
    assert_same(other.compute(), by_hand(*second))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copied_and_pickled_metrics_can_be_updated(metric, duplicate):
    metric.update(*batch())
    other = duplicate(metric)
    other.update(*batch())
    assert_same(other.compute(), by_hand(*batch()))
    assert other.total[0] == 2 * metric.total[0] == 400


def test_reset_clears_joint_accuracy(metric):
    metric.update(*batch(seed=1))
    metric.reset()
    metric.update(*batch(seed=2))
    assert_same(metric.compute(), by_hand(*batch(seed=2)))


def test_temperatures_change_only_the_joint_accuracy(metric):
    outputs, target = batch()
    temperatures = {"animals": 2.5, "vehicles": 0.5, "plants": 1.0}
    metric.update(outputs, target)
    tempered = JointAccuracy(CLASSES, temperatures)
    tempered.update(outputs, target)
    cooled = by_hand({task: output / temperatures[task] for task, output in outputs.items()}, target)
    assert_same(tempered.compute(), cooled)
    plain = metric.compute()
    assert plain.pop("joint") != cooled["joint"]
    assert all(plain[name] == tempered.compute()[name] for name in plain)


@pytest.mark.parametrize(
    "temperatures",
    [{"animals": 1.0}, {**dict.fromkeys(CLASSES, 1.0), "more": 1.0}]
    + [{**dict.fromkeys(CLASSES, 1.0), "plants": wrong} for wrong in (0.0, -1.0, float("inf"), float("nan"))],
)
def test_joint_accuracy_refuses_bad_temperatures(temperatures):
    with pytest.raises(ValueError, match="temperatures"):
        JointAccuracy(CLASSES, temperatures)


def confidence(logits):
    return logits.double().softmax(-1).amax(-1).mean().item()


@pytest.mark.parametrize("seed", range(3))
def test_fitted_heads_are_equally_confident_whatever_their_scale_and_size(seed):
    logits, _ = batch(seed=seed)
    scaled = {task: factor * output + 5 for (task, output), factor in zip(logits.items(), (0.1, 1, 30), strict=True)}
    plain, found = fit_temperatures(logits), fit_temperatures(scaled)
    for (task, output), factor in zip(scaled.items(), (0.1, 1, 30), strict=True):
        assert confidence(output / found[task]) == pytest.approx(1 / 3 + 2 / 3 / 2, abs=1e-6)  # vehicles are two
        assert found[task] == pytest.approx(factor * plain[task], rel=1e-5)
    twice = fit_temperatures({task: torch.cat([output, output[:50]]) for task, output in logits.items()})
    assert twice == pytest.approx(fit_temperatures(logits, torch.tensor([2.0] * 50 + [1.0] * 150)))


def test_a_head_that_takes_all_samples_gives_back_those_of_others():
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(4).repeat(100)
    logits = tnf.one_hot(target, 4) + 0.3 * torch.randn(400, 4, generator=generator)
    outputs = {"shy": logits[:, :2], "sure": 20 * logits[:, 2:]}
    classes = {"shy": [0, 1], "sure": [2, 3]}
    plain, fitted = JointAccuracy(classes), JointAccuracy(classes, fit_temperatures(outputs))
    assert plain(outputs, target)["joint"] < 0.6 and fitted(outputs, target)["joint"] > 0.8


def test_a_fit_stays_within_its_bounds_and_says_what_it_needs():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    heads = {"a": 100 * logits, "one class": torch.ones(2, 1), "constant": torch.ones(2, 3)}
    assert fit_temperatures(heads, bounds=(0.1, 20)) == {"a": pytest.approx(20), "one class": 1.0, "constant": 1.0}
    assert fit_temperatures({"alone": logits}) == {"alone": 1.0} and fit_temperatures({}) == {}
    for wrong in (logits[:0], logits[0], logits / 0):
        with pytest.raises(ValueError, match="'b'"):
            fit_temperatures({"a": logits, "b": wrong})


def test_a_module_of_several_heads_fits_temperatures_on_loaders():
    models, data, more = settled_pair(8), images(16, batch_size=8), images(8, seed=1)
    merged = ZipIt(trainer()).merge(models, data, backbone="net", refine=None).train()
    x = torch.cat([data.dataset.tensors[0], more.dataset.tensors[0]])
    for module in (merged, Ensemble(models, "net").train()):
        found = module.fit_temperatures([data, more])
        assert module.training and found == module.fit_temperatures({"a": data, "b": more})
        with torch.no_grad():
            weights = torch.tensor([1.0] * 16 + [2.0] * 8)  # either loader counts the same
            assert found == pytest.approx(fit_temperatures(module.eval()(x), weights), rel=1e-4)
    assert JointAccuracy({"a": range(5), "b": range(5, 12)}, found).temperatures == found
    with pytest.raises(CalibrationError, match="empty"):
        merged.fit_temperatures([])
    with pytest.raises(ConfigurationError, match="NaN"):
        merged.fit_temperatures(x * float("nan"), lambda image: image[None])


def test_a_head_with_one_logit_says_what_the_joint_accuracy_needs():
    kind, z = torch.tensor([[9.0, -9.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[9.0], [9.0], [-9.0]])
    target = torch.tensor([0, 3, 2])
    for labels in ([2], [2, 3]):
        with pytest.raises(ValueError, match=r"'defect' has a single logit.*softmax.*torch\.cat"):
            JointAccuracy({"kind": [0, 1], "defect": labels}).update({"kind": kind, "defect": z}, target)
    metric = JointAccuracy({"kind": [0, 1], "defect": [2, 3]})
    metric.update({"kind": kind, "defect": torch.cat([torch.zeros_like(z), z], dim=1)}, target)
    probabilities = torch.cat([kind.softmax(1), 1 - z.sigmoid(), z.sigmoid()], 1)
    assert metric.compute()["joint"] == (probabilities.argmax(1) == target).float().mean()


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), r"one integer label per sample.*float32 of shape \(4, 3\).*metric"),
        (torch.zeros(4, 4), torch.eye(4, dtype=torch.int64), r"one integer label per sample.*several labels at once"),
        (torch.zeros(4, 3), torch.zeros(4), r"one integer label per sample.*regression"),
        (torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), r"shape \(4, 3\), got \(4, 8\).*embeddings"),
        ((torch.zeros(4, 3),), torch.zeros(4, dtype=torch.int64), r"needs logits in a tensor, got a tuple"),
    ],
)
def test_heads_that_are_no_classifiers_are_told_what_the_joint_accuracy_needs(output, target, message):
    metric = JointAccuracy({"a": [0, 1, 2], "b": [3, 4, 5]})
    with pytest.raises(ValueError, match=message):
        metric.update({"a": output, "b": output}, target)
