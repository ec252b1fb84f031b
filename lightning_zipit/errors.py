"""Exceptions of this package; ``except ZipItError`` catches all of them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class ZipItError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigurationError(ZipItError, MisconfigurationException, ValueError):
    """The request is not possible with these models, options, dataloaders or this Trainer."""

    @classmethod
    def collect(cls, problems: Sequence[str]) -> ConfigurationError:
        """Make one error from all problems that are known before any data is read."""
        if len(problems) == 1:
            return cls(problems[0])
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        return cls(f"{len(problems)} problems prevent this merge:\n{listed}")


class TraceError(ZipItError, RuntimeError):
    """The backbone cannot be turned into a merge graph.

    Attributes:
        node: the name of the node of the traced graph that causes the error; ``None`` if no single node does.
    """

    node: str | None = None


class UnknownShapeError(TraceError):
    """A reshape cannot be analysed because the sizes of its input are unknown."""


class ArchitectureMismatchError(ConfigurationError):
    """The trunks of two source models differ in architecture."""


class VerificationError(TraceError):
    """The proof failed: permuting a feature space changed the outputs, so that its table of axes is wrong."""


class CalibrationError(ZipItError, RuntimeError):
    """The calibration data, or the activations of the models on it, cannot be used."""


class StatisticsError(ZipItError, RuntimeError):
    """A statistics file cannot be read, or does not belong to the models."""


class CheckpointError(ZipItError, RuntimeError):
    """A checkpoint cannot be read, or cannot be turned into a merged module."""


class UntrustedError(CheckpointError):
    """A file names classes or functions that the user does not trust. None of them was imported or called."""


class RankError(ZipItError, RuntimeError):
    """An error of another process that cannot be raised with its own type in this process.

    Its text holds the type, the message and the traceback of the original error.
    """
