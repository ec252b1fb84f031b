"""The exceptions of this package: one tree, so that ``except ZipItError`` catches all of them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class ZipItError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(ZipItError, MisconfigurationException, ValueError):
    """What was asked for cannot be done with these models, loaders or this Trainer."""

    @classmethod
    def collect(cls, problems: Sequence[str]) -> ConfigurationError:
        """One error out of all the problems that are known before any data is touched."""
        if len(problems) == 1:
            return cls(problems[0])
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        return cls(f"{len(problems)} problems stand in the way of this merge:\n{listed}")


class TraceError(ZipItError, RuntimeError):
    """The backbone cannot be turned into a merge graph.

    Attributes:
        node: the name of the traced graph's node that stands in the way, if it is one.
    """

    node: str | None = None


class UnknownShapeError(TraceError):
    """A reshape can only be understood when the sizes of its input are known."""


class ArchitectureMismatchError(ConfigurationError):
    """The trunks of two source models are not the same network."""


class VerificationError(TraceError):
    """Permuting a feature space changed what the network computes: its table is wrong."""


class CalibrationError(ZipItError, RuntimeError):
    """The calibration data or the activations that it gives cannot be used."""


class StatisticsError(ZipItError, RuntimeError):
    """A statistics file cannot be read, or does not belong to the models."""


class CheckpointError(ZipItError, RuntimeError):
    """A checkpoint cannot be read, or cannot be turned into a merged module."""


class UntrustedError(CheckpointError):
    """A file names classes or functions that the user has not vouched for; nothing of them was imported or called."""


class RankError(ZipItError, RuntimeError):
    """An error of another process that cannot be raised here as it is.

    It carries the type, the message and the traceback of the original as text.
    """
