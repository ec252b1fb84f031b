"""Copies with their hidden units in another order, by the lines of ``dense_cases``: no table of the package is used."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from helpers.dense_zip import Case, as_operator, blocks, is_layer, own_tensors, reads, set_operator, words, writes


@torch.no_grad()
def permuted_copy(case: Case, network: nn.Module, orders: Mapping[str, Tensor]) -> nn.Module:
    """A copy that computes the same: rows of what writes a space, and columns of what reads it, are in another order.

    Args:
        case: what each layer reads and writes.
        network: the network.
        orders: of each space, the features as the copy has them.
    """
    other = deepcopy(network)
    for name, line in case.layers.items():
        rows, columns = order_along(writes(line), orders), order_along(reads(line), orders)
        groups = getattr(dict(network.named_modules()).get(name), "groups", 1)
        for tensor in own_tensors(network, name):
            value = as_operator(network, tensor)
            value = value if rows is None else value[rows]
            if is_layer(line) and tensor.endswith("weight") and columns is not None:
                value = value[:, columns]
            set_operator(other, tensor, value)
        if groups > 1:
            regroup(other.get_submodule(name), groups)
    return other


def order_along(axis: str, orders: Mapping[str, Tensor]) -> Tensor | None:
    """The entries of an axis as the copy has them; ``None`` for one that stays."""
    parts, start = [], 0
    for space, repeat in words(axis):
        if space not in orders:
            return None
        parts.append((start + orders[space][:, None] * repeat + torch.arange(repeat)).flatten())
        start += len(orders[space]) * repeat
    return torch.cat(parts)


def regroup(layer: nn.Conv2d, groups: int) -> None:
    """A convolution in groups again, from the whole one that it was turned into."""
    full = layer.weight
    parts = [full[rows, columns] for rows, columns, _ in blocks(full, groups, full)]
    layer.groups, layer.weight = groups, nn.Parameter(torch.cat(parts))


def random_orders(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """An order without fixed points for each space: groups and heads as wholes, and then what they hold."""
    orders = {}
    for space, size in case.sizes.items():
        units = case.units.get(space, 1)
        within = torch.stack([unlike_itself(size // units, generator) for _ in range(units)])
        whole = unlike_itself(units, generator)
        orders[space] = (whole[:, None] * (size // units) + within[whole]).flatten()
    return orders


def unlike_itself(size: int, generator: torch.Generator) -> Tensor:
    """A permutation without fixed points."""
    if size == 1:
        return torch.zeros(1, dtype=torch.int64)
    while True:
        order = torch.randperm(size, generator=generator)
        if (order != torch.arange(size)).all():
            return order
