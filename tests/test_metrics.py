from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_zipit import JointAccuracy

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
def test_batches_add_up(metric, size):
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
def test_a_missing_task_or_a_wrong_width_is_named_and_leaves_no_trace(metric, outputs):
    metric.update(*batch())
    with pytest.raises(ValueError, match="plants" if outputs else "animals"):
        metric.update(outputs, torch.tensor([0, 1]))
    assert_same(metric.compute(), by_hand(*batch()))


def test_no_task_at_all_is_refused():
    with pytest.raises(ValueError, match="classes"):
        JointAccuracy({})


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.double(), lambda m: m.set_dtype(torch.float64)])
def test_accuracies_stay_the_same_in_other_types(metric, cast):
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
def test_copied_and_pickled_metrics_go_on(metric, duplicate):
    metric.update(*batch())
    other = duplicate(metric)
    other.update(*batch())
    assert_same(other.compute(), by_hand(*batch()))
    assert other.total[0] == 2 * metric.total[0] == 400


def test_a_reset_metric_starts_afresh(metric):
    metric.update(*batch(seed=1))
    metric.reset()
    metric.update(*batch(seed=2))
    assert_same(metric.compute(), by_hand(*batch(seed=2)))
