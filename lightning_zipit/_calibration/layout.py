"""How images lie in memory while networks run: convolutions on CPUs are faster with the channels last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_zipit._common.views import Inputs, each_view, view_of


class Layout:
    """Lays batches of images out with the channels last where networks on a CPU are then faster.

    Networks are asked once, by running them on a sample both ways: those that rely on the layout of what they are
    given, such as by ``x.view(-1, 400)``, are given what came.
    """

    def __init__(self) -> None:
        self._change: bool | None = None

    def __call__(self, x: Inputs, networks: Mapping[str, nn.Module]) -> Inputs:
        """The same batch, laid out.

        Args:
            x: an input of the networks, or one of each by task.
            networks: by task, of one architecture, where ``x`` is.
        """
        if self._change is None:
            asked = list(networks.items())[: 1 if isinstance(x, Tensor) else None]
            self._change = all(gains(network) and agrees(network, view_of(x, task)[:1]) for task, network in asked)
        return each_view(x, channels_last) if self._change else x


def channels_last(x: Tensor) -> Tensor:
    """Images ``(batch, channels, height, width)`` with the channels of each pixel next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def gains(network: nn.Module) -> bool:
    """Whether a network is one that is faster so, as far as was measured: groups of convolutions are not."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    types = {parameter.dtype for layer in layers for parameter in layer.parameters()}
    grouped = any(1 < layer.groups < layer.in_channels for layer in layers)
    return bool(layers) and not grouped and types <= {torch.float32, torch.bfloat16}


def agrees(network: nn.Module, x: Tensor) -> bool:
    """Whether a network takes images with the channels last, on a CPU, and says the same about them."""
    if x.ndim != 4 or x.device.type != "cpu" or not x.is_floating_point():
        return False
    expected = network(x.clone())
    if not isinstance(expected, Tensor):
        return False
    try:
        found = network(channels_last(x.clone()))
    except RuntimeError:  # of torch, that a tensor has no such view
        return False
    return bool((found - expected).abs().max() <= 1e-2 * expected.abs().max())
