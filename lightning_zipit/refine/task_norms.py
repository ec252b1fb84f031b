"""Batch norm per task inside a shared trunk."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._matching.maps import Maps, apply_maps, of_one_model
from lightning_zipit._merging.dense import moments_under, set_moments
from lightning_zipit.graph.part import Part, graph_of, set_graph
from lightning_zipit.graph.table import Row, Table, bind

TASK = "task"
"""Name of the trunk's input for the task name, if the trunk has a batch norm per task."""


class TaskNorms(nn.ModuleDict):
    """One norm per task, in place of a single norm.

    Args:
        norm: the norm that is copied for each task.
        tasks: the names of the tasks.
    """

    def __init__(self, norm: nn.Module, tasks: Iterable[str]) -> None:
        super().__init__({task: copy.deepcopy(norm) for task in tasks})

    def forward(self, input: Tensor, task: str) -> Tensor:
        return self[task](input)


def find_norms(module: nn.Module, nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Find calls of batch norms with running statistics, without norms whose parameters are also read elsewhere.

    Args:
        module: the network.
        nodes: nodes of its graph.
    """
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    return [
        node
        for node in nodes
        if node.op == "call_module"
        and isinstance(norm := module.get_submodule(str(node.target)), _BatchNorm)
        and norm.track_running_stats
        and node.target not in read
    ]


def give_norms(trunk: Part, tasks: Collection[str]) -> None:
    """Replace the batch norms of a trunk by one batch norm per task. The task name becomes the trunk's last input.

    Args:
        trunk: a trunk without batch norm per task, which is changed in place.
        tasks: the names of the tasks.
    """
    graph = graph_of(trunk)
    calls = find_norms(trunk, list(graph.nodes))
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(last):
        task = graph.placeholder(TASK)
    for name in dict.fromkeys(str(call.target) for call in calls):
        owner, _, attribute = name.rpartition(".")
        setattr(trunk.get_submodule(owner), attribute, TaskNorms(trunk.get_submodule(name), tasks))
    for call in calls:
        call.kwargs = {**call.kwargs, TASK: task}
    graph.lint()
    set_graph(trunk, graph)


def set_affine(
    trunk: nn.Module,
    networks: Mapping[str, nn.Module],
    axes: Table,
    maps: Maps,
    models: Mapping[str, int],
) -> None:
    """Set scale and shift of each task's norms to the mean over the task's features in each cluster.

    A merged feature whose cluster has no feature of the task gets scale and shift 0.

    Args:
        trunk: a trunk after :func:`give_norms`.
        networks: the source networks by task.
        axes: the table of axes.
        maps: the map of each space.
        models: the model index of each task.
    """
    own = {name: module for name, module in trunk.named_modules() if isinstance(module, TaskNorms)}
    with torch.no_grad():
        for task, network in networks.items():
            source = models[task]
            own_maps = of_one_model(maps, source)
            rows = {id(tensor): row for _, tensor, row in bind(axes, network)}
            for name, norms in own.items():
                _set_norm(norms[task], network.get_submodule(name), rows, own_maps, source)


def _set_norm(norm: nn.Module, own: nn.Module, rows: Mapping[int, Row], maps: Maps, source: int) -> None:
    """Set the norm of one task from the norm of its source. ``rows`` holds table rows by the id of a source tensor."""
    (ref,) = rows[id(own.weight)] if own.weight is not None else (None,)
    if ref is not None and maps[ref.spaces[0]].mixes:
        set_moments(norm, *moments_under(maps[ref.spaces[0]], source, own))
        return
    for name, parameter in norm.named_parameters():
        copied = own.get_parameter(name)
        parameter.copy_(apply_maps(copied, rows[id(copied)], maps, source))


def has_task_norms(trunk: nn.Module) -> bool:
    """Whether a trunk has a batch norm per task, and so takes the task name as its last input."""
    return any(isinstance(module, TaskNorms) for module in trunk.modules())
