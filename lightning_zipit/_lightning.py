"""The private corners of Lightning that cannot be avoided, in one place."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Why the Trainer's strategy cannot calibrate, for people; ``None`` where it can."""
    strategy = trainer.strategy
    if isinstance(strategy, SHARDING):
        return (
            f"{type(strategy).__name__} shards parameters, and merging needs whole ones: merge with "
            f"strategy='ddp' or on one "
            "device, then train or test the merged module under any strategy."
        )
    if type(strategy.launcher).__name__ == "_MultiProcessingLauncher":
        return (
            "A strategy that spawns or forks processes loses the merged module with them: use strategy='ddp' "
            "from a script, "
            "or one device."
        )
    return None


def predict_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that ``trainer.predict`` runs over, one by one."""
    loaders = trainer.predict_dataloaders
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
