"""Messages to the user: once for all ranks, or not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_zipit._common.collectives import rank_and_size

LOGGER = "lightning.pytorch.lightning_zipit"
"""Messages appear where Lightning's own do, and are silenced with them."""


def warn_on_rank_zero(text: str) -> None:
    """Warn once for all ranks."""
    if rank_and_size()[0] == 0:
        warnings.warn(text, stacklevel=3)


def inform_on_rank_zero(text: str) -> None:
    """Log a message once for all ranks."""
    if rank_and_size()[0] == 0:
        logging.getLogger(LOGGER).info(text)


@contextmanager
def quiet(package: str = "lightning.pytorch") -> Iterator[None]:
    """Silence the information of a package's logger: a sweep would repeat it for each setting."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
