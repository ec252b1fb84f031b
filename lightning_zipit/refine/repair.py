"""REPAIR: gives the outputs of layers the means and deviations of the sources (arXiv 2211.08403)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._common.collectives import all_reduce_sums
from lightning_zipit.graph.layers import Fitted, Layer, layer_of
from lightning_zipit.refine.layer_by_layer import LayerByLayer
from lightning_zipit.refine.moments import FeatureMoments
from lightning_zipit.refine.part import Part
from lightning_zipit.refine.patches import samples


@dataclass(frozen=True)
class Repair(LayerByLayer):
    """Gives every output of a layer the average mean and deviation of the sources' outputs.

    This is REPAIR (arXiv 2211.08403), applied to the heads too. It changes the running statistics and affine parameters
    of the batch norm behind a layer, or the weights of a layer without one.
    """

    def adapt(self, part: Part, stop: Layer) -> None:
        layer, norm = layer_of(part.merged, stop)
        now, wanted = moments_at(part, stop)
        mean, std = zipped_moments(part, stop, wanted)
        rescale_layer(layer, norm, now, mean, std)


def moments_at(part: Part, stop: Layer) -> tuple[FeatureMoments, list[FeatureMoments]]:
    """Moments of the outputs of a layer over the batches of all processes.

    Args:
        part: the trunk or head.
        stop: the layer.

    Returns:
        Those of the merged network in front of its norm; and those of each source behind its norm, or of its share of
        the merged features if these are combinations of all of its own.

    Raises:
        CalibrationError: if a network computes NaN or Inf there.
    """
    layer, _ = layer_of(part.merged, stop)
    size, device, zipped, at = len(layer.weight), layer.weight.device, part.zip_of(stop.name), stop.norm or stop.node
    now = FeatureMoments(size, device)
    widths = [size if zipped.mixes else len(layer_of(network, stop)[0].weight) for network in part.sources]
    wanted = [FeatureMoments(width, device) for width in widths]
    for batch in part.batches(stop, at):
        chosen = part.positions(layer, batch.sources[0][at], batch.marks)
        for values in batch.merged:
            now.add(samples(layer, layer(values[stop.input]), chosen))
        for source, (moments, values) in enumerate(zip(wanted, batch.sources, strict=True)):
            rows = samples(layer, values[at], chosen)
            moments.add(zipped.part(source, rows) if zipped.mixes else rows)
    all_reduce_sums([moments.sums for moments in (now, *wanted)])
    part.check(stop, now.sums, [moments.sums for moments in wanted])
    return now, wanted


def zipped_moments(part: Part, stop: Layer, moments: Sequence[FeatureMoments]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each merged feature: the zipped means and deviations of the sources, ``(outputs,)``."""
    zipped = part.zip_of(stop.name)
    means, deviations = [each.mean[None] for each in moments], [each.variance.sqrt()[None] for each in moments]
    if zipped.mixes:  # each source's share is in its moments
        return torch.stack(means).sum(0)[0], torch.stack(deviations).sum(0)[0]
    return zipped(means)[0], zipped(deviations)[0]


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
