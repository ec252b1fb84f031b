"""REPAIR: restore means and standard deviations of the outputs of layers (arXiv 2211.08403)."""

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
    """Set mean and standard deviation of every output of a layer to the average over the sources' outputs.

    This is REPAIR (arXiv 2211.08403), also applied to the heads. If a batch norm follows a layer, its running
    statistics and affine parameters are changed. Otherwise the weights of the layer are changed.
    """

    def adapt(self, part: Part, stop: Layer) -> None:
        layer, norm = layer_of(part.merged, stop)
        now, wanted = moments_at(part, stop)
        mean, std = zipped_moments(part, stop, wanted)
        rescale_layer(layer, norm, now, mean, std)


def moments_at(part: Part, stop: Layer) -> tuple[FeatureMoments, list[FeatureMoments]]:
    """Compute the moments of the outputs of a layer over the batches of all processes.

    Args:
        part: the trunk or head.
        stop: the layer.

    Returns:
        The moments of the merged network before the norm, and the moments of each source after the norm. If merged
        features are linear combinations, the latter are the moments of the source's contribution to them.

    Raises:
        CalibrationError: if a network computes NaN or Inf at the layer.
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
    """Zip the means and standard deviations of the sources: those of each merged feature, ``(outputs,)`` each."""
    zipped = part.zip_of(stop.name)
    means, deviations = [each.mean[None] for each in moments], [each.variance.sqrt()[None] for each in moments]
    if zipped.mixes:  # the moments already contain the weight of each source
        return torch.stack(means).sum(0)[0], torch.stack(deviations).sum(0)[0]
    return zipped(means)[0], zipped(deviations)[0]


def rescale_layer(layer: Fitted, norm: _BatchNorm | None, now: FeatureMoments, mean: Tensor, std: Tensor) -> None:
    """Set means and standard deviations of the outputs of a layer, after its norm if it has one.

    Args:
        layer: the layer.
        norm: the batch norm after the layer.
        now: the moments of the outputs of the layer, before the norm.
        mean: the target means, ``(outputs,)``.
        std: the target standard deviations, ``(outputs,)``.
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
