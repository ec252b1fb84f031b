"""Dataloaders of a calibration: one for all tasks, or one per task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler


def opened(loaders: Any) -> Any:
    """Return the loaders in a :class:`CombinedLoader`, by task or in a list. Other loaders are returned unchanged.

    The loaders of a training step for several tasks hold other samples for each task. A calibration reads one after
    the other.
    """
    return loaders.iterables if isinstance(loaders, CombinedLoader) else loaders


def find_loader_problems(loaders: Any, tasks: Sequence[str], why_ordered: str = "") -> list[str]:
    """Find problems of calibration loaders before any batch is read.

    Args:
        loaders: one loader for all tasks, or one loader per task in a sequence or mapping.
        tasks: the tasks.
        why_ordered: the reason why the loaders must not shuffle; empty if they may shuffle.
    """
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        if set(loaders) != set(tasks):
            return [f"`dataloaders` has the keys {list(loaders)}, but the tasks are {list(tasks)}."]
        named = {f"of task {task!r}": loader for task, loader in loaders.items()}
    elif isinstance(loaders, (list, tuple)):
        if len(loaders) != len(tasks):
            return [
                f"`dataloaders` lists {len(loaders)} loaders for {len(tasks)} tasks. Give one loader per task in the "
                f"order {list(tasks)}, or a single loader (not in a list) for all tasks."
            ]
        named = {f"of task {task!r}": loader for task, loader in zip(tasks, loaders, strict=True)}
    else:
        named = {"of all tasks": loaders}
    problems = [f"The dataloader {where} is empty." for where, loader in named.items() if length_of(loader) == 0]
    shuffled = [where for where, loader in named.items() if why_ordered and _is_shuffled(loader)]
    return [*problems, *(f"The dataloader {where} shuffles: {why_ordered}. Use shuffle=False." for where in shuffled)]


def list_loaders(loaders: Any, tasks: Sequence[str]) -> list[Any]:
    """List the loaders in the order of the tasks. A single loader for all tasks becomes a list of one."""
    if isinstance(loaders, Mapping):
        loaders = [loaders[task] for task in tasks]
    elif not isinstance(loaders, (list, tuple)):
        loaders = [] if loaders is None else [loaders]
    return [Batches(loader) if isinstance(loader, (list, tuple)) else loader for loader in loaders]


class Batches:
    """A list of batches as a loader. Lightning would treat a plain list as several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def length_of(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None  # an iterable of unknown length


def _is_shuffled(loader: Any) -> bool:
    return isinstance(getattr(loader, "sampler", None), (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def in_fixed_order(loaders: Any) -> Any:
    """Return training loaders without shuffling. Other loaders are returned unchanged."""
    if isinstance(loaders, Mapping):
        return {key: in_fixed_order(loader) for key, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [in_fixed_order(loader) for loader in loaders]
    if not isinstance(loaders, DataLoader) or not isinstance(loaders.sampler, RandomSampler):
        return loaders
    return DataLoader(
        loaders.dataset,
        batch_size=loaders.batch_size,
        num_workers=loaders.num_workers,
        collate_fn=loaders.collate_fn,
        pin_memory=loaders.pin_memory,
        timeout=loaders.timeout,
        worker_init_fn=loaders.worker_init_fn,
        multiprocessing_context=loaders.multiprocessing_context,
    )
