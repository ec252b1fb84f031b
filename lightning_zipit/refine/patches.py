"""Inputs and outputs of a layer as rows of samples (im2col)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_zipit.graph.layers import Fitted


def patches(layer: Fitted, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Extract the patches that a layer multiplies with its weights, group by group.

    Args:
        layer: a one- or two-dimensional convolution, or a linear layer.
        x: the input of the layer.
        positions: the output positions to use of every sample, in row-major order, ``(batch, count)``; all by default.

    Returns:
        ``(groups, samples × positions, inputs of a group)``. Their product with the weights of the group, ``(outputs,
        inputs)``, is the output of the layer without bias.
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
    """Compute :func:`torch.nn.functional.unfold` at some positions of each sample: ``(batch, count, inputs)``."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).movedim(1, 3)
    height, width = x.shape[1:3]
    per_row = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    steps = [torch.arange(size, device=x.device) * step for size, step in zip(kernel, dilation, strict=True)]
    offsets = (steps[0][:, None] * width + steps[1]).flatten()  # from the corner of a window to its inputs
    corners = positions // per_row * stride[0] * width + positions % per_row * stride[1]
    corners = corners + torch.arange(len(x), device=x.device)[:, None] * height * width
    index = corners[:, :, None] + offsets
    found = x.reshape(-1, x.shape[3]).index_select(0, index.flatten())
    return found.unflatten(0, index.shape).mT.flatten(2)


def samples(layer: Fitted, value: Tensor, positions: Tensor | None = None) -> Tensor:
    """Reshape an output of a layer to ``(samples × positions, outputs)``, in the order of :func:`patches`."""
    rows = value.reshape(len(value), -1, value.shape[-1]) if isinstance(layer, nn.Linear) else value.flatten(2).mT
    return taken(rows, positions).flatten(0, 1)


def taken(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Select positions ``(batch, count)`` from rows ``(batch, positions, …)``; all if ``positions`` is ``None``."""
    if positions is None:
        return rows
    return rows[torch.arange(len(rows), device=rows.device)[:, None], positions]
