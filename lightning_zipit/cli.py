"""The command line: a user's own LightningCLI gains ``merge``, and ``lightning-zipit`` has it for any model class."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback

from lightning_zipit.errors import ConfigurationError, ZipItError
from lightning_zipit.trainer import ZipItTrainer


class ZipItCLI(LightningCLI):
    """A drop-in for LightningCLI, with ``merge`` beside ``fit``, ``validate``, ``test`` and ``predict``.

    An error that this package raises on purpose ends the command with its message and exit code 1, without a traceback.

    Args:
        model_class: the class of the models; ``None`` to name it as ``--model``.
        datamodule_class: the class of the data module; ``None`` to name it as ``--data``.
        save_config_callback: writes the configuration of ``fit`` and its kin to the log folder; a merge has none.
        save_config_kwargs: its arguments.
        trainer_class: a :class:`~lightning_zipit.ZipItTrainer`, or a function that returns one.
        kwargs: as for :class:`~lightning.pytorch.cli.LightningCLI`.

    Example:
        In ``main.py``::

            ZipItCLI(LitClassifier, MyDataModule)

        and then, besides ``python main.py fit …``::

            python main.py merge --checkpoints.animals a.ckpt --checkpoints.vehicles b.ckpt --backbone net
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = ZipItTrainer,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(trainer_class, type) and not issubclass(trainer_class, ZipItTrainer):
            raise ConfigurationError(f"`trainer_class` must be a ZipItTrainer, got {trainer_class.__name__}.")
        try:
            super().__init__(
                model_class, datamodule_class, save_config_callback, save_config_kwargs, trainer_class, *args, **kwargs
            )
        except ZipItError as error:
            sys.exit(f"error: {error}")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI, and ``merge``, each with the arguments that are no options."""
        return {**LightningCLI.subcommands(), "merge": {"model", "datamodule"}}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parser; with its default matcher spelled out, ``--matcher.alpha`` needs no ``--matcher``."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if add_subcommands:
            self.parser.set_defaults({"merge.matcher": {"class_path": "lightning_zipit.matchers.GreedyZip"}})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; a merge writes one file only, so it saves no configuration and has no default logger."""
        if self.subcommand == "merge":
            self.save_config_callback = None
            if self.config_init["merge"]["trainer"].get("logger", False) is None:
                kwargs.setdefault("logger", False)
        return super().instantiate_trainer(**kwargs)


def main(args: ArgsType = None) -> None:
    """Run ``lightning-zipit``: :class:`ZipItCLI` for any model class and data module, given by class path.

    Args:
        args: the command line; that of the process by default.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed script does not see the user's modules beside it
    ZipItCLI(args=args)
