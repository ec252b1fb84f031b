"""Modules with one output per task, which run each source module's own steps."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, fx, nn

from lightning_zipit.errors import CalibrationError, CheckpointError, ConfigurationError, ZipItError
from lightning_zipit.functional import fit_temperatures
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.agreement import trace_all
from lightning_zipit.graph.joined import Joined
from lightning_zipit.graph.shapes import evaluating
from lightning_zipit.paths import run_all, run_one
from lightning_zipit.rebuild import build_head, build_stem, build_trunk
from lightning_zipit.refine import BatchNorm
from lightning_zipit.refine.task_norms import give_norms, has_task_norms
from lightning_zipit.report import MergeReport
from lightning_zipit.session import MergedBackbone, like
from lightning_zipit.settings import MergeSettings
from lightning_zipit.sources import (
    DESCRIPTION,
    PATH,
    DelegatedTransfers,
    describe_source,
    find_input,
    find_inputs,
    find_problems,
    get_backbone,
    make_shell,
    make_source,
    name_tasks,
)
from lightning_zipit.views import Inputs, describe_sample, view_of, zeros_like_sample

CHECKPOINT_KEY = "lightning_zipit"
FORMAT = 1


class MergedPath(nn.Module):
    """The stem of a task if it has one, the trunk and its head in a row, in place of a source module's backbone.

    They are held in a tuple: they belong to the module around, and are no submodules of this one.
    """

    def __init__(
        self, trunk: nn.Module, head: nn.Module, stem: nn.Module | None = None, task: str | None = None
    ) -> None:
        super().__init__()
        self.parts = (trunk, head, stem)
        self.task = task  # for a trunk that takes its name

    def forward(self, x: Tensor) -> Any:
        trunk, head, stem = self.parts
        return run_one(stem, trunk, head, x, self.task)


class PassOn(nn.Module):
    """A trunk that shares nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class MultiTaskModule(DelegatedTransfers, LightningModule):
    """One trunk, a head per task, and each task's own steps around them.

    ``validation_step``, ``test_step`` and ``predict_step`` run the source module's own step for the task that the
    dataloader belongs to: the i-th of a sequence of loaders belongs to the i-th task, one of a dict to the task of its
    key. What a step logs is logged as ``{task}/{name}``.

    Args:
        trunk: from an input to a tuple of what the heads take; one with a batch norm per task also takes its name.
        heads: per task, the rest of its network.
        models: the source modules by task; they are copied without their backbones.
        backbone: the part of them that stem, trunk and head stand for.
        used: for the backbone ``""``, what a source's ``forward`` uses, by task.
        stems: per task, from its input to a tuple of what the trunk takes; none where that takes the input.
    """

    trunk: nn.Module
    heads: nn.ModuleDict
    stems: nn.ModuleDict
    sources: nn.ModuleDict

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        models: Mapping[str, LightningModule],
        backbone: str,
        used: Mapping[str, Sequence[str]],
        stems: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self.stems = nn.ModuleDict(stems)
        self.norms_per_task = has_task_norms(trunk)
        paths = {
            task: MergedPath(trunk, heads[task], self._stem_of(task), task if self.norms_per_task else None)
            for task in models
        }
        self.sources = nn.ModuleDict(
            {task: make_shell(model, backbone, paths[task], used[task]) for task, model in models.items()}
        )
        self._loader_tasks: list[str] = list(models)
        self.eval()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of their heads."""
        return list(self.heads)

    def task_of(self, dataloader_idx: int) -> str:
        """The task that a dataloader belongs to, while a Trainer runs over it."""
        return self._loader_tasks[dataloader_idx]

    def _stem_of(self, task: str) -> nn.Module | None:
        return self.stems[task] if len(self.stems) else None

    def forward(self, x: Inputs, task: str | None = None) -> Any:
        """All outputs, with one pass of the trunk, or one per task where stems or norms are its own; or one task's.

        Args:
            x: an input of the backbone; or a dict from task to input, for the outputs of those tasks.
            task: the one task to run.

        Returns:
            A dict from task to output, or one task's output.

        Raises:
            ConfigurationError: if there is an input for a task that does not exist.
        """
        if task is not None:
            norms_of = task if self.norms_per_task else None
            return run_one(self._stem_of(task), self.trunk, self.heads[task], view_of(x, task), norms_of)
        return run_all(self.stems, self.trunk, self.heads, x, self.norms_per_task)

    @torch.no_grad()
    def fit_temperatures(self, dataloaders: Any, get_input: Callable[[Any], Inputs] = find_input) -> dict[str, float]:
        """Temperatures for :class:`~lightning_zipit.JointAccuracy`, with which no head is surer than the others.

        No labels are used; see :func:`~lightning_zipit.functional.fit_temperatures`.

        Args:
            dataloaders: such as those of the calibration: one per task in a sequence or dict, which count the same, or
                a single loader with about equally many samples of each task.
            get_input: from a batch to the backbone's input, or to one for each task by name; by default the batch, its
                first item, or a well-known key, or those of a batch with the tasks as keys.

        Returns:
            A temperature by task.

        Raises:
            ConfigurationError: if heads do not give finite logits ``(samples, classes)``.
            CalibrationError: if there are no samples.
        """
        loaders = list(dataloaders.values()) if isinstance(dataloaders, Mapping) else dataloaders
        with evaluating(self):
            seen = [
                [self(like(find_inputs(batch, self.tasks, get_input), self)) for batch in loader]
                for loader in (loaders if isinstance(loaders, (list, tuple)) else [loaders])
            ]
        outputs = list(itertools.chain(*seen))
        if not outputs:
            raise CalibrationError("There are no samples to fit temperatures on: the dataloaders are empty.")
        sizes = [sum(len(each[self.tasks[0]]) for each in of_loader) for of_loader in seen]
        weights = torch.cat([torch.full((size,), 1 / max(size, 1)) for size in sizes])
        try:
            return fit_temperatures(
                {task: torch.cat([each[task].cpu() for each in outputs]) for task in self.tasks}, weights
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    # The sources' own steps

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("validation_step", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("test_step", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._step("predict_step", batch, batch_idx, dataloader_idx)

    def _step(self, name: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with self._speaking(self.task_of(dataloader_idx)) as source:
            step = getattr(source, name)
            takes_loader = "dataloader_idx" in inspect.signature(step).parameters
            return step(batch, batch_idx, **({"dataloader_idx": 0} if takes_loader else {}))

    @contextmanager
    def _speaking(self, task: str) -> Iterator[LightningModule]:
        """Inside, a source module has this module's trainer, and logs through it under its task's name."""
        source = self.sources[task]
        assert isinstance(source, LightningModule)

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            kwargs["add_dataloader_idx"] = False
            self.log(f"{task}/{name}", value, *args, **kwargs)

        source.trainer = self._trainer
        source.__dict__["log"] = log
        try:
            yield source
        finally:
            del source.__dict__["log"]
            source.trainer = None

    def _each(self, hook: str, *args: Any) -> None:
        for task in self._loader_tasks:
            with self._speaking(task) as source:
                getattr(source, hook)(*args)

    def setup(self, stage: str) -> None:
        self._each_unlogged("setup", stage)

    def teardown(self, stage: str) -> None:
        self._each_unlogged("teardown", stage)
        self._loader_tasks = self.tasks

    def configure_model(self) -> None:
        """Runs that of every source module; a mesh of devices (FSDP2) then shards stems, trunk and heads one by one."""
        self._each_unlogged("configure_model")
        if self.device_mesh is not None and self.device_mesh["data_parallel"].size() > 1:
            from torch.distributed.fsdp import FSDPModule, fully_shard  # not in every build of torch

            for part in (*self.stems.values(), self.trunk, *self.heads.values()):
                if not isinstance(part, FSDPModule) and any(True for _ in part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def _each_unlogged(self, hook: str, *args: Any) -> None:
        """Run a hook that may rebuild the source's network, and put the merged one back."""
        for task in self.tasks:
            with self._speaking(task) as source:
                path = _path_of(source, self.backbone)
                getattr(source, hook)(*args)
                _set_path(source, self.backbone, path)

    def on_validation_start(self) -> None:
        self._assign_loaders("validate", self.trainer.val_dataloaders)
        self._each("on_validation_start")

    def on_test_start(self) -> None:
        self._assign_loaders("test", self.trainer.test_dataloaders)
        self._each("on_test_start")

    def on_predict_start(self) -> None:
        self._assign_loaders("predict", self.trainer.predict_dataloaders)
        self._each("on_predict_start")

    def _assign_loaders(self, verb: str, loaders: Any) -> None:
        if isinstance(loaders, Mapping):
            unknown = [task for task in loaders if task not in self.heads]
            if unknown:
                raise ConfigurationError(
                    f"trainer.{verb} got loaders for {', '.join(map(repr, unknown))}, but the tasks are {self.tasks}."
                )
            self._loader_tasks = list(loaders)
            return
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if count != len(self.tasks):
            raise ConfigurationError(
                f"trainer.{verb} got {count} dataloader{'s' * (count != 1)} for {len(self.tasks)} tasks: give "
                f"one per task in "
                f"the order {self.tasks}, or a dict from task to loader."
            )
        self._loader_tasks = self.tasks

    # Moving a batch is the business of the source that the loader belongs to

    def _transfer(self, hook: str, dataloader_idx: int, *args: Any) -> Any:
        with self._speaking(self.task_of(dataloader_idx)) as source:
            return getattr(source, hook)(*args, 0)


def _delegated(hook: str) -> Callable[..., None]:
    def run(self: MultiTaskModule) -> None:
        self._each(hook)

    run.__name__ = run.__qualname__ = hook
    run.__doc__ = f"Runs ``{hook}`` of every source module."
    return run


for _stage in ("validation", "test", "predict"):
    for _moment in ("epoch_start", "epoch_end", "end"):
        _hook = f"on_{_stage}_{_moment}"
        setattr(MultiTaskModule, _hook, _delegated(_hook))


def _path_of(source: LightningModule, backbone: str) -> nn.Module:
    return get_backbone(source, backbone) if backbone else source.__dict__["forward"]


def _set_path(source: LightningModule, backbone: str, path: nn.Module) -> None:
    if not backbone:
        source.__dict__["forward"] = path
        return
    owner, _, name = backbone.rpartition(".")
    setattr(source.get_submodule(owner), name, path)


class Ensemble(MultiTaskModule):
    """The source networks side by side, unmerged, behind the interface of the merged module.

    Args:
        models: the source modules by task, or a sequence of them; they are copied.
        backbone: the part of them that is run.

    Raises:
        ConfigurationError: if there are no models, or they have no such backbone.
    """

    def __init__(self, models: Mapping[str, LightningModule] | Sequence[LightningModule], backbone: str = "") -> None:
        models = name_tasks(models)
        problems = find_problems(models, backbone)
        if problems:
            raise ConfigurationError.collect(problems)
        heads = {task: copy.deepcopy(get_backbone(model, backbone)) for task, model in models.items()}
        everything = [name for model in models.values() for name, _ in model.named_parameters()]
        used = dict.fromkeys(models, [] if backbone else everything)
        super().__init__(PassOn(), heads, models, backbone, used)


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
            **_write_example(example),
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
        """The source modules, each with trunk and head as one network, which share this module's tensors."""
        split = {}
        for task, source in self.sources.items():
            trunk, head = self.trunk, self.heads[task]
            assert isinstance(source, LightningModule)
            assert isinstance(trunk, fx.GraphModule) and isinstance(head, fx.GraphModule)
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
        **kwargs: Any,
    ) -> MultiHeadModule:
        """Read a merged module back, from its sources' class paths and hyperparameters.

        Nothing but tensors and primitives is read: the file is loaded with ``weights_only=True``. The modules that
        define the source classes are imported, and so are the classes that hyperparameters of a command line name.

        Args:
            checkpoint_path: a file written by ``trainer.save_checkpoint``.
            map_location: where tensors go; see :func:`torch.load`.
            models: modules of the source classes by task (their weights are not used), for classes that cannot be
                imported or did not save their hyperparameters.
            kwargs: accepted for the signature of :class:`~lightning.pytorch.LightningModule`; must be empty.

        Returns:
            The merged module, in eval mode.

        Raises:
            CheckpointError: if the file is no checkpoint of a merged module, or a source module cannot be made.
        """
        if unknown := set(kwargs) - {"strict", "weights_only"}:
            raise TypeError(f"load_from_checkpoint got unexpected arguments {sorted(unknown)}.")
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        record = find_record(checkpoint)
        if record is None or record.get("format") != FORMAT:
            raise CheckpointError(f"{checkpoint_path} is not a checkpoint of a merged module (format {FORMAT}).")
        try:
            return cls._from_record(record, checkpoint["state_dict"], name_tasks(models) if models is not None else {})
        except ZipItError:
            raise
        except Exception as error:  # whatever a damaged record makes of its parts
            raise CheckpointError(
                f"{checkpoint_path} is damaged, or its source classes have changed since it was written: "
                f"{type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _from_record(
        cls, record: dict[str, Any], weights: dict[str, Tensor], given: dict[str, LightningModule]
    ) -> MultiHeadModule:
        if unknown := set(given) - set(record["sources"]):
            raise CheckpointError(f"models= names {sorted(unknown)}, but the tasks are {list(record['sources'])}.")
        sources = {
            task: given[task] if task in given else make_source(task, description)
            for task, description in record["sources"].items()
        }
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
            barriers=record["barriers"],
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


def find_record(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a merged module is made, if a checkpoint holds one."""
    record = checkpoint.get(CHECKPOINT_KEY)
    return record if isinstance(record, dict) else None


def _write_example(example: Inputs | None) -> dict[str, Any]:
    """Shape and type of a sample, or of each task's, in lists and strings."""
    if example is None:
        return {"input_shape": None, "input_dtype": None}
    if isinstance(example, Tensor):
        dtype, shape = describe_sample(example)
        return {"input_shape": list(shape), "input_dtype": dtype}
    known = {task: describe_sample(x) for task, x in example.items()}
    return {
        "input_shape": {task: list(shape) for task, (_, shape) in known.items()},
        "input_dtype": {task: dtype for task, (dtype, _) in known.items()},
    }


def read_example(record: Mapping[str, Any]) -> Inputs | None:
    """Zeros of the shape and type of one sample, or of each task's, as a checkpoint describes them."""
    shape, dtype = record["input_shape"], record.get("input_dtype") or "float32"
    if shape is None:
        return None
    if isinstance(shape, dict):
        return {task: zeros_like_sample((dtype[task], own)) for task, own in shape.items()}
    return zeros_like_sample((dtype, shape))


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """A checkpoint's content.

    Args:
        path: the file.
        map_location: where tensors go; see :func:`torch.load`.
        weights_only: read tensors and primitives only. Without it, code that the file holds is run.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint at {path}.") from None
    except Exception as error:
        # torch says first, and at length, how to read a pickle nevertheless
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or repr(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint of tensors and primitives: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a checkpoint.")
    return content
