"""How an input becomes the output of a task: stem → trunk → head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_zipit._common.views import Inputs
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.refine.task_norms import has_task_norms


class AllHeads(nn.Module):
    """Stems, trunk and heads as one network: all outputs of one input by task.

    Args:
        trunk: from what the stems hand over, or from the input, to a tuple of what the heads take; one with a batch
            norm per task also takes its name.
        heads: per task, the rest of the network.
        stems: per task, from its input to a tuple of what the trunk takes; none where that starts at the input.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module] | nn.ModuleDict,
        stems: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads if isinstance(heads, nn.ModuleDict) else nn.ModuleDict(heads)
        self.stems = stems if isinstance(stems, nn.ModuleDict) else nn.ModuleDict(stems)
        self.per_task = has_task_norms(trunk)

    def forward(self, x: Inputs) -> dict[str, Any]:
        return run_all(self.stems, self.trunk, self.heads, x, self.per_task)


def run_one(stem: nn.Module | None, trunk: nn.Module, head: nn.Module, x: Tensor, norms_of: str | None = None) -> Any:
    """The output of one task.

    Args:
        stem: from the input to a tuple of what the trunk takes; ``None`` where the trunk starts at the input.
        trunk: from there to a tuple of what the head takes.
        head: the rest of the network.
        x: the input.
        norms_of: the name of the task, for a trunk that takes it.
    """
    entering = (x,) if stem is None else stem(x)
    return head(*trunk(*entering, *(() if norms_of is None else (norms_of,))))


def run_all(
    stems: Mapping[str, nn.Module] | nn.ModuleDict,
    trunk: nn.Module,
    heads: nn.ModuleDict,
    inputs: Inputs,
    per_task: bool,
) -> dict[str, Any]:
    """The outputs of all heads by task; with a dict of inputs, those of its tasks.

    Args:
        stems: per task, from its input to a tuple of what the trunk takes; none where that starts at the input.
        trunk: from there to a tuple of what the heads take.
        heads: per task, the rest of the network.
        inputs: the input of all tasks, or of each by task.
        per_task: whether the trunk takes the name of its task.

    The trunk runs once for all tasks, unless it takes their name or what it starts from is each task's own.
    """
    if isinstance(inputs, Tensor) and not per_task and not len(stems):
        crossing = trunk(inputs)
        return {task: head(*crossing) for task, head in heads.items()}
    views = dict.fromkeys(heads, inputs) if isinstance(inputs, Tensor) else inputs
    if unknown := [task for task in views if task not in heads]:
        raise ConfigurationError(
            f"There are inputs for {', '.join(map(repr, unknown))}, but the tasks are {list(heads)}."
        )
    return {
        task: run_one(stems[task] if len(stems) else None, trunk, heads[task], x, task if per_task else None)
        for task, x in views.items()
    }
