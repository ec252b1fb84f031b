"""The module that ``trainer.predict`` runs over the calibration data."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.files import replacing
from lightning_zipit._common.views import Inputs, any_view, check_views
from lightning_zipit._lightning.internals import count_samples, predict_loaders, spawns_processes
from lightning_zipit._lightning.loaders import find_loader_problems, in_fixed_order, length_of, list_loaders
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
from lightning_zipit._phases.prepare import make_sources
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.pipeline import Pipeline
from lightning_zipit.settings import MergeSettings


@dataclass
class _Outside:
    """Modules that are no submodules of a :class:`ZipItModule`: what moves or casts it does not reach them.

    Attributes:
        given: the modules to merge, as the user named them.
        models: the source modules by task; a module that was merged before is several.
        base: the module from which all were trained.
        merged: the merged module.
    """

    given: dict[str, LightningModule]
    models: dict[str, LightningModule]
    base: LightningModule | None
    merged: MultiHeadModule | None = None


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
        given = name_tasks(models)
        modules, self.sources = split_merged(given)
        self._outside = _Outside(given, modules, base)
        self.backbone = backbone
        self.dataloaders = dataloaders
        self.datamodule = datamodule
        self.get_input = get_input
        self.pipeline: Pipeline | None = None
        self._settings = MergeSettings()
        self.copies = nn.ModuleDict()
        self._loaders: list[Any] = []
        self._datamodule_trainer: Any = None
        # Spawned workers write the merged module here; the main process loads it.
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
        return self._outside.models

    @property
    def base(self) -> LightningModule | None:
        """The module that all were trained from, where it was given."""
        return self._outside.base

    @property
    def merged(self) -> MultiHeadModule:
        if self._outside.merged is None and self._handover.exists():
            self._outside.merged = self._take_over()
        if self._outside.merged is None:
            raise ConfigurationError("There is no merged module yet: run trainer.predict with a ZipItCallback first.")
        return self._outside.merged

    @property
    def is_merged(self) -> bool:
        """Whether there is a merged module."""
        return self._outside.merged is not None

    @property
    def needs_no_data(self) -> bool:
        """Whether a merge is prepared that goes through no data: its statistics were gathered before."""
        return self.pipeline is not None and self.pipeline.passes == 0 and not self.is_merged

    def prepare(self, settings: MergeSettings, problems: Sequence[str] = ()) -> None:
        """Start a merge: look for everything that stands in its way, trace, and copy the sources.

        Raises:
            ConfigurationError: with all problems that were found.
        """
        self._outside.merged, self._listed, self._settings = None, False, settings
        self._datamodule_trainer = self.datamodule.trainer if self.datamodule is not None else None
        base = self.base
        unfit = find_problems(self.models if base is None else {**self.models, "base": base}, self.backbone)
        for name, model in self._outside.given.items():
            if isinstance(model, MultiHeadModule):
                unfit += [f"Model {name!r}: {problem}" for problem in model.find_problems(self.backbone, settings)]
        found = [*problems, *unfit, *self._loader_problems(self.dataloaders)]
        if self.dataloaders is not None and self.datamodule is not None:
            found.append("Both `dataloaders` and `datamodule` were given: give one of them.")
        if len(self._outside.given) == 1 and not changes_size(settings.width):
            found.append("One model alone cannot be merged: give at least two, or fold it with a `width` below 1.")
        if not unfit:
            networks = {task: get_backbone(model, self.backbone) for task, model in self.models.items()}
            try:
                start = None if base is None else get_backbone(base, self.backbone)
                self.pipeline = Pipeline(make_sources(networks, settings, start, self.sources), settings)
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
        self.pipeline = None
        if self.datamodule is not None:
            self.datamodule.trainer = self._datamodule_trainer

    # Data

    def prepare_data(self) -> None:
        if self.datamodule is not None:
            self.datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        if self.pipeline is None:
            raise ConfigurationError(
                "A ZipItModule is run by a Trainer with a ZipItCallback: Trainer(callbacks=[ZipItCallback()])."
            )
        loaders = self.dataloaders
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.datamodule.setup("fit")
            own = getattr(self.datamodule, "calibration_dataloader", None)
            loaders = own() if own else in_fixed_order(self.datamodule.train_dataloader())
            if problems := self._loader_problems(loaders):
                raise ConfigurationError.collect(problems)
        self._loaders = list_loaders(loaders, list(self.models))

    def predict_dataloader(self) -> Any:
        """The calibration loaders, listed once for every pass."""
        # Nothing may fail here: Lightning leaves DataLoader patched when this hook raises.
        assert self.pipeline is not None
        self._listed = True
        return [loader for _ in range(self.pipeline.passes) for loader in self._loaders]

    def _loader_problems(self, loaders: Any) -> list[str]:
        why = ""
        if self._trainer is not None and self.trainer.world_size > 1:
            why = "each process would draw its own order, and samples would be counted twice or not at all"
        elif self._settings.statistics:
            why = "an interrupted calibration could not resume"
        return find_loader_problems(loaders, list(self.models), why)

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
        assert self.pipeline is not None
        given = len(predict_loaders(self.trainer))
        count = len(self._loaders) if self._listed else given
        if count not in (1, len(self.models)) or (not self._listed and self.pipeline.passes > 1):
            raise ConfigurationError(
                f"trainer.predict was given {given} loaders, but the calibration of "
                f"{len(self.models)} tasks takes {self.pipeline.passes} passes over them. Give the loaders to "
                "ZipItModule(dataloaders=…) instead of trainer.predict, which lists them once for every pass."
            )
        return count

    # Calibration

    def on_predict_start(self) -> None:
        assert self.pipeline is not None
        if self.trainer.world_size > 1 and self.pipeline.calibration_passes:
            loaders = predict_loaders(self.trainer)[: self._loaders_per_pass()]
            limits = self.trainer.num_predict_batches[: len(loaders)]
            self.pipeline.expect(
                [
                    count_samples(loader) if limit == length_of(loader) else None
                    for loader, limit in zip(loaders, limits, strict=True)
                ]
            )

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self.pipeline is not None
        self.pipeline.begin(dataloader_idx // self._loaders_per_pass(), self._networks())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Push a batch into the pipeline.

        Returns:
            The number of samples.
        """
        assert self.pipeline is not None
        x = check_views(find_inputs(batch, self.models, self.get_input), self.models)
        loader = dataloader_idx % self._loaders_per_pass()
        self.pipeline.add(x, self._tasks_of(dataloader_idx), loader)
        return len(any_view(x))

    def finish(self) -> None:
        """End the merge, and build the merged module."""
        assert self.pipeline is not None
        result = self.pipeline.finish()
        with torch.inference_mode(False):
            merged = MultiHeadModule(self.models, self.backbone, self.pipeline.settings, result)
        self._outside.merged = merged
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
