"""Trace and merge every classification model of torchvision, and models of timm; write the results as a table.

Each model is merged with itself (cut at mid-depth) and with a randomly permuted copy (without a cut), on noise and with
random weights. The merged network must compute the same as the source.
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_zipit import MergeGraph, MergeSettings, merge_backbones, trace
from lightning_zipit.errors import ZipItError
from lightning_zipit.graph import permute_spaces
from lightning_zipit.graph.naming import modules_around
from lightning_zipit.graph.notes import reached
from lightning_zipit.graph.prove import random_permutations
from lightning_zipit.paths import AllHeads

SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
TIMM = (
    *("resnet50", "resnetv2_50", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224", "deit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "regnety_004", "mobilenetv3_small_100"),
)


@dataclass(frozen=True)
class Row:
    """The result of one model. Errors are relative to the distance between outputs of different images."""

    name: str
    parameters: int
    size: int
    spaces: int
    zipped: float
    cut: str
    own_error: float
    permuted_error: float
    trace_seconds: float
    merge_seconds: float
    notes: tuple[str, ...]


def torchvision_model(name: str) -> tuple[nn.Module, int]:
    """Return a model of torchvision with random weights, and the side length of its input."""
    size = SIZES.get(name, 64)
    arguments: dict[str, object] = {"num_classes": 10}
    if name.startswith("vit"):
        arguments["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchvision.models.get_model(name, weights=None, **arguments), size


def by_size() -> list[str]:
    """Return the names of all classification models of torchvision, the smallest first."""
    names = torchvision.models.list_models(module=torchvision.models)
    return sorted(names, key=lambda name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def timm_model(name: str) -> tuple[nn.Module, int]:
    """Return a model of timm with random weights, and the side length of its input."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10), 224 if name.endswith("224") else 64


@torch.no_grad()
def unsettle(net: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Randomise parameters with constant initialisation, and re-estimate batch norm statistics on an input."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        if parameter.ndim == 1 or "scale" in name or "relative_position" in name or "pos_embed" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1 + 0.2)
    norms = [module for module in net.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    net(*args, **kwargs)
    return net.eval()


def relative_error(outputs: Mapping[str, Tensor], expected: Tensor) -> float:
    """Compute the largest error of all outputs, relative to the distance between outputs of different inputs."""
    scale = (expected - expected.mean(0)).abs().max()
    return max(((output - expected).abs().max() / scale).item() for output in outputs.values())


def middle(graph: MergeGraph) -> str:
    """Return the last module of the upper levels that ends before half of the parameters."""
    total = sum(parameter.numel() for parameter in graph.module.parameters())
    nodes = [node for node in graph.fx_graph.nodes if node.op != "output"]
    ends: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for name in (*modules_around(node), node.target if node.op == "call_module" else ""):
            if name and str(name).count(".") < 3:
                ends[str(name)] = position
    passed, best = 0, ""
    done: set[str] = set()
    for position, node in enumerate(nodes):
        if node.op == "call_module" and node.target not in done:
            done.add(str(node.target))
            passed += sum(parameter.numel() for parameter in graph.module.get_submodule(node.target).parameters())
        if passed > total / 2 and best:
            break
        finished = [name for name, end in ends.items() if end == position]
        weighted = [name for name in finished if any(True for _ in graph.module.get_submodule(name).parameters())]
        best = min(weighted, key=len) if weighted else best
    return best


def zipped_share(graph: MergeGraph) -> float:
    """Compute the share of used parameters that lie along a feature space matched by activation."""
    nodes = list(graph.fx_graph.nodes)
    free = {name for name, space in graph.spaces.items() if not space.pinned}
    everything = dict(graph.module.named_parameters())
    sizes = {name: everything[name].numel() for name in reached(nodes, set(nodes), everything)}
    along = (
        size
        for name, size in sizes.items()
        if any(ref is not None and not free.isdisjoint(ref.spaces) for ref in graph.axes.get(name, ()))
    )
    return sum(along) / sum(sizes.values())


@torch.no_grad()
def examine(
    name: str, make: Callable[[str], tuple[nn.Module, int]] = torchvision_model, samples: int | None = None
) -> Row:
    """Trace a model, and merge it with itself and with a permuted copy.

    Args:
        name: name of the model.
        make: function from the name to the model and the side length of its input.
        samples: number of noise images for calibration; by default 64, and 16 from 100 M parameters on.
    """
    torch.manual_seed(0)
    net, size = make(name)
    count = sum(parameter.numel() for parameter in net.parameters())
    x = torch.randn(samples or (64 if count < 1e8 else 16), 3, size, size)
    net = unsettle(net, x)
    started = time.perf_counter()
    graph = trace(net, example_input=x[:1])
    traced = time.perf_counter() - started
    expected = net(x[:4])
    cut = middle(graph)
    errors = []
    started = time.perf_counter()
    for stop_at, permuted in ((cut, False), (None, True)):
        other = permute_spaces(net, graph, random_permutations(graph)) if permuted else net
        settings = MergeSettings(stop_at, refine=None, verify=False, statistics_memory=4.0)
        merged = merge_backbones({"a": net, "b": other}, list(x[None]), settings)
        outputs = AllHeads(merged.trunk, merged.heads)(x[:4])
        errors.append(relative_error(outputs, expected))
        del merged, outputs, other
        gc.collect()
    seconds = time.perf_counter() - started
    share = zipped_share(graph)
    return Row(name, count, size, len(graph.spaces), share, cut, *errors, traced, seconds, graph.notes)


def table(rows: list[Row | tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| model | parameters | input | spaces | zipped | cut at | error, with itself | error, with a permuted copy |"
    yield "|---|--:|--:|--:|--:|---|--:|--:|"
    for row in rows:
        if isinstance(row, tuple):
            yield f"| {row[0]} | – | – | – | – | – | {row[1]} | |"
            continue
        yield (
            f"| {row.name} | {row.parameters / 1e6:.1f} M | {row.size} | {row.spaces} | {row.zipped:.1%} | `{row.cut}` "
            f"| {row.own_error:.0e} | {row.permuted_error:.0e} |"
        )


def main() -> None:
    """Examine the named models, or all, one at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names of models (default: all of torchvision)")
    parser.add_argument("--timm", action="store_true", help="models of timm instead of torchvision")
    parser.add_argument("--output", type=Path, help="Markdown file for the table and the notes")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    every = TIMM if arguments.timm else by_size()
    make = timm_model if arguments.timm else torchvision_model
    rows: list[Row | tuple[str, str]] = []
    for name in arguments.models or every:
        try:
            row = examine(name, make)
            rows.append(row)
            print(f"{row.name:30} {row.spaces:4} spaces, {row.zipped:6.1%} zipped, cut at {row.cut}, ", end="")
            print(f"errors {row.own_error:.1e} {row.permuted_error:.1e}, ", end="")
            print(f"{row.trace_seconds:.1f} s to trace, {row.merge_seconds:.0f} s for both merges, ", end="")
            print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB", flush=True)
        except (ZipItError, RuntimeError) as error:
            rows.append((name, str(error).splitlines()[0]))
            print(f"{name:30} {error}", file=sys.stderr, flush=True)
        gc.collect()
    if arguments.output:
        notes = [f"- {row.name}: {note}" for row in rows if isinstance(row, Row) for note in row.notes]
        arguments.output.write_text("\n".join([*table(rows), "", *notes, ""]))
    good = [row for row in rows if isinstance(row, Row) and max(row.own_error, row.permuted_error) <= 1e-3]
    worst = max((max(row.own_error, row.permuted_error) for row in rows if isinstance(row, Row)), default=math.nan)
    print(f"{len(good)} of {len(rows)} models keep their function to 1e-3; the worst error is {worst:.1e}.")


if __name__ == "__main__":
    main()
