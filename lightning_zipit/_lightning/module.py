"""The module that ``trainer.predict`` runs over the calibration data."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_zipit._common.collectives import exchange
from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.files import replacing
from lightning_zipit._common.views import Inputs, any_view, check_views
from lightning_zipit._lightning.internals import count_samples, predict_loaders, spawns_processes
from lightning_zipit._lightning.multihead import MultiHeadModule, split_merged
from lightning_zipit._lightning.sources import (
    DelegatedTransfers,
    find_input,
    find_inputs,
    find_problems,
    get_backbone,
    name_tasks,
)
from lightning_zipit._merging.widths import changes_size
from lightning_zipit.errors import CalibrationError, CheckpointError, ConfigurationError
from lightning_zipit.pipeline import MergeSession
from lightning_zipit.settings import MergeSettings


class ZipItModule(DelegatedTransfers, LightningModule):
    """N source modules on their way to be merged by ``trainer.predict`` and a :class:`~lightning_zipit.ZipItCallback`.

    The sources are copied for the time of the calibration: they are not moved, cast or changed.

    Args:
        models: the source modules by task, or a sequence of them; one that was merged before stands for all its tasks.
        backbone: dotted name of the part to merge, the same in each; ``""`` for the whole ``forward``.
        dataloaders: calibration data: one loader per task (a sequence in the order of the tasks, or a dict), or a
            single loader for all. Labels are never used.
        datamodule: where the loaders come from instead: its ``calibration_dataloader()``, else its
            ``train_dataloader()`` in a fixed order.
        get_input: from a batch to the backbone's input; by default the batch, its first item, or a well-known key.
            Where models take different inputs, from a batch to a dict of views of the same samples, one for each task;
            by default a batch with the tasks as keys is one.
        base: the module that all were trained from, for a merge with ``combine``.

    Attributes:
        merged: the merged module, once ``trainer.predict`` has run.
    """

    def __init__(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        backbone: str = "",
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        get_input: Callable[[Any], Inputs] = find_input,
        base: LightningModule | None = None,
    ) -> None:
        super().__init__()
        # In tuples, so that the user's modules are no submodules: nothing that moves or casts this one reaches them.
        self._given = (name_tasks(models),)
        modules, self.sources = split_merged(self._given[0])
        self._originals = (modules,)
        self._base = (base,)
        self.backbone = backbone
        self.dataloaders = dataloaders
        self.datamodule = datamodule
        self.get_input = get_input
        self.session: MergeSession | None = None
        self._settings = MergeSettings()
        self.copies = nn.ModuleDict()
        self._merged: tuple[MultiHeadModule, ...] = ()
        self._loaders: list[Any] = []
        self._datamodule_trainer: Any = None
        # Where a process that ends with the calibration leaves the merged module for the one that goes on.
        self._handover = Path(tempfile.gettempdir()) / f"lightning-zipit-{uuid.uuid4().hex}.ckpt"
        self._listed = False  # whether trainer.predict runs over our loaders, once for every pass

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """There is no such file, and Lightning would make whatever one that says so names.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{cls.__name__} is not read from a checkpoint: make it from its models.")

    @property
    def models(self) -> dict[str, LightningModule]:
        """The source modules by task; one that was merged before is several."""
        return self._originals[0]

    @property
    def base(self) -> LightningModule | None:
        """The module that all were trained from, where it was given."""
        return self._base[0]

    @property
    def merged(self) -> MultiHeadModule:
        if not self._merged and self._handover.exists():
            self._merged = (self._take_over(),)
        if not self._merged:
            raise ConfigurationError("There is no merged module yet: run trainer.predict with a ZipItCallback first.")
        return self._merged[0]

    @property
    def is_merged(self) -> bool:
        """Whether there is a merged module."""
        return bool(self._merged)

    @property
    def needs_no_data(self) -> bool:
        """Whether a merge is prepared that goes through no data: its statistics were gathered before."""
        return self.session is not None and self.session.passes == 0 and not self.is_merged

    def prepare(self, settings: MergeSettings, problems: Sequence[str] = ()) -> None:
        """Start a merge: look for everything that stands in its way, trace, and copy the sources.

        Raises:
            ConfigurationError: with all problems that were found.
        """
        self._merged, self._listed, self._settings = (), False, settings
        self._datamodule_trainer = self.datamodule.trainer if self.datamodule is not None else None
        (base,) = self._base
        unfit = find_problems(self.models if base is None else {**self.models, "base": base}, self.backbone)
        for name, model in self._given[0].items():
            if isinstance(model, MultiHeadModule):
                unfit += [f"Model {name!r}: {problem}" for problem in model.find_problems(self.backbone, settings)]
        found = [*problems, *unfit, *self._loader_problems(self.dataloaders)]
        if self.dataloaders is not None and self.datamodule is not None:
            found.append("Both `dataloaders` and `datamodule` were given: give one of them.")
        if len(self._given[0]) == 1 and not changes_size(settings.width):
            found.append("One model alone cannot be merged: give at least two, or fold it with a `width` below 1.")
        if not unfit:
            networks = {task: get_backbone(model, self.backbone) for task, model in self.models.items()}
            try:
                start = None if base is None else get_backbone(base, self.backbone)
                self.session = MergeSession(networks, settings, start, self.sources)
            except ConfigurationError as error:
                if not found:
                    raise
                found.append(str(error))
        if found:
            raise ConfigurationError.collect(found)
        shared: dict[int, Any] = {}  # what models have in common, their copies have too
        self.copies = nn.ModuleDict({task: copy_module(model, shared) for task, model in self.models.items()})
        self.copies.eval().requires_grad_(False)

    def release(self) -> None:
        """Drop the copies of the sources."""
        self.copies = nn.ModuleDict()
        self.session = None
        if self.datamodule is not None:
            self.datamodule.trainer = self._datamodule_trainer

    # Data

    def prepare_data(self) -> None:
        if self.datamodule is not None:
            self.datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        if self.session is None:
            raise ConfigurationError(
                "A ZipItModule is run by a Trainer with a ZipItCallback: Trainer(callbacks=[ZipItCallback()])."
            )
        loaders = self.dataloaders
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.datamodule.setup("fit")
            own = getattr(self.datamodule, "calibration_dataloader", None)
            loaders = own() if own else _in_fixed_order(self.datamodule.train_dataloader())
            if problems := self._loader_problems(loaders):
                raise ConfigurationError.collect(problems)
        if isinstance(loaders, Mapping):
            loaders = [loaders[task] for task in self.models]
        elif not isinstance(loaders, (list, tuple)):
            loaders = [] if loaders is None else [loaders]
        self._loaders = [Batches(loader) if isinstance(loader, (list, tuple)) else loader for loader in loaders]

    def predict_dataloader(self) -> Any:
        """The calibration loaders, listed once for every pass."""
        # Nothing may fail here: Lightning leaves DataLoader patched when this hook raises.
        assert self.session is not None
        self._listed = True
        return [loader for _ in range(self.session.passes) for loader in self._loaders]

    def _loader_problems(self, loaders: Any) -> list[str]:
        if loaders is None:
            return []
        if isinstance(loaders, Mapping):
            if set(loaders) != set(self.models):
                return [f"`dataloaders` has the keys {list(loaders)}, but the tasks are {list(self.models)}."]
            named = {f"of task {task!r}": loader for task, loader in loaders.items()}
        elif isinstance(loaders, (list, tuple)):
            if len(loaders) != len(self.models):
                return [
                    f"`dataloaders` lists {len(loaders)} loaders for {len(self.models)} tasks: give "
                    f"one per task in "
                    f"the order {list(self.models)}, or a single loader (not in a list) for all."
                ]
            named = {f"of task {task!r}": loader for task, loader in zip(self.models, loaders, strict=True)}
        else:
            named = {"of all tasks": loaders}
        problems = [f"The dataloader {where} is empty." for where, loader in named.items() if _is_empty(loader)]
        why = ""
        if self._trainer is not None and self.trainer.world_size > 1:
            why = "each process would draw its own order, and samples would be counted twice or not at all"
        elif self._settings.statistics:
            why = "a calibration that is interrupted could not go on where it was"
        shuffled = [where for where, loader in named.items() if why and _is_shuffled(loader)]
        return [*problems, *(f"The dataloader {where} shuffles: {why}. Use shuffle=False." for where in shuffled)]

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """The data module's own way to move a batch, else that of the source that the loader belongs to."""
        owner: Any = self.copies[self._tasks_of(dataloader_idx)[0]]
        if self.datamodule is not None:  # its trainer was set in `setup`
            own = getattr(type(self.datamodule), hook) is not getattr(LightningDataModule, hook)
            owner = self.datamodule if own else owner
        owner.trainer = self.trainer
        return getattr(owner, hook)(*args, 0)

    def _tasks_of(self, dataloader_idx: int) -> list[str]:
        tasks = list(self.models)
        count = self._loaders_per_pass()
        return tasks if count == 1 else [tasks[dataloader_idx % count]]

    def _loaders_per_pass(self) -> int:
        assert self.session is not None
        given = len(predict_loaders(self.trainer))
        count = len(self._loaders) if self._listed else given
        if count not in (1, len(self.models)) or (not self._listed and self.session.passes > 1):
            raise ConfigurationError(
                f"trainer.predict was given {given} loaders, but the calibration of "
                f"{len(self.models)} tasks takes {self.session.passes} passes over them. Give the loaders to "
                "ZipItModule(dataloaders=…) instead of trainer.predict, which lists them once for every pass."
            )
        return count

    # Calibration

    def on_predict_start(self) -> None:
        assert self.session is not None
        if self.trainer.world_size > 1 and self.session.calibration_passes:
            loaders = predict_loaders(self.trainer)[: self._loaders_per_pass()]
            limits = self.trainer.num_predict_batches[: len(loaders)]
            self.session.expected = [
                count_samples(loader) if limit == _length(loader) else None
                for loader, limit in zip(loaders, limits, strict=True)
            ]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Add a batch to the statistics (first passes) or to the re-estimated batch norm (last pass).

        Returns:
            The number of samples.
        """
        assert self.session is not None
        x = check_views(find_inputs(batch, self.models, self.get_input), self.models)
        index, loader = divmod(dataloader_idx, self._loaders_per_pass())
        if index < self.session.calibration_passes:
            self.session.calibrate(x, self._networks(), index, loader)
        else:
            if self.session.merged is None:
                self.session.merge()
                self.session.start_refining(self._networks(), any_view(x).device)
            self.session.refine(x, self._tasks_of(dataloader_idx))
        return len(any_view(x))

    def finish(self) -> None:
        """After the last batch: complete the merge and build the merged module."""
        assert self.session is not None
        started = self.session.merged is not None  # by the first batch of the last pass
        if not started:
            self.session.merge()
        if self.session.passes > self.session.calibration_passes:
            if not any(exchange(lambda: started)):
                raise CalibrationError(
                    "The last pass over the calibration data saw no batch: give loaders that can be gone through "
                    "several times, or refine=None and a larger statistics_memory, which take one pass."
                )
            if not started:
                self.session.start_refining(self._networks(), self.device)
            self.session.finish_refining()
        with torch.inference_mode(False):
            merged = MultiHeadModule(self.models, self.backbone, self.session.settings, self.session.merged)
        self._merged = (merged,)
        if spawns_processes(self.trainer) and self.trainer.is_global_zero:
            content: dict[str, Any] = {"state_dict": merged.state_dict()}
            merged.on_save_checkpoint(content)
            with replacing(self._handover) as file:
                torch.save(content, file)

    def _networks(self) -> dict[str, nn.Module]:
        return {task: get_backbone(model, self.backbone) for task, model in self.copies.items()}

    def _take_over(self) -> MultiHeadModule:
        try:
            return MultiHeadModule.load_from_checkpoint(self._handover, models=self.models)
        finally:
            self._handover.unlink()


class Batches:
    """A list of batches as a loader: Lightning takes a bare list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _is_empty(loader: Any) -> bool:
    return _length(loader) == 0


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None  # an iterable of unknown length


def _is_shuffled(loader: Any) -> bool:
    return isinstance(getattr(loader, "sampler", None), (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def _in_fixed_order(loaders: Any) -> Any:
    """Training loaders without their shuffling, everything else as it is."""
    if isinstance(loaders, Mapping):
        return {key: _in_fixed_order(loader) for key, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_in_fixed_order(loader) for loader in loaders]
    if not isinstance(loaders, DataLoader) or not isinstance(loaders.sampler, RandomSampler):
        return loaders
    return DataLoader(
        loaders.dataset,
        batch_size=loaders.batch_size,
        num_workers=loaders.num_workers,
        collate_fn=loaders.collate_fn,
        pin_memory=loaders.pin_memory,
        timeout=loaders.timeout,
        worker_init_fn=loaders.worker_init_fn,
        multiprocessing_context=loaders.multiprocessing_context,
    )
