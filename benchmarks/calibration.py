"""Time and peak memory of calibration, as multiples of plain forwards of the source models over the same batches.

python benchmarks/calibration.py [--model resnet18 --size 64 --batch 32 --batches 4 --models 2]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lightning_zipit import trace
from lightning_zipit.calibration import Calibration


def plain(networks: list[nn.Module], batches: list[Tensor]) -> None:
    for x in batches:
        for network in networks:
            network(x)


def calibrate(networks: list[nn.Module], batches: list[Tensor]) -> None:
    graph = trace(networks[0])
    calibration = Calibration(graph, {str(index): network for index, network in enumerate(networks)})
    for x in batches:
        calibration.update(x)
    for space in graph.spaces:
        calibration.take(space)


WORK: dict[str, Callable[[list[nn.Module], list[Tensor]], None]] = {"plain": plain, "calibrate": calibrate}


def material(arguments: argparse.Namespace) -> tuple[list[nn.Module], list[Tensor]]:
    torch.manual_seed(0)
    networks = [getattr(torchvision.models, arguments.model)(num_classes=10).eval() for _ in range(arguments.models)]
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    return networks, [torch.randn(shape) for _ in range(arguments.batches)]


def seconds(work: Callable[[list[nn.Module], list[Tensor]], None], *material: list) -> float:
    start = time.perf_counter()
    work(*material)
    return time.perf_counter() - start


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def grown_megabytes(work: Callable[[], None]) -> float:
    """How far the resident memory of this process rises above where it is, looked at every millisecond (Linux)."""
    before, highest, done = resident_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return highest - before


def peak_megabytes(name: str) -> float:
    """What the work adds to the peak of a process of its own that has made the networks and batches."""
    found = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, capture_output=True, text=True)
    return float(found.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    for name, default in (("size", 64), ("batch", 32), ("batches", 4), ("models", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=list(WORK), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with torch.no_grad():
        networks, batches = material(arguments)
        if arguments.only:
            print(grown_megabytes(lambda: WORK[arguments.only](networks, batches)))
            return
        plain(networks, batches[:1])  # warm up
        ratios = [
            seconds(calibrate, networks, batches) / seconds(plain, networks, batches) for _ in range(arguments.repeats)
        ]
    memory = {name: peak_megabytes(name) for name in WORK}
    print(
        f"{arguments.models} × {arguments.model}, {arguments.batches} batches of {arguments.batch} at {arguments.size}²"
    )
    print(
        f"time, calibration / plain forwards: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"peak memory above the loaded networks: {memory['calibrate']:.0f} MB / {memory['plain']:.0f} MB", end="")
    print(f" = {memory['calibrate'] / max(memory['plain'], 1):.2f}")


if __name__ == "__main__":
    main()
