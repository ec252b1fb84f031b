"""The merged module: its construction from a merge or a checkpoint, and its split into source modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.views import Inputs, as_inputs, bound, like, view_of
from lightning_zipit._lightning.files.checkpoint import (
    CHECKPOINT_KEY,
    FORMAT,
    read_checkpoint,
    read_example,
    reading_record,
    write_example,
)
from lightning_zipit._lightning.files.descriptions import (
    DESCRIPTION,
    complete,
    describe_source,
    explain_unmakeable,
    make_sources,
)
from lightning_zipit._lightning.files.reading_check import check_outputs, sample_outputs
from lightning_zipit._lightning.files.trust import Trust, Trusted
from lightning_zipit._lightning.multitask import MultiTaskModule
from lightning_zipit._lightning.shells import split_source
from lightning_zipit._lightning.sources import get_backbone, name_tasks
from lightning_zipit._merging.rebuild import build_head, build_stem, build_trunk
from lightning_zipit._report.report import MergeReport
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.joined import Joined
from lightning_zipit.graph.notes import read_barriers
from lightning_zipit.graph.part import Added, Part, graph_of
from lightning_zipit.graph.replay import CAPTURE_TOLERANCE, agree, tensors_in
from lightning_zipit.graph.settle import trace_all
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.task_norms import give_norms
from lightning_zipit.settings import MergeSettings

LAYERS = ("call_module", "get_attr")
"""The nodes of a graph that read layers or tensors."""


class MultiHeadModule(MultiTaskModule):
    """A merged network: a trunk that all tasks share, and a head per task.

    :class:`~lightning_zipit.ZipIt` and :class:`~lightning_zipit.ZipItCallback` make it, ``trainer.save_checkpoint``
    saves it, and :meth:`load_from_checkpoint` loads it. A module made by this constructor without ``merged`` has the
    structure of a merged network, and the weights of the first model in its trunk.

    Args:
        models: the source modules by task.
        backbone: dotted name of the merged part of each module; ``""`` for the whole ``forward``.
        settings: the start and the end of the trunk, and whether its batch norm is per task.
        merged: stems, trunk, heads and report of a merge.
        example_input: an input of the backbone, or one input per task. It is needed if no fitting shape can be guessed.
            Its values do not matter.
        barriers: the nodes that stay in the heads; see :attr:`MergeGraph.barriers`.
        widths: the number of features of each feature space whose width differs from the sources.

    Raises:
        ConfigurationError: if the models cannot be merged.

    Attributes:
        trunk: the shared part.
        heads: the last part of each task's network, a ``ModuleDict`` by task.
        stems: the first part of each task's network, a ``ModuleDict`` by task; empty without ``start_at``.
        sources: copies of the source modules, which run their own steps on stem, trunk and head.
        report: the report of the merge.
    """

    report: MergeReport | None

    def __init__(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        backbone: str = "",
        settings: MergeSettings | None = None,
        merged: MergedBackbone | None = None,
        example_input: Any = None,
        barriers: Mapping[str, str] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        models = name_tasks(models)
        settings = settings or MergeSettings()
        example = None if example_input is None else as_inputs(example_input, models)
        if example is not None:
            example = bound(example, {task: get_backbone(model, backbone) for task, model in models.items()})
        example = merged.example if merged is not None else example
        graphs = merged.graphs if merged is not None else _trace_models(models, backbone, settings, example, barriers)
        if merged is None:
            built = build_trunk(next(iter(graphs.values())), widths)
            if settings.norms_per_task:
                give_norms(built, graphs)
            trunk: nn.Module = built
            heads: Mapping[str, nn.Module] = {task: build_head(graph, widths) for task, graph in graphs.items()}
            stems: Mapping[str, nn.Module] = {
                task: build_stem(graph, widths) for task, graph in graphs.items() if graph.stem_nodes
            }
        else:
            trunk, heads, stems = merged.trunk, merged.heads, merged.stems
        used = {
            task: [str(node.target) for node in graph.fx_graph.nodes if node.op in ("call_module", "get_attr")]
            for task, graph in graphs.items()
        }
        super().__init__(trunk, heads, models, backbone, used, stems)
        self.report = merged.report if merged is not None else None
        captured = next(iter(graphs.values())).captured
        self.takes = captured.inputs if captured is not None else None
        self.arguments = captured.arguments if captured is not None else Arguments()
        self._record: dict[str, Any] = {
            "format": FORMAT,
            "sources": {task: describe_source(model) for task, model in models.items()},
            "backbone": backbone,
            "stop_at": next(iter(graphs.values())).stop_at,
            "merge_heads": settings.merge_heads,
            "norms_per_task": self.norms_per_task,
            "barriers": next(iter(graphs.values())).barriers,
            "widths": dict(merged.widths if merged is not None else widths or {}),
            **write_example(example),
        }
        if settings.start_at is not None:
            self._record["start_at"] = settings.start_at

    def find_problems(self, backbone: str, settings: MergeSettings) -> list[str]:
        """Find reasons why this module cannot be merged again."""
        if len(self.stems):
            return [
                f"it was merged with start_at={self._record['start_at']!r}, and cannot be merged again. Merge its "
                "sources instead."
            ]
        of_record = {"backbone": self.backbone} | {name: self._record[name] for name in ("stop_at", "merge_heads")}
        asked = {"backbone": backbone, "stop_at": settings.stop_at, "merge_heads": settings.merge_heads}
        of_record["start_at"], asked["start_at"] = None, settings.start_at
        problems = [
            f"it was merged with {name}={known!r}, and can only be merged again with the same value, got "
            f"{asked[name]!r}."
            for name, known in of_record.items()
            if known != asked[name]
        ]
        if self.norms_per_task:
            problems.append(
                "its trunk has a batch norm for each task, so that it cannot be merged again. Merge its sources with "
                "BatchNorm(per_task=False)."
            )
        if self._record["widths"]:
            problems.append(
                "it was merged with a `width` other than 1, so that it cannot be merged again. Merge its sources with "
                "width=1."
            )
        return problems

    def split(self) -> dict[str, LightningModule]:
        """Split into one source module per task, with trunk and head as its backbone. The tensors are shared.

        Raises:
            ConfigurationError: if trunk or heads were replaced by other modules.
        """
        split = {}
        source: Any
        for task, source in self.sources.items():
            trunk, head = self.trunk, self.heads[task]
            if not (isinstance(trunk, Part) and isinstance(head, Part)):
                raise ConfigurationError(
                    f"The merged module cannot be merged again, because its trunk or the head of task {task!r} was "
                    "replaced by another module. Merge the sources."
                )
            joined = Joined(trunk, head, self._record["barriers"], self.arguments)
            split[task] = split_source(source, self.backbone, self.path_of(task), joined)
            split[task].__dict__[DESCRIPTION] = self._record["sources"][task]
        return split

    def find_difference(self, task: str) -> str | None:
        trunk, head = self.trunk, self.heads[task]
        if len(self.stems):
            return "each task has a stem, whose features are merged behind it"
        if self.norms_per_task:
            return "its batch norm is per task"
        if not (isinstance(trunk, Part) and isinstance(head, Part)):
            return "its trunk or head was replaced by another module"
        for module in head.children():
            if isinstance(module, Added):
                return f"its features are unmerged between the layers of the source, at `{next(iter(module))}`"
        used = [{str(node.target) for node in graph_of(part).nodes if node.op in LAYERS} for part in (trunk, head)]
        if both := used[0] & used[1]:
            return f"`{min(both)}` is in the trunk and in the head, with different weights"
        return self._compare_with_source(task)

    @torch.no_grad()
    def _compare_with_source(self, task: str) -> str | None:
        """Run the source's own code on the layers of trunk and head, and compare it with trunk and head."""
        example = self.example
        if example is None:
            return "the shape of its input is unknown, so that it cannot be checked"
        x = like(view_of(example, task), self).with_noise()
        stand_in = self.stand_in_of(task)
        with evaluating(self), isolate_rng():
            found, expected = x.run(stand_in.run_body), self.run_task(x, task=task)
        same = all(map(partial(agree, tolerance=CAPTURE_TOLERANCE), tensors_in(expected), tensors_in(found)))
        return None if same else "its layers alone do not compute the same as trunk and head"

    @property
    def example_input(self) -> Any:
        """One sample of zeros: a tensor, a tuple of positional or a dict of keyword arguments; ``None`` if unknown.

        If inputs differ between tasks, it is a dict of these by task.
        """
        example = self.example
        if example is None or isinstance(example, Call):
            return example and example.value
        return {task: view.value for task, view in example.items()}

    @property
    def example(self) -> Inputs | None:
        """One sample of zeros as the arguments of the networks; ``None`` if unknown."""
        return read_example(self._record)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for task, description in self._record["sources"].items():
            if problem := explain_unmakeable(task, description, type(self.sources[task])):
                rank_zero_warn(problem)
        outputs = sample_outputs(self, self.example)
        report = self.report.to_dict() if self.report else None
        training = {} if (known := self.describe_training()) is None else {"training": known}
        checkpoint[CHECKPOINT_KEY] = {**self._record, **training, "report": report, "outputs": outputs}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        models: Mapping[str, LightningModule] | Sequence[LightningModule] | None = None,
        trust: Trusted | None = None,
        weights_only: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> MultiHeadModule:
        """Load a merged module from a checkpoint.

        The source modules are recreated from the class paths and hyperparameters in the file. The file is read with
        ``weights_only=True``. A class or function that the file names is imported and called only if it is a
        LightningModule class that the program has already imported, a class of ``models``, allowed by ``trust``, or a
        layer, loss, optimizer, scheduler or metric of torch and torchmetrics.

        Args:
            checkpoint_path: a file written by ``trainer.save_checkpoint``.
            map_location: the device of the tensors; see :func:`torch.load`.
            models: modules of the source classes by task, for classes that cannot be imported or did not save their
                hyperparameters. The weights of these modules are not used.
            trust: modules or classes, by dotted name, that the file may also refer to, such as ``["my_project"]``.
            weights_only: ``False`` unpickles the file, which runs code in it: use it only for files that you trust. The
                classes and functions that the file names are still checked as above.
            strict: ``False`` loads what fits, and does not check that the module computes the same as the saved one.
            kwargs: accepted for the signature of :class:`~lightning.pytorch.LightningModule`; must be empty.

        Returns:
            The merged module, in eval mode.

        Raises:
            UntrustedError: if the file names anything else. The message lists all names and the ways to allow them.
            CheckpointError: if the file is not a checkpoint of a merged module, a source module cannot be created, or
                the module does not compute the same as the saved one.
            ConfigurationError: if ``trust`` contains anything but names.
        """
        if kwargs:
            raise TypeError(f"load_from_checkpoint got unexpected arguments {sorted(kwargs)}.")
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only is not False)
        return cls.restore(checkpoint, str(checkpoint_path), Trust.of(trust), models, strict is not False)

    @classmethod
    def restore(
        cls,
        checkpoint: Mapping[str, Any],
        where: str,
        trust: Trust,
        models: Mapping[str, LightningModule] | Sequence[LightningModule] | None = None,
        strict: bool = True,
    ) -> MultiHeadModule:
        """Make the merged module from the content of a checkpoint.

        Args:
            checkpoint: the content.
            where: the file, for error messages.
            trust: the names that the checkpoint may refer to.
            models: modules of the source classes by task.
            strict: see :meth:`load_from_checkpoint`.

        Raises:
            CheckpointError: as for :meth:`load_from_checkpoint`.
        """
        with reading_record(checkpoint, where) as record:
            given = name_tasks(models) if models is not None else {}
            return cls._from_record(record, dict(checkpoint), given, trust, where, strict)

    @classmethod
    def _from_record(
        cls,
        record: dict[str, Any],
        checkpoint: dict[str, Any],
        given: dict[str, LightningModule],
        trust: Trust,
        where: str,
        strict: bool,
    ) -> MultiHeadModule:
        if unknown := set(given) - set(record["sources"]):
            raise CheckpointError(
                f"`models` has the keys {sorted(unknown)}, but the tasks of {where} are {list(record['sources'])}."
            )
        sources = make_sources(record["sources"], trust, where, given)
        example = read_example(record)
        for task, source in sources.items():
            complete(task, source, record["backbone"], None if example is None else view_of(example, task))
        settings = MergeSettings(
            stop_at=record["stop_at"],
            merge_heads=record["merge_heads"],
            start_at=record.get("start_at"),
            refine=BatchNorm(per_task=record.get("norms_per_task", False)),
        )
        module = cls(
            sources,
            record["backbone"],
            settings,
            example_input=example,
            barriers=read_barriers(record["barriers"]),
            widths=record["widths"],
        )
        weights: dict[str, Tensor] = dict(checkpoint["state_dict"])
        module.on_load_checkpoint({**checkpoint, "state_dict": weights})
        module.read_weights(weights, strict, where)
        if strict:
            check_outputs(module, example, record.get("outputs") or {}, where)
        module._record["sources"] = record["sources"]
        module.restore_training(record.get("training"), trust, where)
        module.report = MergeReport.from_dict(record["report"]) if record["report"] else None
        return module.to(next(iter(weights.values())).device)


def split_merged(models: Mapping[str, LightningModule]) -> tuple[dict[str, LightningModule], dict[str, str]]:
    """Split all merged modules among the models into their source modules.

    Args:
        models: the models by name.

    Returns:
        The source modules by task, and the name of the model that each source module belongs to.

    Raises:
        ConfigurationError: if two models have the same task.
    """
    modules: dict[str, LightningModule] = {}
    sources: dict[str, str] = {}
    problems = []
    for name, model in models.items():
        for task, module in (model.split() if isinstance(model, MultiHeadModule) else {name: model}).items():
            if task in modules:
                problems.append(
                    f"Models {sources[task]!r} and {name!r} both have a task {task!r}. Tasks of merged modules keep "
                    "their names, and all tasks need different names."
                )
            modules[task], sources[task] = module, name
    if problems:
        raise ConfigurationError.collect(problems)
    return modules, sources


def _trace_models(
    models: Mapping[str, LightningModule],
    backbone: str,
    settings: MergeSettings,
    example: Inputs | None,
    barriers: Mapping[str, str] | None,
) -> dict[str, MergeGraph]:
    networks = {task: get_backbone(model, backbone) for task, model in models.items()}
    fitting = None if example is None else like(example, next(iter(networks.values())))
    return trace_all(
        networks, settings.stop_at, settings.merge_heads, fitting, barriers=barriers, start_at=settings.start_at
    )
