"""Warnings and log messages on rank 0, and silenced loggers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_zipit._common.collectives import rank_and_size

LOGGER = "lightning.pytorch.lightning_zipit"
"""A child of Lightning's logger, so that its handlers and level apply."""


def warn_on_rank_zero(text: str) -> None:
    """Issue a warning on rank 0 only."""
    if rank_and_size()[0] == 0:
        warnings.warn(text, stacklevel=3)


def inform_on_rank_zero(text: str) -> None:
    """Log a message on rank 0 only."""
    if rank_and_size()[0] == 0:
        logging.getLogger(LOGGER).info(text)


@contextmanager
def quiet(package: str = "lightning.pytorch") -> Iterator[None]:
    """Silence info messages of a package's logger, which a sweep would repeat for each setting."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
