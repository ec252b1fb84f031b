"""Baselines, implemented directly from their published descriptions."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.plain_zip import plain_greedy_zip

from lightning_zipit import MergeGraph

__all__ = ["plain_calibrate", "plain_greedy_zip"]


def plain_calibrate(graph: MergeGraph, networks: Sequence[nn.Module], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compute covariances as ZipIt! (arXiv 2305.03053) describes them.

    Every network runs on a batch and keeps the activations of all spaces. For each space, the activations are
    concatenated and multiplied as one uncentred float32 matrix. The outer product of the means is subtracted last.

    Args:
        graph: the merge graph of the networks.
        networks: the source networks.
        batches: the inputs of the networks.

    Returns:
        The covariance of all features ``(N·C, N·C)`` of each space.
    """
    taps = {name: space.tap for name, space in graph.spaces.items() if space.tap is not None}
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    products: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    counts: dict[str, int] = defaultdict(int)
    wanted = {tap.node for tap in taps.values()}
    for x in batches:
        kept: list[dict[str, Tensor]] = []
        for network in networks:
            interpreter, values = fx.Interpreter(network, graph=graph.fx_graph), {}
            for node in graph.trunk_graph():
                value = x if node.op == "placeholder" else interpreter.run_node(node)
                interpreter.env[node] = value
                if node.name in wanted:
                    values[node.name] = value.clone()
            kept.append(values)
        for name, tap in taps.items():
            rows = torch.cat([tap.features(values[tap.node]).flatten(1) for values in kept])
            sums[name] = sums[name] + rows.sum(1)
            products[name] = products[name] + rows @ rows.T
            counts[name] += rows.shape[1]
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: product / counts[name] - torch.outer(means[name], means[name]) for name, product in products.items()}
