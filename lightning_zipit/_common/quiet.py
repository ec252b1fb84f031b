"""Silences the logger of a package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(package: str = "lightning.pytorch") -> Iterator[None]:
    """Silence the information of a package's logger, which a sweep would repeat for each setting."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
