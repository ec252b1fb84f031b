"""The command line: a user's own LightningCLI gains ``merge`` and ``sweep``; ``lightning-zipit`` is for any class."""

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
from lightning_zipit._lightning.files.descriptions import build_module, describe_checkpoint
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
    "fit": "%(prog)s [option ...]",
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
"""The subcommands whose models are those of several checkpoints."""

MERGED_HINT = "A merged checkpoint as --ckpt_path needs no model, and data with one loader per task."


class ZipItCLI(LightningCLI):
    """A drop-in for LightningCLI, with ``merge`` and ``sweep`` beside ``fit``, ``validate``, ``test`` and ``predict``.

    ``merge`` and ``sweep`` need no arguments of the model where checkpoints hold hyperparameters. ``validate``,
    ``test`` and ``predict`` also take a merged checkpoint as ``--ckpt_path``: the model is then read from it. A
    subclass may have ``before_merge`` and ``after_merge``, as one of LightningCLI has ``before_fit`` and its kin; after
    a merge, ``self.trainer.lightning_module`` is the merged module.

    As under LightningCLI, the hyperparameters of a checkpoint come before the model's arguments. Of what they name,
    only what the command line names too or ``--trust`` allows is imported and called. The configuration that is saved
    holds the arguments, with the path of the checkpoint.

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
            raise ConfigurationError(f"`trainer_class` must be a ZipItTrainer, got {trainer_class.__name__}.")
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
        """Those of LightningCLI, ``merge`` and ``sweep``, each with the arguments that are no options."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in MERGING}}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parser; with its default matcher spelled out, ``--matcher.alpha`` needs no ``--matcher``."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:
            return
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
            if name != "fit":  # for the others, a checkpoint can say what the model is
                self._required[name] = make_optional(parser, "model")
            if name in MERGING:
                ignore_others(parser, parsers["fit"])
            else:
                add_trust(parser)
            if name not in ("fit", *MERGING):
                parser.description = f"{(parser.description or name).rstrip('.')}. {MERGED_HINT}"

    def _make_matcher(self, matcher_class: type[Matcher], *args: Any, **kwargs: Any) -> Matcher:
        try:
            return matcher_class(*args, **kwargs)
        except (TypeError, ValueError) as error:
            subcommand_parsers(self)[str(self.config.subcommand)].error(f"--matcher {matcher_class.__name__}: {error}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and read the file that ``--ckpt_path`` names.

        LightningCLI would import and call whatever the file names: it is told the path once the model is made.
        """
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        given = self.config[subcommand] if subcommand else {}
        path = given.get("ckpt_path")
        if subcommand in MERGING:
            given["ckpt_path"] = None  # of a configuration of `fit`
            return
        if not path or not Path(path).is_file():
            return
        self._checkpoint = read_checkpoint(path, "cpu", given.get("weights_only") is not False)
        self._ckpt_path, given["ckpt_path"] = path, None
        if find_record(self._checkpoint) is None:
            if describe_checkpoint(self._checkpoint)["class_path"] is None:
                self._require("model")
        elif subcommand == "fit":
            raise ConfigurationError(f"{path} is a merged checkpoint, which is not trained: test or predict with it.")

    def _missing(self) -> list[str]:
        """The arguments of the model that are not given and have no default."""
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
        """Make the classes; the model is made from the checkpoint, or is its class where arguments are missing."""
        trained = self._ckpt_path is not None and find_record(self._checkpoint) is None
        if trained:
            self.config[self.subcommand]["ckpt_path"] = self._ckpt_path
        model = self._find_model()
        if model is not None:
            self.auto_configure_optimizers &= trained
            known = self.model_class if isinstance(self.model_class, type) else LightningModule
            self.parser.add_instantiator(lambda *_, **__: model, known, subclasses=True, prepend=True)
        super().instantiate_classes()
        if model is not None:
            self.model = model

    def _find_model(self) -> LightningModule | type[LightningModule] | None:
        """What stands in for the model that the arguments describe; ``None`` to make that."""
        if find_record(self._checkpoint) is not None:
            return MultiHeadModule.restore(self._checkpoint, str(self._ckpt_path), self._trust())
        description = describe_checkpoint(self._checkpoint)
        said = {"model"} if description["class_path"] else set()
        said |= {f"model.{name}" for name in description["hyperparameters"]}
        missing = [name for name in self._missing() if name not in said]
        if self.subcommand not in MERGING:
            self._require(*missing)
        if description["hyperparameters"] or description["class_path"]:
            return self._make_model(description)
        return self.model_class if missing and isinstance(self.model_class, type) else None

    def _make_model(self, description: Mapping[str, Any]) -> LightningModule:
        """The model that a checkpoint describes, with the command line's arguments where it says nothing."""
        where, trust = str(self._ckpt_path), self._trust()
        with naming_file(where, "is damaged"):
            class_path, arguments = self._model_arguments()
            named = find_object(class_path) if class_path else None
            own_class = None if self.subclass_mode_model else self.model_class
            found = find_model_class(description, named, own_class, where, None, trust.naming(named))
        with naming_file(where, f"cannot be loaded into {found.__name__}"):
            return build_module(found, description, trust, arguments if found in (named, own_class) else {})

    def _model_arguments(self) -> tuple[str | None, dict[str, Any]]:
        """Class path and arguments of the model, as they stand on the command line."""
        given = self.config[self.subcommand].get("model")
        described = namespace_to_dict(given) if given is not None else {}
        if not self.subclass_mode_model:
            missing = self._missing()
            return None, {name: value for name, value in described.items() if f"model.{name}" not in missing}
        return described.get("class_path"), {**described.get("init_args", {}), **described.get("dict_kwargs", {})}

    def _trust(self) -> Trust:
        """What files may name: what ``--trust`` says, and what the command line names for the model."""
        class_path, arguments = self._model_arguments()
        return Trust.of(self.config[self.subcommand].get("trust"), self.model_class, class_path, *find_given(arguments))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in MERGING:
            kwargs["trust"] = self._trust()
        return kwargs

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; a merge writes one file only, so it saves no configuration and has no default logger."""
        if self.subcommand in MERGING:
            self.save_config_callback = None
            if self.config_init[self.subcommand]["trainer"].get("logger", False) is None:
                kwargs.setdefault("logger", False)
        return super().instantiate_trainer(**kwargs)


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "export": export}

DESCRIPTION = """Merges trained LightningModules into one network with a head per task, without training."""

EPILOG = """Two more commands need no data: "inspect" shows what a merge would tie together, and "export" writes a
merged checkpoint as ONNX or torch.export's .pt2. Every option of the others can also come from a YAML file (--config)
or from the environment: --trainer.devices of merge is PL_MERGE__TRAINER__DEVICES."""


def main(args: ArgsType = None) -> None:
    """Run ``lightning-zipit``: :class:`ZipItCLI` for any model class and data module, given by class path.

    Args:
        args: the command line; that of the process by default.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed script does not see the user's modules beside it
    words: list[str] = sys.argv[1:] if args is None else args if isinstance(args, list) else []
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        asks = not {"-h", "--help"}.isdisjoint(words)
        settings = {"prog": "lightning-zipit", "description": DESCRIPTION, "epilog": EPILOG}
        ZipItCLI(args=args, parser_kwargs={**settings, "default_env": not asks})  # help is short without the names
        return
    try:
        name = command.__name__
        auto_cli(command, args=words[1:], as_positional=False, prog=f"lightning-zipit {name}", usage=USAGES[name])
    except ZipItError as error:
        sys.exit(f"error: {error}")
