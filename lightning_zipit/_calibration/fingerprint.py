"""Digests of the weights and the operators of networks."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.registry import Trait, operator_of

SETTINGS = (bool, int, float, str, tuple, type(None))
"""Types of the module attributes that count as settings of a module."""


def digest_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Compute a digest of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def fingerprint(network: nn.Module) -> str:
    """Compute a digest of the names, shapes, dtypes and values of a network's parameters and buffers."""
    return digest_tensors({**dict(network.named_parameters()), **dict(network.named_buffers())})


def digest_operators(graph: MergeGraph) -> str:
    """Compute a digest of a network's operators, their arguments and the settings of its modules.

    Settings without effect in eval mode, such as the probability of a dropout, are ignored.
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
    """List the settings of a module and its submodules as (module name, attribute, value)."""
    return [
        (name, key, value)
        for name, child in module.named_modules()
        for key, value in sorted(vars(child).items())
        if isinstance(value, SETTINGS) and key[0] != "_" and key != "training" and key not in ignored
    ]
