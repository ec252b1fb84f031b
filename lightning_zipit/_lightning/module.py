"""LightningModule that runs a merge in ``trainer.predict``."""

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
from lightning_zipit._common.views import any_view
from lightning_zipit._lightning.entering import Entering, StepInputs
from lightning_zipit._lightning.internals import count_samples, predict_loaders, spawns_processes
from lightning_zipit._lightning.loaders import find_loader_problems, in_fixed_order, length_of, list_loaders, opened
from lightning_zipit._lightning.multihead import MultiHeadModule, split_merged
from lightning_zipit._lightning.sources import (
    DelegatedTransfers,
    WithoutCheckpoint,
    find_input,
    find_problems,
    get_backbone,
    name_tasks,
)
from lightning_zipit._merging.widths import changes_size
from lightning_zipit._phases.prepare import make_sources
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.pipeline import Pipeline
from lightning_zipit.settings import MergeSettings


@dataclass
class _Outside:
    """Modules that are kept outside the submodules of a :class:`ZipItModule`, so that it cannot move or cast them.

    Attributes:
        given: the modules to merge, by the user's names.
        models: the source modules by task. A merged module brings one source module for each of its tasks.
        base: the module from which all sources were trained.
        merged: the result of the merge.
    """

    given: dict[str, LightningModule]
    models: dict[str, LightningModule]
    base: LightningModule | None
    merged: MultiHeadModule | None = None


class ZipItModule(DelegatedTransfers, WithoutCheckpoint, LightningModule):
    """N source modules that ``trainer.predict`` merges, with a :class:`~lightning_zipit.ZipItCallback`.

    The calibration runs on copies of the sources. The sources are not moved, cast or changed.

    Args:
        models: the source modules by task, or a sequence of modules. A merged module brings all its tasks.
        backbone: dotted name of the part to merge, the same in each module; ``""`` for the whole ``forward``.
        dataloaders: the calibration data: one loader per task in a sequence or dict, or a single loader for all tasks.
            Labels are never used.
        datamodule: the calibration data, instead of ``dataloaders``: its ``calibration_dataloader()`` or, if it has
            none, its ``train_dataloader()`` in a fixed order.
        get_input: a function from a batch to the backbone's input: a tensor, a tuple of positional arguments or a dict
            of keyword arguments. By default, each source's own step runs on the batch, and its backbone's input is
            what the step calls the backbone with. If the models take different inputs, the function returns a dict
            with one view of the same samples per task. By default, a batch with the tasks as keys is such a dict.
        base: the module from which all sources were trained, for ``combine``.

    Attributes:
        merged: the merged module, after ``trainer.predict``.
    """

    def __init__(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        backbone: str = "",
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        get_input: Callable[[Any], Any] = find_input,
        base: LightningModule | None = None,
    ) -> None:
        super().__init__()
        given = name_tasks(models)
        modules, self.sources = split_merged(given)
        self._outside = _Outside(given, modules, base)
        self.backbone = backbone
        self.dataloaders = opened(dataloaders)
        self.datamodule = datamodule
        self.get_input = get_input
        self.pipeline: Pipeline | None = None
        self._settings = MergeSettings()
        self.copies = nn.ModuleDict()
        self._inputs_of: StepInputs | None = None
        self._loaders: list[Any] = []
        self._datamodule_trainer: Any = None
        # Spawned workers write the merged module here; the main process loads it.
        self._handover = Path(tempfile.gettempdir()) / f"lightning-zipit-{uuid.uuid4().hex}.ckpt"
        self._listed = False  # whether trainer.predict uses the loaders of this module, which are listed for every pass

    @property
    def models(self) -> dict[str, LightningModule]:
        """The source modules by task. A merged module brings one source module for each of its tasks."""
        return self._outside.models

    @property
    def base(self) -> LightningModule | None:
        """The module from which all sources were trained; ``None`` if it was not given."""
        return self._outside.base

    @property
    def merged(self) -> MultiHeadModule:
        if self._outside.merged is None and self._handover.exists():
            self._outside.merged = self._take_over()
        if self._outside.merged is None:
            raise ConfigurationError(
                "`merged` does not exist before the merge. Run trainer.predict with a ZipItCallback first."
            )
        return self._outside.merged

    @property
    def is_merged(self) -> bool:
        """Whether the merge is done."""
        return self._outside.merged is not None

    @property
    def needs_no_data(self) -> bool:
        """Whether the prepared merge reads no data, because its statistics come from a file."""
        return self.pipeline is not None and self.pipeline.passes == 0 and not self.is_merged

    def prepare(self, settings: MergeSettings, problems: Sequence[str] = ()) -> None:
        """Start a merge: check everything, trace, and copy the sources.

        Args:
            settings: the options of the merge.
            problems: problems that are already known.

        Raises:
            ConfigurationError: with every problem.
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
            found.append("Both `dataloaders` and `datamodule` were given. Give only one of them.")
        if len(self._outside.given) == 1 and not changes_size(settings.width):
            found.append(
                "A merge needs at least two models, but got one. Give more models, or compress the single model with a "
                "`width` below 1."
            )
        if not unfit:
            networks = {task: get_backbone(model, self.backbone) for task, model in self.models.items()}
            try:
                start = None if base is None else get_backbone(base, self.backbone)
                self.pipeline = Pipeline(
                    make_sources(networks, settings, start, self.sources), settings, self._does_without_data(settings)
                )
            except ConfigurationError as error:
                if not found:
                    raise
                found.append(str(error))
        if found:
            raise ConfigurationError.collect(found)
        shared: dict[int, Any] = {}  # so that the copies share the modules that the models share
        self.copies = nn.ModuleDict({task: copy_module(model, shared) for task, model in self.models.items()})
        self.copies.eval().requires_grad_(False)
        entering = {task: Entering(self.copies[task], self.backbone, task) for task in self.models}
        self._inputs_of = StepInputs(entering, self.get_input)

    def needs_data(self, settings: MergeSettings) -> bool:
        """Whether a merge with these settings needs calibration data."""
        return settings.needs_data(get_backbone(model, self.backbone) for model in self.models.values())

    def _does_without_data(self, settings: MergeSettings) -> bool:
        """Whether no data was given, and none is needed."""
        given = self.dataloaders is not None or self.datamodule is not None or settings.statistics is not None
        return not given and not self.needs_data(settings)

    def release(self) -> None:
        """Drop the copies of the sources."""
        self.copies = nn.ModuleDict()
        self._inputs_of = None
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
                "ZipItModule needs a Trainer with a ZipItCallback. Use Trainer(callbacks=[ZipItCallback()])."
            )
        loaders = self.dataloaders
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.datamodule.setup("fit")
            own = getattr(self.datamodule, "calibration_dataloader", None)
            loaders = opened(own()) if own else in_fixed_order(opened(self.datamodule.train_dataloader()))
            if problems := self._loader_problems(loaders):
                raise ConfigurationError.collect(problems)
        self._loaders = list_loaders(loaders, list(self.models))

    def predict_dataloader(self) -> Any:
        """The calibration loaders, listed once for every pass."""
        # This hook must not fail: Lightning would leave DataLoader patched.
        assert self.pipeline is not None
        self._listed = True
        return [loader for _ in range(self.pipeline.passes) for loader in self._loaders]

    def _loader_problems(self, loaders: Any) -> list[str]:
        why = ""
        if self._trainer is not None and self.trainer.world_size > 1:
            why = "each process would draw its own order, so that samples would be counted twice or skipped"
        elif self._settings.statistics:
            why = "an interrupted calibration could not resume"
        return find_loader_problems(loaders, list(self.models), why)

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        """Run a transfer hook of the data module if it defines one, otherwise of the loader's source module."""
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
                f"trainer.predict got {given} loaders, but the calibration of {len(self.models)} tasks needs "
                f"{self.pipeline.passes} passes over one loader per task, or over a single loader. Pass the loaders to "
                "ZipItModule(dataloaders=…) instead of trainer.predict."
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
        if batch is None:  # a collate function may leave out every sample
            return 0
        loader = dataloader_idx % self._loaders_per_pass()
        assert self._inputs_of is not None
        calls = self._inputs_of(batch, batch_idx, self._trainer)
        for x in calls:
            self.pipeline.add(x, self._tasks_of(dataloader_idx), loader)
        return any_view(calls[0]).samples

    def finish(self) -> None:
        """Complete the merge, and build the merged module."""
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
