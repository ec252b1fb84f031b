"""Gives a layer's outputs the means and deviations that they should have (REPAIR, arXiv 2211.08403)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit.graph.layers import Fitted
from lightning_zipit.refine.moments import FeatureMoments


def rescale_layer(layer: Fitted, norm: _BatchNorm | None, now: FeatureMoments, mean: Tensor, std: Tensor) -> None:
    """Let the outputs of a layer, behind its norm if it has one, have other means and deviations.

    Args:
        layer: the layer.
        norm: the batch norm behind it.
        now: the moments of what the layer gives, before the norm.
        mean: the means to have, ``(outputs,)``.
        std: the deviations to have, ``(outputs,)``.
    """
    dead = now.variance <= torch.finfo(torch.float32).tiny
    ratio = torch.where(dead, torch.ones_like(std), std / now.variance.where(~dead, torch.ones_like(std)).sqrt())
    if norm is not None:
        norm.get_buffer("running_mean").copy_(now.mean)
        norm.get_buffer("running_var").copy_(now.variance)
        norm.weight.copy_(ratio * (now.variance + norm.eps).sqrt())
        norm.bias.copy_(mean)
        return
    layer.weight.mul_(ratio.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_(mean + (layer.bias - now.mean) * ratio)
