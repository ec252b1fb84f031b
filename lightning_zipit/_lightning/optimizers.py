"""Results of ``configure_optimizers``: their optimizers, their schedulers, and additional parameters for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer


def list_optimizers(made: Any) -> list[Optimizer]:
    """List the optimizers in what ``configure_optimizers`` returned."""
    if isinstance(made, Optimizer):
        return [made]
    if isinstance(made, Mapping):
        return list_optimizers(made.get("optimizer"))
    if isinstance(made, (list, tuple)):
        return [optimizer for each in made for optimizer in list_optimizers(each)]
    return []


def list_schedulers(made: Any, configs: bool = False) -> list[Any]:
    """List the schedulers in what ``configure_optimizers`` returned.

    Args:
        made: what it returned.
        configs: list the dicts that configure a scheduler, instead of the schedulers.
    """
    found: list[Any] = []
    if isinstance(made, dict) and "scheduler" in made:
        return [made] if configs else list_schedulers(made["scheduler"])
    if isinstance(made, dict):
        found = list_schedulers(made.get("lr_scheduler"), configs)
        if configs and "monitor" in made and made.get("lr_scheduler") is not None:
            found.append(made)
    elif isinstance(made, (list, tuple)):
        found = [scheduler for each in made for scheduler in list_schedulers(each, configs)]
    elif made is not None and not isinstance(made, Optimizer) and not configs:
        found = [made]
    return found


def add_groups(optimizers: Sequence[Optimizer], others: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Add to optimizers the parameters of other optimizers that they lack, with the options of their groups.

    Args:
        optimizers: the optimizers.
        others: the optimizers of another source module, in the same order.
        schedulers: the schedulers of the optimizers.
    """
    known = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    for number, other in enumerate(others):
        optimizer = optimizers[min(number, len(optimizers) - 1)]
        for place, group in enumerate(other.param_groups):
            new = [parameter for parameter in group["params"] if id(parameter) not in known]
            if not new:
                continue
            known |= set(map(id, new))
            options = optimizer.param_groups[min(place, len(optimizer.param_groups) - 1)]
            optimizer.add_param_group(
                {**options, **{key: group[key] for key in group if key in options}, "params": new}
            )
            for scheduler in _flat(schedulers):
                if getattr(scheduler, "optimizer", None) is optimizer:
                    _add_to_scheduler(scheduler, place, optimizer.param_groups[-1])


def _flat(schedulers: Sequence[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))


def _add_to_scheduler(scheduler: Any, place: int, group: Mapping[str, Any]) -> None:
    """Let a scheduler change the learning rate of a further group as that of the group at a place."""
    first_rate = group.get("initial_lr", group["lr"])
    for name, value in (("base_lrs", first_rate), ("_last_lr", group["lr"])):
        if isinstance(known := getattr(scheduler, name, None), list):
            known.append(value)
    for name in ("lr_lambdas", "min_lrs"):  # one entry per group
        if isinstance(known := getattr(scheduler, name, None), list):
            known.append(known[min(place, len(known) - 1)])
