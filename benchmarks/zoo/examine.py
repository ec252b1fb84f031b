"""What a merge makes of one network of the zoo."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from architectures import unsettle, zipped_share
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_zipit import MergeGraph, MultiHeadModule, ZipIt, export_merged, trace
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import flatten
from lightning_zipit._lightning.loaders import Batches
from lightning_zipit.errors import ZipItError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.prove import random_permutations
from zoo.registry import Entry

SAMPLES = 8
TOLERANCE = 1e-2
"""Largest error of a permuted copy, relative to the spread of the outputs, in single precision."""


@dataclass(frozen=True)
class Result:
    """What a merge makes of a network.

    Attributes:
        entry: the network.
        outcome: ``merged``, ``little shared``, ``wrong``, ``refused``, ``crashed`` or ``not built``.
        said: the error, if there is one.
        parameters: number of parameters.
        shared: share of the parameters in the trunk.
        by_activation: share of the used parameters along spaces that are matched by activation.
        error: largest error of a merge with a permuted copy, relative to the spread of the outputs.
        unlike: what did not work with a network of other random weights; empty if all did.
        seconds: of everything.
    """

    entry: Entry
    outcome: str
    said: str = ""
    parameters: int = 0
    shared: float = 0.0
    by_activation: float = 0.0
    error: float = float("nan")
    unlike: str = ""
    seconds: float = 0.0


class Wrapped(LightningModule):
    """A user's module, whose step hands on what the batch holds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        return self(*batch["args"], **batch["kwargs"])


def examine(entry: Entry) -> Result:
    """Merge a network with a permuted copy and with a network of other weights.

    Args:
        entry: the network.
    """
    started = time.perf_counter()
    result = _examined(entry)
    return Result(**{**vars(result), "seconds": time.perf_counter() - started})


def _examined(entry: Entry) -> Result:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    try:
        given = [entry.inputs(SAMPLES) for _ in range(2)]
        net = unsettle(entry.make(), *given[0][0], **given[0][1])
        with torch.no_grad():
            net(*given[0][0], **given[0][1])
    except Exception as error:  # whatever a package raises for a version that it does not fit
        return Result(entry, "not built", f"{type(error).__name__}: {error}")
    batches = [{"args": args, "kwargs": kwargs} for args, kwargs in given]
    size = sum(parameter.numel() for parameter in net.parameters())
    try:
        graph = trace(net, example_input=_call(batches[0]))
        sources = {"a": net, "b": _permuted(net, graph)}
        merged = _merge(sources, batches, refine=None)
        found = _outputs(merged, batches[0])
        with torch.no_grad():
            error = max(deviation(found[task], one(*given[0][0], **given[0][1])) for task, one in sources.items())
    except ZipItError as problem:
        return Result(entry, "refused", str(problem), size)
    except Exception as problem:  # what must not be
        return Result(entry, "crashed", f"{type(problem).__name__}: {problem}", size)
    shared = sum(parameter.numel() for parameter in merged.trunk.parameters()) / max(size, 1)
    outcome = "wrong" if not error < TOLERANCE else "merged" if shared >= 0.5 else "little shared"
    return Result(entry, outcome, "", size, shared, zipped_share(graph), error, _try_unlike(entry, net, batches))


def _permuted(net: nn.Module, graph: MergeGraph) -> nn.Module:
    """A copy in another order; in the same order if a tied parameter would need two orders."""
    try:
        return permute_spaces(net, graph, random_permutations(graph))
    except ZipItError:
        return copy.deepcopy(net)


def _try_unlike(entry: Entry, net: nn.Module, batches: Sequence[Any]) -> str:
    """Merge with another network; run, save, load and export the result. Return what failed."""
    torch.manual_seed(1)
    other = unsettle(entry.make(), *batches[0]["args"], **batches[0]["kwargs"])
    stage = "merge"
    try:
        merged = _merge({"a": net, "b": other}, batches)
        stage = "run"
        expected = _outputs(merged, batches[0])
        if not all(leaf.isfinite().all() for leaf in tensors_of(expected) if leaf.is_floating_point()):
            return "run: not finite"
        with TemporaryDirectory() as folder:
            stage = "save"
            run = _trainer()
            run.strategy.connect(merged)
            run.save_checkpoint(f"{folder}/merged.ckpt")
            stage = "load"
            models = {"a": Wrapped(net), "b": Wrapped(other)}
            loaded = MultiHeadModule.load_from_checkpoint(f"{folder}/merged.ckpt", models=models)
            found = _outputs(loaded, batches[0])
            if deviation(found, expected) > 1e-5:
                return "load: other outputs"
            stage = "export"
            names = export_merged(merged, Path(folder) / "merged.pt2")
            call = _call(batches[0])
            program = torch.export.load(f"{folder}/merged.pt2").module()
            returned = program(*call.tensors)
            if not names or deviation(tensors_of(returned), tensors_of(expected)) > 1e-3:
                return "export: other outputs"
    except Exception as problem:
        return f"{stage}: {type(problem).__name__}: {problem}"
    return ""


def _call(batch: Mapping[str, Any]) -> Any:
    return Call.of_arguments(batch["args"], batch["kwargs"])


def _trainer() -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet)  # type: ignore[arg-type]


def _merge(networks: Mapping[str, nn.Module], batches: Sequence[Any], **options: Any) -> MultiHeadModule:
    models = {task: Wrapped(network) for task, network in networks.items()}
    return ZipIt(_trainer()).merge(models, Batches(batches), backbone="net", **options).eval()


@torch.no_grad()
def _outputs(merged: MultiHeadModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    return dict(merged(*batch["args"], **batch["kwargs"]))


def deviation(found: Any, expected: Any) -> float:
    """The largest error of all tensors, relative to how far the outputs of different samples lie apart."""
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    largest = 0.0
    for one, other in pairs:
        if other.is_floating_point() and other.numel():
            spread = (other - other.mean(0)).abs().max() if other.ndim else other.abs()
            scale = spread if spread > 1e-6 * other.abs().max() else other.abs().max()
            error = ((one - other).abs().max() / scale.clamp(min=1e-30)).item()
            largest = max(largest, error if error == error else float("inf"))
    return largest


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested values, those of dataclasses among them."""
    return flatten(value)[0]
