"""Source networks of a merge, and the models that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Sources:
    """The source networks of a merge.

    A model that is itself the result of a merge has one network per task. These networks share their trunk, and
    therefore count as one model.

    Attributes:
        networks: the source networks by task. They are never changed.
        model_of: the name of the model that each network belongs to, by task.
        weights: the weight of each model, in the order of the models; ``None`` for equal weights.
        base: the network from which all sources were trained, for ``combine``.
    """

    networks: Mapping[str, nn.Module]
    model_of: Mapping[str, str]
    weights: tuple[float, ...] | None = None
    base: nn.Module | None = None

    @property
    def tasks(self) -> list[str]:
        return list(self.networks)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of their first tasks."""
        return tuple(dict.fromkeys(self.model_of[task] for task in self.networks))

    @property
    def numbers(self) -> dict[str, int]:
        """The index of each network's model, by task."""
        return {task: self.models.index(self.model_of[task]) for task in self.networks}

    @property
    def first(self) -> nn.Module:
        """The network of the first task."""
        return next(iter(self.networks.values()))

    @property
    def leads(self) -> dict[str, nn.Module]:
        """The network of each model's first task, by the name of the model."""
        return self.of_models(self.networks)

    def of_models(self, by_task: Mapping[str, Value]) -> dict[str, Value]:
        """Return one value per model: the value of the model's first task.

        Args:
            by_task: a value for each task.

        Returns:
            The values by the names of the models.
        """
        chosen: dict[str, Value] = {}
        for task in self.networks:
            chosen.setdefault(self.model_of[task], by_task[task])
        return chosen
