"""Digests of networks: of their weights, and of what they compute with them."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.registry import Trait, operator_of

SETTINGS = (bool, int, float, str, tuple, type(None))
"""Types of the attributes of a module that say what it does."""


def digest_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A digest of tensors: names, shapes, types and values."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def fingerprint(network: nn.Module) -> str:
    """A digest of a network's weights: names, shapes, types and values."""
    return digest_tensors({**dict(network.named_parameters()), **dict(network.named_buffers())})


def digest_operators(graph: MergeGraph) -> str:
    """A digest of what a network computes with its weights: its operators, their arguments, and settings of modules.

    What changes nothing in eval mode, such as the probability of a dropout, is left out.
    """
    lines = []
    for node in graph.fx_graph.nodes:
        called: Any = getattr(node.target, "__name__", node.target)
        if node.op == "call_module":
            module, known = graph.module.get_submodule(str(node.target)), operator_of(node, graph.module)
            ignored = known.ignored if known is not None else frozenset()
            idle = known is not None and Trait.IDENTITY in known.traits
            called = node.target, type(module).__qualname__, [] if idle else _settings(module, ignored)
        lines.append(f"{node.name} {node.op} {called} {node.args} {node.kwargs}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _settings(module: nn.Module, ignored: Container[str]) -> list[tuple[str, str, Any]]:
    """The attributes of a module and of those inside that say what they do."""
    return [
        (name, key, value)
        for name, child in module.named_modules()
        for key, value in sorted(vars(child).items())
        if isinstance(value, SETTINGS) and key[0] != "_" and key != "training" and key not in ignored
    ]
