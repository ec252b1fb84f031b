"""Conversion of values after a layer to the shape of the layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_zipit.graph.layers import Fitted, Layer, layer_of, outputs_axis
from lightning_zipit.refine.patches import samples


class Outputs:
    """Convert the values at the end of a layer's branch to the layout of the layer's outputs.

    Args:
        stop: the layer.
        network: the network.
    """

    def __init__(self, stop: Layer, network: nn.Module) -> None:
        self.branch, self.network = stop.branch, network
        self.layer, _ = layer_of(network, stop)
        self._known: dict[tuple[int, ...], tuple[Tensor, torch.Size]] = {}

    def __call__(self, value: Tensor, like: Sequence[int]) -> Tensor:
        """Convert a value at the end of the branch, or a value that broadcasts with it, to the shape of the outputs.

        Args:
            value: the value.
            like: the shape of the outputs of this layer, possibly in a network of another width.
        """
        shape = self._own(like)
        if not self.branch.moves:
            return value.expand(shape)
        if shape not in self._known:
            self._known[shape] = self.branch.places(self.network, shape, value.device)
        places, moved = self._known[shape]
        return value.expand(moved).flatten()[places]

    def scale(self) -> Tensor | None:
        """Return the factor of the branch for each output, ``(outputs,)``, or ``None`` if it has no products."""
        if not self.branch.products:
            return None
        return samples(self.layer, self.branch.scales(self.network, self._own(self.branch.shape)))[0]

    def _own(self, like: Sequence[int]) -> tuple[int, ...]:
        shape = list(like)
        shape[outputs_axis(self.layer)] = len(self.layer.weight)
        return tuple(shape)


def outputs_shape(layer: Fitted, x: Tensor) -> tuple[int, ...]:
    """Compute the shape of a layer's output."""
    return (len(x), *layer(x[:1]).shape[1:])
