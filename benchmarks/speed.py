"""Time and memory as ratios to baselines measured in the same run: ``make bench``.

python benchmarks/speed.py [--only matching calibration proof …] [--json FILE] [--write docs/performance.md]
python benchmarks/speed.py --device cuda [--batch-size 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from baselines import plain_calibrate, plain_greedy_zip
from marks import write_between_marks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar10 import ResNet20

from lightning_zipit import MergeGraph, MergeSettings, merge_backbones, trace
from lightning_zipit._calibration.calibration import Calibration, statistics_bytes
from lightning_zipit._calibration.layout import Layout, channels_last
from lightning_zipit._common.calls import Call
from lightning_zipit._common.messages import quiet
from lightning_zipit._matching.families import Match, families, match_family
from lightning_zipit._matching.maps import SpaceMap
from lightning_zipit._matching.similarity import similarity_from
from lightning_zipit._merging.cost import measure_cost
from lightning_zipit._merging.rebuild import build_merged
from lightning_zipit.functional import greedy_zip
from lightning_zipit.graph.capture import capture, holds_for
from lightning_zipit.graph.prove import find_failing
from lightning_zipit.matchers import GreedyZip
from lightning_zipit.refine import BatchNorm, LeastSquares


@dataclass(frozen=True)
class Ratio:
    """One row of the table: the median of several ratios, with the lowest and the highest."""

    what: str
    against: str
    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, what: str, against: str, values: Sequence[float]) -> Ratio:
        return cls(what, against, statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.0f}" if value >= 20 else f"{value:.2f}"

        return shown(self.median) + (f" ({shown(self.low)} to {shown(self.high)})" if self.runs > 1 else "")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> list[float]:
    """Run two functions in turn; return the time ratio of the first to the second for each repeat."""
    first(), second()  # warm up
    return [seconds(first) / seconds(second) for _ in range(repeats)]


# Matching


def activations_like(n: int) -> Tensor:
    """Return correlations of rectified, mixed noise with a common component, similar to activations."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(n, n, generator=generator) / n**0.5
    common = torch.randn(3000, 1, generator=generator)
    return torch.corrcoef((torch.randn(3000, n, generator=generator) @ mixing + common).relu().T)


def correlations_of(sizes: Sequence[int]) -> dict[int, Tensor]:
    """Return float32 correlations of spaces of two ResNet-50s, by their total number of features."""
    graph, networks, batches = resnet50s(batches=2)
    found = calibrate(graph, networks, batches)
    spaces = {2 * space.size: name for name, space in graph.spaces.items()}
    return {n: similarity_from(found.take(spaces[n])).float() for n in sizes}  # type: ignore[arg-type]


def matching(repeats: int) -> Iterator[Ratio]:
    sizes = (1024, 2048, 4096)
    kinds = {"mixed noise": {n: activations_like(n) for n in sizes}, "two ResNet-50s": correlations_of(sizes)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind, matrices in kinds.items():
        yield from matching_of(kind, matrices, repeats)
    torch.set_num_threads(threads)


def matching_of(kind: str, matrices: dict[int, Tensor], repeats: int) -> Iterator[Ratio]:
    taken = {}
    for n, matrix in matrices.items():

        def zipped(alpha: float = 0.1, beta: float = 1.0, matrix: Tensor = matrix) -> Tensor:
            return greedy_zip(matrix, 2, len(matrix) // 2, alpha, beta)

        zipped()
        taken[n] = min(seconds(zipped) for _ in range(repeats))
        slowest = max(seconds(partial(zipped, alpha, beta)) for alpha in (0.1, 0.3, 1.0) for beta in (0.1, 1.0))
        if n < 4096:
            start = time.perf_counter()
            plain = plain_greedy_zip(matrix, 2, n // 2, 0.1, 1.0)
            elapsed = time.perf_counter() - start
            assert torch.equal(zipped(), plain)
            what = f"the plain O(n³) greedy search, correlations of {kind}, n = {n}"
            yield Ratio.of(what, "`functional.greedy_zip`", [elapsed / taken[n]])
        else:
            passes = min(seconds(matrix.argmax) for _ in range(2 * repeats))
            what = f"`greedy_zip`, correlations of {kind}, n = {n}"
            yield Ratio.of(what, "one `argmax` over the matrix", [taken[n] / passes])
        what = f"`greedy_zip`, slowest of α ∈ {{0.1, 0.3, 1}}, β ∈ {{0.1, 1}}, n = {n}"
        yield Ratio.of(what, "α = 0.1, β = 1", [slowest / taken[n]])
    for n in (1024, 2048):
        yield Ratio.of(f"`greedy_zip`, correlations of {kind}, n = {2 * n}", f"n = {n}", [taken[2 * n] / taken[n]])


# Calibration


def resnet50s(
    batches: int = 12, batch_size: int = 8, device: str = "cpu"
) -> tuple[MergeGraph, dict[str, nn.Module], list[Tensor]]:
    torch.manual_seed(0)
    networks = {task: torchvision.models.resnet50(num_classes=10).eval().to(device) for task in "ab"}
    graph = trace(networks["a"])
    return graph, networks, [torch.randn(batch_size, 3, 224, 224).to(device) for _ in range(batches)]


def forwards(networks: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    for network in networks:
        for x in batches:
            network(x)


def calibrate(
    graph: MergeGraph, networks: dict[str, nn.Module], batches: Sequence[Tensor], positions: int | None = None
) -> Calibration:
    calibration, layout = Calibration(graph, networks, positions=positions), Layout()
    for x in batches:
        calibration.update(layout(Call.of(x), networks))
    assert calibration.statistics  # adds the waiting samples
    return calibration


def calibration(repeats: int) -> Iterator[Ratio]:
    graph, networks, batches = resnet50s()
    sources = list(networks.values())
    against = "forwards of both"
    plainly = in_turn(
        lambda: plain_calibrate(graph, sources, batches), lambda: forwards(sources, batches), max(1, repeats // 2)
    )
    yield Ratio.of("calibration as the paper describes it, two ResNet-50s, 8 × 3 × 224 × 224", against, plainly)
    for images, given in (("", batches), (" with the channels last", [channels_last(x) for x in batches])):
        for positions in (None, 64):
            ratios = in_turn(
                lambda: calibrate(graph, networks, given, positions),  # noqa: B023 (called at once)
                lambda: forwards(sources, given),  # noqa: B023 (called at once)
                repeats,
            )
            what = f"`positions={positions}`" if positions else "all positions"
            yield Ratio.of(f"calibration, {what}", against + (images and f", images{images}"), ratios)


def proof(repeats: int) -> Iterator[Ratio]:
    """Measure the checks of the first batch, relative to plain forward passes of the batch."""
    graph, networks, batches = resnet50s()
    sources, first = list(networks.values()), batches[:1]
    graphs, inputs = dict.fromkeys(networks, graph), dict.fromkeys(networks, Call.of(first[0]))
    of_batch = f"forwards of both over {len(first[0])} images"

    def compare() -> None:
        holds_for(capture(sources[0], first[0]), sources[1], first[0])

    ratios = in_turn(compare, lambda: forwards(sources, first), max(1, repeats // 2))
    yield Ratio.of("capture of a ResNet-50, compared with two", of_batch, ratios)
    ratios = in_turn(
        lambda: find_failing(networks, graphs, inputs), lambda: forwards(sources, first), max(1, repeats // 2)
    )
    yield Ratio.of("proof of the table, trunk and heads, in float64, two ResNet-50s", of_batch, ratios)


def products(graph: MergeGraph, samples: dict[str, int], rate: float) -> float:
    """Estimate the seconds of half of the feature products, at ``rate`` multiplications per second."""
    return sum((2 * graph.spaces[name].size) ** 2 / 2 * count for name, count in samples.items()) / rate


def accelerator(repeats: int, device: str, batch_size: int) -> Iterator[Ratio]:
    """Measure on an accelerator, with the lower bound that its multiplication rate sets."""
    matrix = correlations_of((4096,))[4096]
    here, there = matrix.to(device), seconds(lambda: greedy_zip(matrix, 2, 2048, 0.1, 1.0))
    greedy_zip(here, 2, 2048, 0.1, 1.0)
    ratios = [seconds(lambda: greedy_zip(here, 2, 2048, 0.1, 1.0)) / there for _ in range(repeats)]
    yield Ratio.of(f"`greedy_zip`, correlations of two ResNet-50s on {device}, n = 4096", "on the CPU", ratios)
    graph, networks, batches = resnet50s(4, batch_size, device)
    sources, shape = list(networks.values()), f"{batch_size} × 3 × 224 × 224 on {device}"
    factor = torch.randn(4096, 4096, device=device)
    rate = 4096**3 / min(seconds(lambda: factor @ factor) for _ in range(5))
    forward = min(seconds(lambda: forwards(sources, batches)) for _ in range(3))
    for positions in (None, 64):
        found = calibrate(graph, networks, batches, positions)
        counts = {name: int(found.statistics[key].count) for key, name in found.spaces.items()}
        least = 1 + products(graph, counts, rate) / forward
        del found
        ratios = in_turn(
            lambda: calibrate(graph, networks, batches, positions),  # noqa: B023 (called at once)
            lambda: forwards(sources, batches),
            repeats,
        )
        what = f"`positions={positions}`" if positions else "all positions"
        yield Ratio.of(f"calibration, {what}, two ResNet-50s, {shape}", "forwards of both", ratios)
        yield Ratio.of(f"lower bound: forwards and products, {what}", "forwards of both", [least])
    if torch.cuda.is_initialized():
        held, peaks = sum(statistics_bytes(graph, space, 2) for space in graph.spaces), []
        for work in (lambda: calibrate(graph, networks, batches), lambda: forwards(sources, batches)):
            torch.cuda.reset_peak_memory_stats()
            work()
            peaks.append(torch.cuda.max_memory_allocated())
        what = f"peak memory of calibration, less the statistics, {shape}"
        yield Ratio.of(what, "forwards, one network after the other", [(peaks[0] - held) / peaks[1]])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def grown_bytes(work: Callable[[], Any]) -> int:
    """Measure the rise of this process's resident memory during ``work``, every millisecond (Linux)."""
    before, highest, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return highest - before


def grow(what: str) -> None:
    """Print the memory that ``what`` needs in addition to networks and batches, and the peak of the process."""
    graph, networks, batches = resnet50s(batches=3)
    work = {
        "forwards": lambda: forwards(list(networks.values()), batches),
        "calibrate": lambda: calibrate(graph, networks, batches),
    }
    grown = grown_bytes(work[what])
    print(grown, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts in KiB


def memory(repeats: int) -> Iterator[Ratio]:
    graph, _, _ = resnet50s(batches=0)
    held = sum(statistics_bytes(graph, space, 2) for space in graph.spaces)

    def taken(what: str) -> tuple[int, int]:
        command = [sys.executable, __file__, "--grow", what]
        grown, highest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(grown), int(highest)

    pairs = [(taken("calibrate"), taken("forwards")) for _ in range(max(1, repeats // 2))]
    what, against = "peak memory of calibration, less the statistics", "forwards, one network after the other"
    ratios = [(calibrated[0] - held) / plain[0] for calibrated, plain in pairs]
    yield Ratio.of(f"{what}, above networks and images", against, ratios)
    ratios = [(calibrated[1] - held) / plain[1] for calibrated, plain in pairs]
    yield Ratio.of(f"{what}, of the whole process", against, ratios)


def two_ranks(repeats: int) -> Iterator[Ratio]:
    def taken(processes: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            threads = max(1, torch.get_num_threads() // processes)
            arguments = (processes, folder, threads)
            mp.start_processes(_rank, arguments, nprocs=processes, start_method="spawn")
            return max(float(Path(folder, f"rank{rank}").read_text()) for rank in range(processes))

    ratios = [taken(2) / taken(1) for _ in range(max(1, repeats // 2))]
    yield Ratio.of("calibration by two gloo processes of one thread", "one process of two threads", ratios)


def _rank(rank: int, processes: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", rank=rank, world_size=processes, store=store, timeout=timedelta(minutes=5))
    with torch.no_grad():
        graph, networks, batches = resnet50s(batches=8)
        networks["a"](batches[0])
        dist.barrier()
        own = batches[rank::processes]
        elapsed = seconds(lambda: calibrate(graph, networks, own).sum_over_processes())
    Path(folder, f"rank{rank}").write_text(str(elapsed))
    dist.destroy_process_group()


def models(repeats: int) -> Iterator[Ratio]:
    x = torch.randn(256, 3, 32, 32)
    taken: dict[int, float] = {}
    for count in (2, 8):
        networks: dict[str, nn.Module] = {str(number): ResNet20(1, 10).eval() for number in range(count)}
        graph = trace(networks["0"])
        ratios = in_turn(
            lambda: calibrate(graph, networks, [x]),  # noqa: B023 (called at once)
            lambda: forwards(list(networks.values()), [x]),  # noqa: B023 (called at once)
            repeats,
        )
        yield Ratio.of(f"calibration, {count} ResNet-20s, 256 × 3 × 32 × 32", "forwards of all", ratios)
        found = calibrate(graph, networks, [x])
        needed = sum(8 * (count * space.size) ** 2 for space in graph.spaces.values() if space.tap)
        held = sum(state.nbytes for each in found.statistics.values() for state in each.metric_state.values())
        yield Ratio.of(f"memory of the statistics of {count} ResNet-20s", "(N·C)² × 8 bytes", [held / needed])
        taken[count] = seconds(lambda: matched(graph, found, count))  # noqa: B023 (called at once)
    yield Ratio.of("matching of 8 ResNet-20s", "of 2; (N·C)² grows 16 times", [taken[8] / taken[2]])


def sweep(repeats: int) -> Iterator[Ratio]:
    """Measure merges with 36 settings at 3 cuts from one statistics file, and calibration once for each cut."""
    networks = {task: ResNet20(2, 5).eval() for task in "ab"}
    batches = list(torch.randn(1024, 3, 32, 32).split(128))
    plain = [MergeSettings(stop_at=stop_at, refine=None) for stop_at in ("layer1", "layer2", None)]
    matchers = [
        GreedyZip(alpha, beta) for alpha in (0.05, 0.1, 0.2, 0.3, 0.5, 1) for beta in (0, 0.1, 0.2, 0.4, 0.7, 1)
    ]
    settings = [replace(cut, matcher=matcher) for cut in plain for matcher in matchers]
    anew = statistics.median(seconds(partial(merge_backbones, networks, batches, cut)) for cut in plain)
    with tempfile.TemporaryDirectory() as folder, quiet():
        shared = [replace(each, statistics=Path(folder, "s.safetensors"), also=tuple(settings)) for each in settings]
        first = seconds(lambda: merge_backbones(networks, batches, shared[0]))
        rest = [seconds(partial(merge_backbones, networks, batches, each)) for each in shared[1:]]
    what = f"{len(settings)} merges of two ResNet-20s of width 2, 1024 images, from one calibration"
    yield Ratio.of(what, "calibrating for each (3 measured)", [(first + sum(rest)) / (len(settings) * anew)])
    forward = seconds(lambda: forwards(list(networks.values()), batches))
    ratios = [each / forward for each in rest]
    yield Ratio.of("one of these merges, once the statistics are there", "forwards of both over the images", ratios)


# Merging


def matched(graph: MergeGraph, found: Calibration, count: int) -> dict[str, SpaceMap]:
    matches: dict[str, Match] = {}
    for family in families(graph):
        known = {name: similarity_from(moments) for name in family if (moments := found.take(name)) is not None}
        matches |= match_family(graph, family, known, GreedyZip(), count)
    return {name: SpaceMap(match.features, count) for name, match in matches.items()}  # type: ignore[arg-type]


def merging(repeats: int) -> Iterator[Ratio]:
    graph, networks, batches = resnet50s(batches=2)
    sources = list(networks.values())
    maps = matched(graph, calibrate(graph, networks, batches), 2)
    ratios = in_turn(lambda: build_merged([graph, graph], sources, maps), lambda: sources[0](batches[0]), repeats)
    yield Ratio.of("labels to weights, two ResNet-50s", "one forward of one of them, batch 8", ratios)

    graphs = [trace(network, stop_at="layer3") for network in sources]
    trunk, heads = build_merged(graphs, sources, matched(graphs[0], calibrate(graphs[0], networks, batches), 2))

    def run(x: Tensor) -> list[Tensor]:
        crossing = trunk(x)
        return [head(*crossing) for head in heads]

    one = torch.randn(1, 3, 224, 224)
    cost = measure_cost(Whole(trunk, heads), one).flops / sum(measure_cost(source, one).flops for source in sources)
    times = in_turn(lambda: run(batches[0]), lambda: [source(batches[0]) for source in sources], 3 * repeats)
    yield Ratio.of("FLOPs of the merged network, two ResNet-50s up to layer3", "both sources", [cost])
    yield Ratio.of("time of its forward, batch 8", "both sources", times)


class Whole(nn.Module):
    """Trunk and heads as one module."""

    def __init__(self, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        crossing = self.trunk(x)
        return [head(*crossing) for head in self.heads]


def refinement(repeats: int) -> Iterator[Ratio]:
    """Measure refinement: the time of a merge minus the time of the same merge without refinement."""
    _, networks, batches = resnet50s(batches=4)
    plain = MergeSettings(refine=None, verify=False)
    ways = {
        'refine="batch_norm"': BatchNorm(),
        'refine="least_squares"': LeastSquares(),
        "LeastSquares(cache_bytes=2**27)": LeastSquares(cache_bytes=2**27),
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(1, repeats // 2)):
        forward = seconds(lambda: forwards(list(networks.values()), batches))
        merge = seconds(lambda: merge_backbones(networks, batches, plain))
        for name, how in ways.items():
            refined = seconds(partial(merge_backbones, networks, batches, replace(plain, refine=how)))
            ratios[name].append((refined - merge) / forward)
    for name, found in ratios.items():
        yield Ratio.of(f"{name}, two ResNet-50s, 32 images of 224 × 224", "forwards of both over the images", found)


PARTS: dict[str, Callable[[int], Iterator[Ratio]]] = {
    "matching": matching,
    "calibration": calibration,
    "proof": proof,
    "memory": memory,
    "two_ranks": two_ranks,
    "models": models,
    "merging": merging,
    "refinement": refinement,
    "sweep": sweep,
}


def machine() -> str:
    return f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__.split('+')[0]}"


def as_markdown(rows: Sequence[Ratio]) -> str:
    lines = [f"| {row.what} | {row.against} | {row} |" for row in rows]
    return "\n".join([f"Measured on {machine()}.", "", "| what | against | ratio |", "| --- | --- | --: |", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", help="run only the measurements for an accelerator, on this device")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size on that device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="page to write the table into, between its marks")
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = []
    with torch.no_grad():
        if arguments.grow:
            grow(arguments.grow)
            return
        parts = [partial(PARTS[name], arguments.repeats) for name in arguments.only]
        if arguments.device:
            parts = [partial(accelerator, arguments.repeats, arguments.device, arguments.batch_size)]
        for part in parts:
            for row in part():
                print(f"{row.what}, against {row.against}: {row}", flush=True)
                rows.append(row)
    table = Table("what", "against", "ratio")
    for row in rows:
        table.add_row(row.what, row.against, str(row))
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2))
    if arguments.write:
        write_between_marks(arguments.write, as_markdown(rows))


if __name__ == "__main__":
    main()
