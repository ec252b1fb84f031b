"""Random numbers that are the same each time, without a trace in the caller's generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed all generators within the context, and restore them on exit.

    Args:
        seed: the seed.
    """
    with torch.random.fork_rng():
        if _has_accelerator():
            torch.manual_seed(seed)
        else:  # torch.manual_seed would keep a stack trace for each device that may be initialized later
            torch.default_generator.manual_seed(seed)
        yield


@cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
