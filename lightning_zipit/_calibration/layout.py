"""Memory layout of images: convolutions on CPUs are faster in channels-last format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_zipit._common.calls import Call
from lightning_zipit._common.views import Inputs, each_view, view_of


class Layout:
    """Convert batches of images to channels-last memory format if this makes the networks faster.

    The decision is made on the first batch; see :func:`prefer_channels_last`.
    """

    def __init__(self) -> None:
        self._change: bool | None = None

    def __call__(self, x: Inputs, networks: Mapping[str, nn.Module]) -> Inputs:
        """Convert a batch.

        Args:
            x: one input for all networks, or one input per task.
            networks: the networks by task, of one architecture, on the device of ``x``.
        """
        if self._change is None:
            self._change = prefer_channels_last(x, networks)
        return each_view(x, lambda one: one.each(channels_last)) if self._change else x


def prefer_channels_last(x: Inputs, networks: Mapping[str, nn.Module]) -> bool:
    """Whether channels-last images make the networks faster and leave their outputs unchanged.

    A network that depends on the memory layout of its input, for example by ``x.view(-1, 400)``, gets contiguous
    images. The networks run on fixed noise of the shape of ``x``, so that every rank reaches the same decision.

    Args:
        x: one input for all networks, or one input per task.
        networks: the networks by task, of one architecture, on the device of ``x``.
    """
    asked = list(networks.items())[: 1 if isinstance(x, Call) else None]
    return all(gains(network) and agrees(network, view_of(x, task)) for task, network in asked)


def channels_last(x: Tensor) -> Tensor:
    """Convert images ``(batch, channels, height, width)`` to channels-last memory format."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def gains(network: nn.Module) -> bool:
    """Whether channels-last images make a network faster. Grouped convolutions were measured to be slower."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    types = {parameter.dtype for layer in layers for parameter in layer.parameters()}
    grouped = any(1 < layer.groups < layer.in_channels for layer in layers)
    return bool(layers) and not grouped and types <= {torch.float32, torch.bfloat16}


def agrees(network: nn.Module, call: Call) -> bool:
    """Whether a network on a CPU computes the same from channels-last images of the shape of an input."""
    x = call.tensors[0]
    if call.structure != Call.of(x).structure or x.ndim != 4 or x.device.type != "cpu" or not x.is_floating_point():
        return False
    noise = torch.randn((1, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(x.dtype)
    expected = network(noise.clone())
    if not isinstance(expected, Tensor):
        return False
    try:
        found = network(channels_last(noise))
    except RuntimeError:  # torch's `view` does not support channels-last images
        return False
    return bool((found - expected).abs().max() <= 1e-2 * expected.abs().max())
