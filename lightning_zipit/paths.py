"""Forward of merged networks: stem → trunk → head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import Structure
from lightning_zipit._common.views import Inputs
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.refine.task_norms import has_task_norms


class AllHeads(nn.Module):
    """Stems, trunk and heads as one network, which returns the outputs of all tasks.

    Args:
        trunk: the shared part. It maps the input, or the output of a stem, to a tuple of the inputs of the heads. A
            trunk with a batch norm per task also takes the task name.
        heads: the last part of each task's network.
        stems: the first part of each task's network, which returns a tuple of the inputs of the trunk; empty if the
            trunk starts at the input.
        arguments: the arguments of the source networks, so that they can be given by position or by keyword.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module] | nn.ModuleDict,
        stems: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
        arguments: Arguments | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads if isinstance(heads, nn.ModuleDict) else nn.ModuleDict(heads)
        self.stems = stems if isinstance(stems, nn.ModuleDict) else nn.ModuleDict(stems)
        self.per_task = has_task_norms(trunk)
        self.arguments = arguments or Arguments()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the outputs by task.

        Args:
            args: the arguments of the networks; or one dict with the input of each task, as for
                :func:`~lightning_zipit._common.views.as_inputs`.
            kwargs: keyword arguments of the networks.
        """
        x = given(args, kwargs, list(self.heads), arguments=self.arguments)
        return run_all(self.stems, self.trunk, self.heads, x, self.per_task)


def given(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tasks: Collection[str],
    takes: Structure | None = None,
    arguments: Arguments | None = None,
) -> Inputs:
    """Return the inputs of a network of several tasks from the arguments of its forward.

    Args:
        args: positional arguments; a single dict by task, if tasks have different inputs.
        kwargs: keyword arguments.
        tasks: the tasks.
        takes: the structure of the arguments of a source network, if it is known.
        arguments: the arguments of a source network.
    """
    bind = (arguments or Arguments()).bind
    if len(args) != 1 or kwargs:
        return bind(Call.of_arguments(args, kwargs))
    x = args[0]
    if not isinstance(x, Mapping):
        return bind(Call.of(x))
    if any(isinstance(value, Call) for value in x.values()):
        return {task: bind(value) for task, value in x.items()}
    whole = bind(Call.of_arguments(args, kwargs))
    by_task = any(task in tasks for task in x) if takes is None else whole.structure != takes
    return {task: bind(Call.of(value)) for task, value in x.items()} if by_task else whole


def run_one(stem: nn.Module | None, trunk: nn.Module, head: nn.Module, x: Call, norms_of: str | None = None) -> Any:
    """Compute the output of one task.

    Args:
        stem: the first part of the network; ``None`` if the trunk starts at the input.
        trunk: the shared part of the network.
        head: the last part of the network.
        x: the input.
        norms_of: the name of the task, for a trunk with a batch norm per task.
    """
    entering = x.tensors if stem is None else stem(*x.tensors)
    return head(*trunk(*entering, *(() if norms_of is None else (norms_of,))))


def run_all(
    stems: Mapping[str, nn.Module] | nn.ModuleDict,
    trunk: nn.Module,
    heads: nn.ModuleDict,
    inputs: Inputs,
    per_task: bool,
) -> dict[str, Any]:
    """Compute the outputs of all heads by task. For a dict of inputs, compute only the outputs of its tasks.

    The trunk runs once for all tasks, unless it has stems, a batch norm per task, or a separate input for each task.

    Args:
        stems: the first part of each task's network; empty if the trunk starts at the input.
        trunk: the shared part of the network.
        heads: the last part of each task's network.
        inputs: one input for all tasks, or one input per task.
        per_task: whether the trunk takes the task name, because it has a batch norm per task.

    Raises:
        ConfigurationError: if an input belongs to an unknown task.
    """
    if isinstance(inputs, Call) and not per_task and not len(stems):
        crossing = trunk(*inputs.tensors)
        return {task: head(*crossing) for task, head in heads.items()}
    views = each_task(inputs, list(heads))
    return {
        task: run_one(stems[task] if len(stems) else None, trunk, heads[task], x, task if per_task else None)
        for task, x in views.items()
    }


def each_task(inputs: Inputs, tasks: Collection[str]) -> dict[str, Call]:
    """Return the inputs by task.

    Args:
        inputs: one input for all tasks, or the inputs of some tasks.
        tasks: the tasks.

    Raises:
        ConfigurationError: if an input belongs to an unknown task.
    """
    views = dict.fromkeys(tasks, inputs) if isinstance(inputs, Call) else dict(inputs)
    if unknown := [task for task in views if task not in tasks]:
        raise ConfigurationError(
            f"The inputs contain the unknown tasks {', '.join(map(repr, unknown))}: the tasks of this network are "
            f"{list(tasks)}."
        )
    return views
