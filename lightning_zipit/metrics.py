"""Joint accuracy of several classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

ONE_LOGIT = (
    "The joint accuracy compares probabilities from a softmax over the classes of each head, and a softmax over one "
    "logit is always 1. For a logit z of yes or no, give the outputs torch.cat([torch.zeros_like(z), z], dim=1), and "
    "the labels of no and yes in `classes`."
)
"""The way out for binary heads: the softmax over (0, z) is the sigmoid of z."""

NO_CLASSES = (
    "Heads for several labels at once, regression or embeddings have no joint accuracy. Compare merges by a metric of "
    "your own, such as `metric` of a sweep, a name that the validation_step logs."
)
"""The way out for heads that are no classifiers."""


class JointAccuracy(Metric):
    """Accuracy over the classes of all tasks together. The task of a sample is not known.

    The prediction is the argmax over the classes of all heads, after a softmax in each head (ZipIt!, section 5). It is
    compared with the global label. The metric also computes the accuracy of each head on the samples of its own
    classes, and the mean of these accuracies.

    Args:
        classes: per task, the global label of each output of its head.
        temperatures: per task, the divisor of its logits before the softmax; by default 1.
            :meth:`MultiHeadModule.fit_temperatures` computes temperatures without labels. Only the joint accuracy
            depends on them.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``classes`` is empty, if a task has the name "joint" or "mean", or if ``temperatures`` lacks a
            finite value above 0 for a task.

    Example:
        >>> metric = JointAccuracy({"animals": [0, 2], "vehicles": [1, 3]})
        >>> outputs = {"animals": torch.tensor([[2.0, 0.0], [0.0, 0.1]]), "vehicles": torch.tensor([[5.0, 0.0]] * 2)}
        >>> metric.update(outputs, torch.tensor([0, 2]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'joint': 0.0, 'animals': 1.0, 'vehicles': 0.0, 'mean': 1.0}
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    correct: Tensor
    total: Tensor

    def __init__(
        self, classes: Mapping[str, Sequence[int]], temperatures: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not classes:
            raise ValueError("`classes` must contain the classes of at least one task, got an empty mapping.")
        if reserved := {"joint", "mean"} & set(classes):
            raise ValueError(
                f"A task cannot have the name {', '.join(map(repr, sorted(reserved)))}, because the result uses it for "
                "another accuracy: rename the task in `classes`."
            )
        if temperatures is not None and set(temperatures) != set(classes):
            raise ValueError(
                f"`temperatures` and `classes` must have the same tasks, got {list(temperatures)} and {list(classes)}."
            )
        self.temperatures = {task: float(temperatures[task]) if temperatures else 1.0 for task in classes}
        if not all(0 < temperature < math.inf for temperature in self.temperatures.values()):
            raise ValueError(f"`temperatures` must be finite and above 0, got {self.temperatures}.")
        self.classes = {task: torch.as_tensor(labels, dtype=torch.int64) for task, labels in classes.items()}
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(1 + len(classes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: logits by task, each ``(samples, classes of the task)``.
            target: global labels ``(samples,)``.

        Raises:
            ValueError: if the logits of a task are missing, have a wrong shape, or are single logits; or if the target
                has no labels of classes.
        """
        check_labels(target)
        for task, labels in self.classes.items():
            output = outputs.get(task)
            if output is not None and not isinstance(output, Tensor):
                raise ValueError(
                    f"Task {task!r} needs logits in a tensor, got a {type(output).__name__}. Give the logits in it."
                )
            shape = None if output is None else tuple(output.shape)
            if shape in ((len(target),), (len(target), 1)):
                raise ValueError(f"Task {task!r} has a single logit. {ONE_LOGIT}")
            if shape != (len(target), len(labels)):
                raise ValueError(
                    f"Task {task!r} needs logits of shape {(len(target), len(labels))}, got {shape}. {NO_CLASSES}"
                )
        tasks = list(self.classes)
        global_labels = torch.cat([self.classes[task] for task in tasks]).to(target.device)
        logits = {task: outputs[task].float() / self.temperatures[task] for task in tasks}
        probabilities = torch.cat([logits[task].softmax(-1) for task in tasks], dim=-1)
        self._count(0, global_labels[probabilities.argmax(-1)], target)
        for index, task in enumerate(tasks, 1):
            labels = self.classes[task].to(target.device)
            own = torch.isin(target, labels)
            self._count(index, labels[outputs[task].argmax(-1)][own], target[own])

    def _count(self, index: int, predicted: Tensor, target: Tensor) -> None:
        self.correct[index] += (predicted == target).sum()
        self.total[index] += len(target)

    def compute(self) -> dict[str, Tensor]:
        """Compute the accuracies: ``{"joint", one entry per task, "mean"}``.

        A task without samples has accuracy 0, and is excluded from the mean.
        """
        accuracy = self.correct / self.total.clamp(min=1)
        per_task = dict(zip(self.classes, accuracy[1:], strict=True))
        seen = accuracy[1:][self.total[1:] > 0]
        mean = seen.mean() if len(seen) else accuracy.new_zeros(())
        return {"joint": accuracy[0], **per_task, "mean": mean}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot accuracies, or a sequence of accuracies over time; see :meth:`torchmetrics.Metric.plot`.

        Args:
            val: a result of :meth:`compute` or ``forward``, or a sequence of results; by default the current result.
            ax: the axes to draw into; by default a new figure.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


def check_labels(target: Tensor) -> None:
    """Check that a target has one label of a class for each sample.

    Raises:
        ValueError: if it does not.
    """
    if target.ndim != 1 or target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"The joint accuracy needs one integer label per sample, of shape (samples,), got {target.dtype} of shape "
            f"{(*target.shape,)}. {NO_CLASSES}"
        )
