"""Uses of private interfaces of Lightning and argparse."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)

INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
"""The functions that Lightning names in checkpoints to recreate a module from the hyperparameters of a command line."""

OTHER_NAME = "pytorch_lightning"
"""The package that has all classes of ``lightning.pytorch`` once more, under another name."""

MARKUP = re.compile(r"(?::\w+:`~?([\w.]+)`)|``([^`]*)``")


@contextmanager
def recorded(hyperparameters: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which ``save_hyperparameters`` saves the given hyperparameters, as in LightningCLI.

    Otherwise it would save the arguments of the constructor, which can be objects.
    """
    with _given_hyperparameters_context(dict(hyperparameters), INSTANTIATORS[0]):
        yield


def lightning_modules() -> tuple[type[LightningModule], ...]:
    """Return the LightningModule classes of ``lightning.pytorch`` and, if it is imported, of ``pytorch_lightning``."""
    other = getattr(sys.modules.get(OTHER_NAME), "LightningModule", None)
    return (LightningModule,) if other is None else (LightningModule, other)


def overrides(name: str, module: Any) -> bool:
    """Whether a LightningModule has its own version of a method."""
    return any(is_overridden(name, module, base) for base in lightning_modules() if isinstance(module, base))


def tell_device(module: Any, parent: LightningModule) -> None:
    """Set the device and dtype that a LightningModule of the other package reports: its parent cannot do so."""
    if not isinstance(module, LightningModule):
        module._device, module._dtype = parent.device, parent.dtype


def unsupported_strategy(trainer: Trainer) -> str | None:
    """Explain why the Trainer's strategy cannot be used for a merge; return ``None`` if it can."""
    strategy = trainer.strategy
    if isinstance(strategy, SHARDING):
        return (
            f"{type(strategy).__name__} shards parameters, but merging needs unsharded parameters. Merge with "
            "strategy='ddp' or on one device. The merged module can then be trained and tested with any strategy."
        )
    return None


def attach(trainer: Trainer, module: LightningModule) -> None:
    """Attach a module to a Trainer, so that the Trainer saves it. Optimizers of earlier training are dropped."""
    trainer.strategy.connect(module)
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []


@contextmanager
def logging_batch(trainer: Trainer | None, batch: Any) -> Iterator[None]:
    """Context manager in which logged values are weighted by the size of a batch, when they are averaged."""
    results = trainer._results if trainer is not None else None
    if results is None:
        yield
        return
    before = results.batch, results.batch_size
    results.batch, results.batch_size = batch, None
    try:
        yield
    finally:
        results.batch, results.batch_size = before


def spawns_processes(trainer: Trainer) -> bool:
    """Whether the Trainer spawns processes, whose memory is lost when they end."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def forget_compilation(model: Any) -> None:
    """Remove the compiled steps that a Trainer sets on a LightningModule after `torch.compile`."""
    if getattr(model, "_compiler_ctx", None) is not None:
        for step in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            model.__dict__.pop(step, None)
        model._compiler_ctx = None


def count_samples(loader: Any) -> int | None:
    """Return the number of samples that all processes together should receive; ``None`` if it is unknown."""
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
    """Return the loaders of ``trainer.predict`` as a list."""
    loaders = trainer.predict_dataloaders
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def subcommand_parsers(cli: LightningCLI) -> dict[str, LightningArgumentParser]:
    """Return the parser of each subcommand, by name."""
    return cli._subcommand_parsers


def make_optional(parser: LightningArgumentParser, name: str) -> list[str]:
    """Make an argument and its nested arguments optional.

    Returns:
        The names of those that were required.
    """
    required = [action for action in parser._actions if action.required and f"{action.dest}.".startswith(f"{name}.")]
    for action in required:
        action.required = False
    by_class_path = name in parser._extra_required_keys
    parser._extra_required_keys.discard(name)
    return [name] * by_class_path + [action.dest for action in required]


def ignore_others(parser: LightningArgumentParser, other: LightningArgumentParser) -> None:
    """Let a command read a configuration of another command, and ignore the arguments that it does not have."""
    known = {action.dest for action in parser._actions}
    for name in {action.dest for action in other._actions} - known:
        if "." not in name:
            parser.add_argument(f"--{name}", help=SUPPRESS)


def make_switches(parser: LightningArgumentParser) -> None:
    """Let boolean options be given without a value, as true."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool and "." not in action.dest:
            action.nargs, action.const = "?", True


def strip_markup(parser: LightningArgumentParser) -> None:
    """Remove docstring markup from the help texts of a parser, and write ``null`` for ``None``."""
    for action in parser._actions:
        if isinstance(action.help, str):
            action.help = MARKUP.sub(r"\1\2", action.help.replace("``None``", "null"))


def add_trust(parser: LightningArgumentParser) -> None:
    """Add ``--trust`` and ``--models`` to a command that reads a checkpoint.

    The default of ``--weights_only`` becomes true.
    """
    parser.add_argument(
        "--trust",
        type=list[str] | str | None,
        default=None,
        help="Modules or classes, by dotted name, that the checkpoint may refer to, such as my_project.",
    )
    parser.add_argument(
        "--models",
        type=dict[str, Any] | None,
        default=None,
        help="The class path of the source module of a task, or a dict with class_path and init_args, if a merged "
        "checkpoint does not describe it (--models.TASK=CLASS_PATH).",
    )
    if any(action.dest == "weights_only" for action in parser._actions):
        parser.set_defaults({"weights_only": True})


def show_first(parser: LightningArgumentParser, titles: Mapping[str, str | None]) -> None:
    """Move groups of arguments directly after the general options in the help of a command.

    Args:
        parser: the parser of the command.
        titles: a new title for each group, or ``None`` to keep its title, by the name of an argument in the group.
    """
    groups: Any = parser._action_groups
    for name, title in reversed(list(titles.items())):
        for group in [group for group in groups if any(action.dest == name for action in group._group_actions)]:
            group.title = title or group.title
            groups.remove(group)
            groups.insert(2, group)  # the first two groups are argparse's positional arguments and options
