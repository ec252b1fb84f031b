"""Inputs and outputs of a layer as rows of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_zipit.graph.layers import Fitted


def patches(layer: Fitted, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """What a layer multiplies its weights with, group by group.

    Args:
        layer: a convolution of one or two dimensions, or a linear layer.
        x: its input.
        positions: which output positions to take of every sample, counted row by row, ``(batch, count)``; all by
            default.

    Returns:
        ``(groups, samples × positions, inputs of a group)``; the product with the weights of the group, ``(outputs,
        inputs)``, is the layer's output without bias.
    """
    if isinstance(layer, nn.Linear):
        return taken(x.reshape(len(x), -1, x.shape[-1]), positions).reshape(1, -1, x.shape[-1])
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
    else:
        padding = tuple(int(size) for size in layer.padding)
    sizes: list[tuple[int, ...]] = [layer.kernel_size, layer.dilation, padding, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, sizes = x.unsqueeze(2), [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)]
    if positions is not None:
        columns = _windows(x, positions, *sizes)
    elif sizes == [(1, 1), (1, 1), (0, 0), (1, 1)]:
        columns = x.flatten(2).mT
    else:
        columns = F.unfold(x, *sizes).mT
    return columns.unflatten(2, (layer.groups, -1)).movedim(2, 0).flatten(1, 2)


def _windows(
    x: Tensor,
    positions: Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """What :func:`torch.nn.functional.unfold` gives, at some positions of each sample: ``(batch, count, inputs)``."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).movedim(1, 3)
    height, width = x.shape[1:3]
    per_row = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    steps = [torch.arange(size, device=x.device) * step for size, step in zip(kernel, dilation, strict=True)]
    offsets = (steps[0][:, None] * width + steps[1]).flatten()  # of the inputs of a window from its corner
    corners = positions // per_row * stride[0] * width + positions % per_row * stride[1]
    corners = corners + torch.arange(len(x), device=x.device)[:, None] * height * width
    index = corners[:, :, None] + offsets
    found = x.reshape(-1, x.shape[3]).index_select(0, index.flatten())
    return found.unflatten(0, index.shape).mT.flatten(2)


def samples(layer: Fitted, value: Tensor, positions: Tensor | None = None) -> Tensor:
    """Values of the shape of a layer's output, ``(samples × positions, outputs)``, in the order of :func:`patches`."""
    rows = value.reshape(len(value), -1, value.shape[-1]) if isinstance(layer, nn.Linear) else value.flatten(2).mT
    return taken(rows, positions).flatten(0, 1)


def taken(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Of ``(batch, positions, …)``, those in ``(batch, count)``, or all."""
    if positions is None:
        return rows
    return rows[torch.arange(len(rows), device=rows.device)[:, None], positions]
