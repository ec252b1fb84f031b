"""The private corners of Lightning and argparse that cannot be avoided, in one place."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)

INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
"""The functions that Lightning names in checkpoints to make the hyperparameters of a command line again."""

MARKUP = re.compile(r"(?::\w+:`~?([\w.]+)`)|``([^`]*)``")


@contextmanager
def recorded(hyperparameters: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``save_hyperparameters`` keeps these, as under LightningCLI, instead of what a constructor is given."""
    with _given_hyperparameters_context(dict(hyperparameters), INSTANTIATORS[0]):
        yield


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Why the Trainer's strategy cannot calibrate, for people; ``None`` where it can."""
    strategy = trainer.strategy
    if isinstance(strategy, SHARDING):
        return (
            f"{type(strategy).__name__} shards parameters, and merging needs whole ones: merge with "
            f"strategy='ddp' or on one "
            "device, then train or test the merged module under any strategy."
        )
    return None


def attach(trainer: Trainer, module: LightningModule) -> None:
    """Give a Trainer a module, without the optimizers of one that it has trained: what it saves is of this module."""
    trainer.strategy.connect(module)
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []


def spawns_processes(trainer: Trainer) -> bool:
    """Whether the Trainer runs in processes of its own, which end with all that they hold."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def forget_compilation(model: Any) -> None:
    """Take off the compiled steps that a Trainer gives a LightningModule which `torch.compile` was called on."""
    if getattr(model, "_compiler_ctx", None) is not None:
        for step in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            model.__dict__.pop(step, None)
        model._compiler_ctx = None


def count_samples(loader: Any) -> int | None:
    """How many samples all processes together are to be given; ``None`` where that is not known."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)  # inside Lightning's wrapper
    if type(batches) is not BatchSampler or batches.drop_last:
        return None
    drawn_from: Any = batches.sampler
    if isinstance(drawn_from, DistributedSampler):
        drawn_from = drawn_from.dataset
    try:
        return len(drawn_from)
    except TypeError:
        return None


def predict_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that ``trainer.predict`` runs over, one by one."""
    loaders = trainer.predict_dataloaders
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def subcommand_parsers(cli: LightningCLI) -> dict[str, LightningArgumentParser]:
    """The parser of each subcommand."""
    return cli._subcommand_parsers


def make_optional(parser: LightningArgumentParser, name: str) -> list[str]:
    """Let an argument, and those below it, be left out.

    Returns:
        Which of them were required.
    """
    required = [action for action in parser._actions if action.required and f"{action.dest}.".startswith(f"{name}.")]
    for action in required:
        action.required = False
    by_class_path = name in parser._extra_required_keys
    parser._extra_required_keys.discard(name)
    return [name] * by_class_path + [action.dest for action in required]


def ignore_others(parser: LightningArgumentParser, other: LightningArgumentParser) -> None:
    """Let a command read a configuration of another one: what only that takes is ignored."""
    known = {action.dest for action in parser._actions}
    for name in {action.dest for action in other._actions} - known:
        if "." not in name:
            parser.add_argument(f"--{name}", help=SUPPRESS)


def make_switches(parser: LightningArgumentParser) -> None:
    """Let yes-or-no options stand without a value, for yes."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool and "." not in action.dest:
            action.nargs, action.const = "?", True


def strip_markup(parser: LightningArgumentParser) -> None:
    """Remove the markup of docstrings from the help texts of a parser, where ``None`` is ``null``."""
    for action in parser._actions:
        if isinstance(action.help, str):
            action.help = MARKUP.sub(r"\1\2", action.help.replace("``None``", "null"))


def add_trust(parser: LightningArgumentParser) -> None:
    """Let a command that reads a checkpoint be told what that may name, and not unpickle it unless it is told to."""
    parser.add_argument(
        "--trust",
        type=list[str] | str | None,
        default=None,
        help="Modules or classes by dotted name that the checkpoint may name, such as my_project.",
    )
    if any(action.dest == "weights_only" for action in parser._actions):
        parser.set_defaults({"weights_only": True})


def show_first(parser: LightningArgumentParser, titles: Mapping[str, str | None]) -> None:
    """Move groups behind the general options in the help of a command.

    Args:
        parser: the parser of the command.
        titles: name of an argument of the group → a new title, or ``None`` to keep its own.
    """
    groups: Any = parser._action_groups
    for name, title in reversed(list(titles.items())):
        for group in [group for group in groups if any(action.dest == name for action in group._group_actions)]:
            group.title = title or group.title
            groups.remove(group)
            groups.insert(2, group)  # argparse begins with positional arguments and options
