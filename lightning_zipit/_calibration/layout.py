"""Memory layout of images: convolutions on CPUs are faster with the channels last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_zipit._common.views import Inputs, each_view, view_of


class Layout:
    """Converts batches of images to channels-last memory format if the networks are then faster.

    The first batch decides for all; see :func:`prefer_channels_last`.
    """

    def __init__(self) -> None:
        self._change: bool | None = None

    def __call__(self, x: Inputs, networks: Mapping[str, nn.Module]) -> Inputs:
        """Convert a batch.

        Args:
            x: an input of the networks, or one of each by task.
            networks: by task, of one architecture, where ``x`` is.
        """
        if self._change is None:
            self._change = prefer_channels_last(x, networks)
        return each_view(x, channels_last) if self._change else x


def prefer_channels_last(x: Inputs, networks: Mapping[str, nn.Module]) -> bool:
    """Tell whether networks are faster with channels-last images, and compute the same.

    A network that relies on the layout of its input, such as by ``x.view(-1, 400)``, is given contiguous images.
    The networks run on fixed noise of the shape of ``x``, so that every rank decides alike whatever its batch holds.

    Args:
        x: an input of the networks, or one of each by task.
        networks: by task, of one architecture, where ``x`` is.
    """
    asked = list(networks.items())[: 1 if isinstance(x, Tensor) else None]
    return all(gains(network) and agrees(network, view_of(x, task)) for task, network in asked)


def channels_last(x: Tensor) -> Tensor:
    """Images ``(batch, channels, height, width)`` with the channels of each pixel next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def gains(network: nn.Module) -> bool:
    """Tell whether a network is faster with channels-last images; grouped convolutions were measured to be slower."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    types = {parameter.dtype for layer in layers for parameter in layer.parameters()}
    grouped = any(1 < layer.groups < layer.in_channels for layer in layers)
    return bool(layers) and not grouped and types <= {torch.float32, torch.bfloat16}


def agrees(network: nn.Module, x: Tensor) -> bool:
    """Tell whether a network on a CPU computes the same from channels-last images of the shape of ``x``."""
    if x.ndim != 4 or x.device.type != "cpu" or not x.is_floating_point():
        return False
    noise = torch.randn((1, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(x.dtype)
    expected = network(noise.clone())
    if not isinstance(expected, Tensor):
        return False
    try:
        found = network(channels_last(noise))
    except RuntimeError:  # of torch: `view` cannot take channels-last images
        return False
    return bool((found - expected).abs().max() <= 1e-2 * expected.abs().max())
