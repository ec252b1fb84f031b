"""Greedy matching against the plain version, which searches the whole matrix for every merge, in one run on one core.

python benchmarks/matching.py [--sizes 512 1024 2048] [--largest 4096]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.plain_zip import plain_greedy_zip

from lightning_zipit.functional import greedy_zip


def similarity(n: int) -> torch.Tensor:
    """Correlations of rectified, mixed noise with a common part, as activations have."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(n, n, generator=generator) / n**0.5
    common = torch.randn(3000, 1, generator=generator)
    return torch.corrcoef((torch.randn(3000, n, generator=generator) @ mixing + common).relu().T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--largest", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for n in (*arguments.sizes, arguments.largest):
        matrix = similarity(n)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            labels = greedy_zip(matrix, 2, n // 2, 0.1, 1.0)
            times.append(time.perf_counter() - start)
        line = f"n = {n}: {min(times):.3f} s"
        if n in arguments.sizes:
            start = time.perf_counter()
            plain = plain_greedy_zip(matrix, 2, n // 2, 0.1, 1.0)
            elapsed = time.perf_counter() - start
            assert torch.equal(labels, plain)
            line += f", the plain version {elapsed:.1f} s: {elapsed / min(times):.0f} times slower"
        print(line, flush=True)


if __name__ == "__main__":
    main()
