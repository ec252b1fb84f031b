"""The merged module: how it is made from a merge or a checkpoint, saved, and taken apart to be merged again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule
from torch import Tensor, fx, nn

from lightning_zipit._common.views import Inputs, like
from lightning_zipit._lightning.files.checkpoint import (
    CHECKPOINT_KEY,
    FORMAT,
    read_checkpoint,
    read_example,
    reading_record,
    write_example,
)
from lightning_zipit._lightning.files.descriptions import DESCRIPTION, describe_source, make_sources
from lightning_zipit._lightning.files.trust import Trust, Trusted
from lightning_zipit._lightning.multitask import MultiTaskModule
from lightning_zipit._lightning.sources import PATH, get_backbone, make_shell, name_tasks
from lightning_zipit._merging.rebuild import build_head, build_stem, build_trunk
from lightning_zipit._report.report import MergeReport
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.agreement import trace_all
from lightning_zipit.graph.joined import Joined
from lightning_zipit.graph.notes import read_barriers
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.task_norms import give_norms
from lightning_zipit.settings import MergeSettings


class MultiHeadModule(MultiTaskModule):
    """A merged network: the trunk that all tasks share, and a head per task.

    It is made by :class:`~lightning_zipit.ZipIt` or :class:`~lightning_zipit.ZipItCallback`, saved by
    ``trainer.save_checkpoint`` and read back by :meth:`load_from_checkpoint`. Made by hand, it has the structure of a
    merge and the first model's weights in its trunk.

    Args:
        models: the source modules by task.
        backbone: dotted name of the merged part in each, ``""`` for the whole ``forward``.
        settings: where the trunk starts and ends, and whether its batch norm is per task.
        merged: stems, trunk, heads and report of a merge.
        example_input: an input of the backbone, or one of each by task, where one that fits cannot be guessed; its
            values do not matter.
        barriers: nodes that stay in the heads, as :attr:`MergeGraph.barriers` has them.
        widths: per space its number of features, where that is not the sources'.

    Raises:
        ConfigurationError: if the models cannot be merged.

    Attributes:
        trunk: the shared part.
        heads: the rest of each task's network, a ``ModuleDict`` by task.
        stems: what each task's network has before the trunk, a ``ModuleDict`` by task; empty without ``start_at``.
        sources: copies of the source modules, which run their own steps on trunk and head.
        report: what the merge did.
    """

    report: MergeReport | None

    def __init__(
        self,
        models: Mapping[str, LightningModule] | Sequence[LightningModule],
        backbone: str = "",
        settings: MergeSettings | None = None,
        merged: MergedBackbone | None = None,
        example_input: Inputs | None = None,
        barriers: Mapping[str, str] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        models = name_tasks(models)
        settings = settings or MergeSettings()
        example = merged.example if merged is not None else example_input
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
        """What stands in the way of merging this module again."""
        if len(self.stems):
            return [
                f"it was merged with start_at={self._record['start_at']!r}: merge its sources, not the whole of it."
            ]
        of_record = {"backbone": self.backbone} | {name: self._record[name] for name in ("stop_at", "merge_heads")}
        asked = {"backbone": backbone, "stop_at": settings.stop_at, "merge_heads": settings.merge_heads}
        of_record["start_at"], asked["start_at"] = None, settings.start_at
        problems = [
            f"it was merged with {name}={known!r}, and can be merged again with the same alone, got {asked[name]!r}."
            for name, known in of_record.items()
            if known != asked[name]
        ]
        if self.norms_per_task:
            problems.append("its trunk has a batch norm for each task: merge its sources with one for all.")
        if self._record["widths"]:
            problems.append("it was merged with another `width` than 1: merge its sources without.")
        return problems

    def split(self) -> dict[str, LightningModule]:
        """The source modules, each with trunk and head as one network, which share this module's tensors.

        Raises:
            ConfigurationError: if trunk or heads are not those of a merge any more.
        """
        split = {}
        for task, source in self.sources.items():
            trunk, head = self.trunk, self.heads[task]
            assert isinstance(source, LightningModule)
            if not (isinstance(trunk, fx.GraphModule) and isinstance(head, fx.GraphModule)):
                raise ConfigurationError(
                    f"A merged module whose trunk, or head of task {task!r}, was replaced by another module cannot be "
                    "merged again: merge the sources."
                )
            split[task] = make_shell(source, self.backbone, Joined(trunk, head, self._record["barriers"]), ())
            if not self.backbone:
                split[task].add_module(PATH, split[task].__dict__["forward"])
            split[task].__dict__[DESCRIPTION] = self._record["sources"][task]
        return split

    @property
    def example_input(self) -> Inputs | None:
        """Zeros like one sample, ``(1, …)``, where a merge has seen one; by task where each has an input of its own."""
        return read_example(self._record)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {**self._record, "report": self.report.to_dict() if self.report else None}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        models: Mapping[str, LightningModule] | Sequence[LightningModule] | None = None,
        trust: Trusted | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> MultiHeadModule:
        """Read a merged module back, from its sources' class paths and hyperparameters.

        The file is read with ``weights_only=True``. Of what it names, only this is imported or called: LightningModule
        classes that the program has imported already, classes of ``models``, what ``trust`` allows, and the layers,
        losses, optimizers, schedulers and metrics of torch and torchmetrics.

        Args:
            checkpoint_path: a file written by ``trainer.save_checkpoint``.
            map_location: where tensors go; see :func:`torch.load`.
            models: modules of the source classes by task (their weights are not used), for classes that cannot be
                imported or did not save their hyperparameters.
            trust: names of modules or classes that the file may name too, such as ``["my_project"]``.
            weights_only: ``False`` unpickles the file, which runs code that it holds: for files that you trust. What
                the file names is still looked at as above.
            kwargs: accepted for the signature of :class:`~lightning.pytorch.LightningModule`; must be empty.

        Returns:
            The merged module, in eval mode.

        Raises:
            UntrustedError: if the file names anything else; it lists all that the file names, and how to allow it.
            CheckpointError: if the file is no checkpoint of a merged module, or a source module cannot be made.
            ConfigurationError: if ``trust`` holds anything but names.
        """
        if unknown := set(kwargs) - {"strict"}:
            raise TypeError(f"load_from_checkpoint got unexpected arguments {sorted(unknown)}.")
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only is not False)
        return cls.restore(checkpoint, str(checkpoint_path), Trust.of(trust), models)

    @classmethod
    def restore(
        cls,
        checkpoint: Mapping[str, Any],
        where: str,
        trust: Trust,
        models: Mapping[str, LightningModule] | Sequence[LightningModule] | None = None,
    ) -> MultiHeadModule:
        """The merged module in the content of a checkpoint.

        Args:
            checkpoint: the content.
            where: the file, for errors.
            trust: what it may name.
            models: modules of the source classes by task.

        Raises:
            CheckpointError: as for :meth:`load_from_checkpoint`.
        """
        with reading_record(checkpoint, where) as record:
            given = name_tasks(models) if models is not None else {}
            return cls._from_record(record, checkpoint["state_dict"], given, trust, where)

    @classmethod
    def _from_record(
        cls,
        record: dict[str, Any],
        weights: dict[str, Tensor],
        given: dict[str, LightningModule],
        trust: Trust,
        where: str,
    ) -> MultiHeadModule:
        if unknown := set(given) - set(record["sources"]):
            raise CheckpointError(f"models= names {sorted(unknown)}, but the tasks are {list(record['sources'])}.")
        sources = make_sources(record["sources"], trust, where, given)
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
            example_input=read_example(record),
            barriers=read_barriers(record["barriers"]),
            widths=record["widths"],
        )
        module.load_state_dict(weights)
        module._record["sources"] = record["sources"]
        module.report = MergeReport.from_dict(record["report"]) if record["report"] else None
        return module.to(next(iter(weights.values())).device)


def split_merged(models: Mapping[str, LightningModule]) -> tuple[dict[str, LightningModule], dict[str, str]]:
    """The source modules with those that were merged before taken apart.

    Args:
        models: source modules by name.

    Returns:
        The modules by task, and the name of the model that each belongs to.

    Raises:
        ConfigurationError: if a task is there twice.
    """
    modules: dict[str, LightningModule] = {}
    sources: dict[str, str] = {}
    problems = []
    for name, model in models.items():
        for task, module in (model.split() if isinstance(model, MultiHeadModule) else {name: model}).items():
            if task in modules:
                problems.append(
                    f"Task {task!r} is there twice, in {sources[task]!r} and {name!r}: tasks of merged modules keep "
                    "their names, and need different ones."
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
