"""Command line: a LightningCLI with ``merge`` and ``sweep``, and the command ``lightning-zipit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli, namespace_to_dict
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_zipit._lightning.commands import export, inspect
from lightning_zipit._lightning.files.checkpoint import find_record, naming_file, read_checkpoint
from lightning_zipit._lightning.files.descriptions import build_module, describe_checkpoint, make_given
from lightning_zipit._lightning.files.hyperparameters import find_given
from lightning_zipit._lightning.files.loading import find_model_class
from lightning_zipit._lightning.files.names import find_object
from lightning_zipit._lightning.files.trust import Trust
from lightning_zipit._lightning.internals import (
    add_trust,
    ignore_others,
    make_optional,
    make_switches,
    show_first,
    strip_markup,
    subcommand_parsers,
)
from lightning_zipit._lightning.multihead import MultiHeadModule
from lightning_zipit._lightning.trainer import ZipItTrainer
from lightning_zipit.errors import ConfigurationError, ZipItError
from lightning_zipit.matchers import Matcher

USAGES = {
    "fit": "%(prog)s [--ckpt_path FILE] [option ...]",
    "validate": "%(prog)s [--ckpt_path FILE] [option ...]",
    "test": "%(prog)s [--ckpt_path FILE] [option ...]",
    "predict": "%(prog)s [--ckpt_path FILE] [option ...]",
    "merge": "%(prog)s --checkpoints.TASK FILE --checkpoints.TASK FILE ... [--backbone NAME] [--stop_at NAME] "
    "[--output FILE] [option ...]",
    "sweep": "%(prog)s --checkpoints.TASK FILE --checkpoints.TASK FILE ... [--backbone NAME] [--metric NAME] "
    "[--stop_at '[NAME, NAME]'] [--alpha '[NUMBER, NUMBER]'] [--results FILE] [option ...]",
    "inspect": "%(prog)s [--ckpt_path FILE] [--model CLASS] [--backbone NAME] [--start_at NAME] [--stop_at NAME] "
    "[option ...]",
    "export": "%(prog)s --ckpt_path FILE --output FILE [--batch_size NUMBER]",
}

MERGING = ("merge", "sweep")
"""The subcommands that read their models from several checkpoints."""

MERGED_HINT = "If --ckpt_path is a merged checkpoint, omit the model, and give data with one loader per task."


class ZipItCLI(LightningCLI):
    """A drop-in replacement for LightningCLI with the additional subcommands ``merge`` and ``sweep``.

    ``merge`` and ``sweep`` need no arguments of the model if the checkpoints hold hyperparameters. ``fit``,
    ``validate``, ``test`` and ``predict`` also accept a merged checkpoint as ``--ckpt_path``, and read the model from
    it. ``fit`` fine-tunes it, and resumes if the checkpoint holds the states of optimizers. A subclass may define
    ``before_merge`` and ``after_merge``, like ``before_fit`` and ``after_fit`` of LightningCLI. After a merge,
    ``self.trainer.lightning_module`` is the merged module.

    As in LightningCLI, the hyperparameters of a checkpoint override the model's arguments. A class or function that the
    hyperparameters name is imported and called only if the command line names it too, or ``--trust`` allows it. The
    saved configuration holds the arguments, including the path of the checkpoint.

    An error that this package raises on purpose ends the command with its message and exit code 1, without a traceback.

    Args:
        model_class: the class of the models; ``None`` to give it as ``--model``.
        datamodule_class: the class of the data module; ``None`` to give it as ``--data``.
        save_config_callback: writes the configuration to the log folder, except for ``merge`` and ``sweep``.
        save_config_kwargs: the arguments of ``save_config_callback``.
        trainer_class: a :class:`~lightning_zipit.ZipItTrainer`, or a function that returns one.
        kwargs: as for :class:`~lightning.pytorch.cli.LightningCLI`.

    Example:
        In ``main.py``::

            ZipItCLI(LitClassifier, MyDataModule)

        The command then accepts, in addition to ``python main.py fit …``::

            python main.py merge --checkpoints.animals a.ckpt --checkpoints.vehicles b.ckpt --backbone net
            python main.py test --ckpt_path merged.ckpt
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
            raise ConfigurationError(
                f"`trainer_class` must be ZipItTrainer or a subclass of it, got {trainer_class.__name__}."
            )
        self._required: dict[str, list[str]] = {}
        self._ckpt_path: str | None = None
        self._checkpoint: dict[str, Any] = {}
        try:
            super().__init__(
                model_class, datamodule_class, save_config_callback, save_config_kwargs, trainer_class, *args, **kwargs
            )
        except ZipItError as error:
            sys.exit(f"error: {error}")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments of the Trainer's method that are not flags."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in MERGING}}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parsers of all subcommands."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:
            return
        # With an explicit default matcher, `--matcher.alpha` works without `--matcher`.
        self.parser.set_defaults({"merge.matcher": {"class_path": "lightning_zipit.matchers.GreedyZip"}})
        self.parser.add_instantiator(self._make_matcher, Matcher, subclasses=True)
        parsers = subcommand_parsers(self)
        for name in MERGING:
            make_switches(parsers[name])
            strip_markup(parsers[name])
        for name, parser in parsers.items():
            parser.usage = parser.usage or USAGES.get(name)
            titles = {
                "checkpoints": "What to merge, and how",
                "ckpt_path": "What to run on",
                "model": None if self.model_class else "The model, by class path",
                "data": None if self.datamodule_class else "The data module, by class path",
            }
            show_first(parser, titles)
            self._required[name] = make_optional(parser, "model")  # it can be read from a checkpoint
            if name in MERGING:
                ignore_others(parser, parsers["fit"])
            else:
                add_trust(parser)
            if name not in MERGING:
                parser.description = f"{(parser.description or name).rstrip('.')}. {MERGED_HINT}"

    def _make_matcher(self, matcher_class: type[Matcher], *args: Any, **kwargs: Any) -> Matcher:
        try:
            return matcher_class(*args, **kwargs)
        except (TypeError, ValueError) as error:
            subcommand_parsers(self)[str(self.config.subcommand)].error(f"--matcher {matcher_class.__name__}: {error}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and read the file of ``--ckpt_path``.

        LightningCLI would import and call everything that the file names. It therefore gets the path only after this
        class has made the model.
        """
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        given = self.config[subcommand] if subcommand else {}
        path = given.get("ckpt_path")
        if subcommand in MERGING:
            given["ckpt_path"] = None  # from a configuration of `fit`
            return
        if not path or not Path(path).is_file():
            return
        self._checkpoint = read_checkpoint(path, "cpu", given.get("weights_only") is not False)
        self._ckpt_path, given["ckpt_path"] = path, None
        if find_record(self._checkpoint) is None and describe_checkpoint(self._checkpoint)["class_path"] is None:
            self._require("model")

    def _missing(self) -> list[str]:
        """Find arguments of the model that are not given and have no default."""
        subcommand = str(self.config.get("subcommand"))
        required = self._required.get(subcommand, [])
        return [name for name in required if self.config[subcommand].get(name) is None]

    def _require(self, *names: str) -> None:
        """End with a usage error if some of the arguments are missing."""
        listed = ", ".join(f"--{name}" for name in self._missing() if name in names)
        if listed:
            subcommand_parsers(self)[str(self.config.subcommand)].error(
                f"the following arguments are required: {listed}, unless --ckpt_path is a merged checkpoint"
            )

    def instantiate_classes(self) -> None:
        """Make Trainer, model and data module. The model comes from the checkpoint if it describes the model."""
        trained = self._ckpt_path is not None and find_record(self._checkpoint) is None
        if trained or self._checkpoint.get("optimizer_states"):  # a merged module that was trained continues
            self.config[self.subcommand]["ckpt_path"] = self._ckpt_path
        model = self._find_model()
        if model is not None:
            self.auto_configure_optimizers &= trained or self.subcommand == "fit"
            known = self.model_class if isinstance(self.model_class, type) else LightningModule
            self.parser.add_instantiator(lambda *_, **__: model, known, subclasses=True, prepend=True)
        super().instantiate_classes()
        if model is not None:
            self.model = model

    def _find_model(self) -> LightningModule | type[LightningModule] | None:
        """Find the model without LightningCLI: from a checkpoint, or as a class; ``None`` if LightningCLI makes it."""
        if find_record(self._checkpoint) is not None:
            models = make_given(self.config[self.subcommand].get("models"))
            return MultiHeadModule.restore(self._checkpoint, str(self._ckpt_path), self._trust(), models)
        description = describe_checkpoint(self._checkpoint)
        described = {"model"} if description["class_path"] else set()
        described |= {f"model.{name}" for name in description["hyperparameters"]}
        missing = [name for name in self._missing() if name not in described]
        if self.subcommand not in MERGING:
            self._require(*missing)
        if description["hyperparameters"] or description["class_path"]:
            return self._make_model(description)
        return self.model_class if missing and isinstance(self.model_class, type) else None

    def _make_model(self, description: Mapping[str, Any]) -> LightningModule:
        """Make the model of a checkpoint. Arguments of the command line fill in what the checkpoint lacks."""
        where, trust = str(self._ckpt_path), self._trust()
        with naming_file(where, "is damaged"):
            class_path, arguments = self._model_arguments()
            named = find_object(class_path) if class_path else None
            own_class = None if self.subclass_mode_model else self.model_class
            found = find_model_class(description, named, own_class, where, None, trust.naming(named))
        with naming_file(where, f"cannot be loaded into {found.__name__}"):
            return build_module(found, description, trust, arguments if found in (named, own_class) else {})

    def _model_arguments(self) -> tuple[str | None, dict[str, Any]]:
        """Return the class path and the arguments of the model from the command line."""
        given = self.config[self.subcommand].get("model")
        described = namespace_to_dict(given) if given is not None else {}
        if not self.subclass_mode_model:
            missing = self._missing()
            return None, {name: value for name, value in described.items() if f"model.{name}" not in missing}
        return described.get("class_path"), {**described.get("init_args", {}), **described.get("dict_kwargs", {})}

    def _trust(self) -> Trust:
        """Collect what files may refer to: entries of ``--trust``, and names on the command line for the model."""
        class_path, arguments = self._model_arguments()
        return Trust.of(self.config[self.subcommand].get("trust"), self.model_class, class_path, *find_given(arguments))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in MERGING:
            kwargs["trust"] = self._trust()
        return kwargs

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer. For merges, it has no default logger, and the configuration is not saved."""
        if self.subcommand in MERGING:
            self.save_config_callback = None
            if self.config_init[self.subcommand]["trainer"].get("logger", False) is None:
                kwargs.setdefault("logger", False)
        return super().instantiate_trainer(**kwargs)


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "export": export}

DESCRIPTION = """Merge trained LightningModules into one network with a head per task, without training."""

EPILOG = """Two more subcommands need no data: "inspect" prints the feature spaces that a merge would find, and "export"
converts a merged checkpoint to ONNX or torch.export's .pt2. The options of all other subcommands can also be set in a
YAML file (--config) or in environment variables: PL_MERGE__TRAINER__DEVICES sets --trainer.devices of merge."""


def main(args: ArgsType = None) -> None:
    """Run ``lightning-zipit``: :class:`ZipItCLI` for any model class and data module, given by class path.

    Args:
        args: the arguments; by default the arguments of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed script does not search the current folder for the user's modules
    words: list[str] = sys.argv[1:] if args is None else args if isinstance(args, list) else []
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        # The help would be too long with the names of environment variables.
        asks_help = not {"-h", "--help"}.isdisjoint(words)
        settings = {"prog": "lightning-zipit", "description": DESCRIPTION, "epilog": EPILOG}
        ZipItCLI(args=args, parser_kwargs={**settings, "default_env": not asks_help})
        return
    try:
        name = command.__name__
        auto_cli(command, args=words[1:], as_positional=False, prog=f"lightning-zipit {name}", usage=USAGES[name])
    except ZipItError as error:
        sys.exit(f"error: {error}")
