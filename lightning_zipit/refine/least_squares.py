"""Least-squares refinement: fit every layer of a merged network to its sources in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit._common.collectives import all_reduce_sums
from lightning_zipit.graph.layers import TOO_MANY_INPUTS, Fitted, Layer, groups_of, layer_of
from lightning_zipit.refine.layer_by_layer import LayerByLayer
from lightning_zipit.refine.normal_equations import CentredEquations, NormalEquations
from lightning_zipit.refine.outputs import Outputs, outputs_shape
from lightning_zipit.refine.part import Part
from lightning_zipit.refine.patches import patches, samples

MOST_INPUTS = 8192
"""Largest number of inputs of a fitted layer. At this size, the normal equations take half a GiB."""


@dataclass(frozen=True)
class LeastSquares(LayerByLayer):
    """Fit every convolution and linear layer to the outputs of the sources, in closed form.

    The inputs of a layer come from the merged network. For a layer of the trunk, the target is the zipped output of the
    sources. At the end of a residual branch, the target is the zipped sum minus the merged shortcut. For a layer of a
    head, the target is the output of its source. Neither labels nor gradients are used.

    Args:
        positions: the number of random positions of each image or sequence that are used for a layer; ``None`` for
            all.
        cache_bytes: memory for the activations of all batches between two layers. If the activations need more, they
            are recomputed for each layer, from the last layer whose activations did fit.
        ridge: strength of the regularisation towards the zipped weights, relative to the mean square of a layer's
            inputs. One divided by the number of images or sequences is added: the zipped weights count as one
            additional sample.
        pre_activations: measure features in front of the activation, where layers are fitted. The paper measures them
            after the activation. Matchers that need covariances, such as matchers with linear maps, always get
            features after the activation.

    Raises:
        ValueError: if ``positions`` is below 1, ``cache_bytes`` is negative, or ``ridge`` is not above 0.
    """

    ridge: float = 3e-3
    pre_activations: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise ValueError(f"`ridge` must be above 0, got {self.ridge}.")

    def obstacle(self, layer: Fitted) -> str:
        return TOO_MANY_INPUTS if layer.weight[0].numel() > MOST_INPUTS else ""

    def adapt(self, part: Part, stop: Layer) -> float:
        layer, norm = layer_of(part.merged, stop)
        outcome = Outputs(stop, part.merged)
        ridge = self.ridge + 1 / part.images  # the merged weights count as one additional image
        return solve_layer(layer, norm, equations_of(part, stop, outcome).centred(), ridge, outcome.scale())


def equations_of(part: Part, stop: Layer, outcome: Outputs) -> NormalEquations:
    """Sum the normal equations of a layer over the batches of all processes.

    The inputs come from the merged network. The targets are the zipped targets of the sources. If the target is a sum,
    the merged network's other summand is subtracted.

    Args:
        part: the trunk or head.
        stop: the layer.
        outcome: converts values of the merged network to outputs of the layer.

    Raises:
        CalibrationError: if a network computes NaN or Inf at the layer.
    """
    layer, _ = layer_of(part.merged, stop)
    groups, zipped = groups_of(layer), part.zip_of(stop.name)
    of_sources = [Outputs(stop, network) for network in part.sources]
    equations = NormalEquations(groups, layer.weight[0].numel(), len(layer.weight) // groups, layer.weight.device)
    watched = equations.count.new_zeros(len(of_sources), 1)
    for batch in part.batches(stop, stop.target):
        like = outputs_shape(layer, batch.merged[0][stop.input])
        wanted = [own(each[stop.target], like) for own, each in zip(of_sources, batch.sources, strict=True)]
        chosen = part.positions(layer, wanted[0], batch.marks)
        rows = [samples(layer, each, chosen) for each in wanted]
        watched += torch.stack([each.sum(dtype=torch.float64)[None] for each in rows])
        zipped_rows = zipped(rows)
        for values in batch.merged:
            target = zipped_rows
            if stop.beside is not None:
                target = target - samples(layer, outcome(values[stop.beside], like), chosen)
            x = patches(layer, values[stop.input], chosen)
            equations.add(x, target.unflatten(1, (groups, -1)).movedim(1, 0))
    all_reduce_sums([*equations.sums, watched])
    part.check(stop, equations.totals, watched)
    return equations


def solve_layer(
    layer: Fitted, norm: _BatchNorm | None, equations: CentredEquations, ridge: float, scale: Tensor | None = None
) -> float:
    """Set the weights of a layer, and the batch norm after it, to the solution of its normal equations.

    The norm gets the statistics of the layer's new outputs, and a scale and shift that cancel them. In eval mode, the
    norm then only adds a bias.

    Args:
        layer: the layer. The solution is regularised towards its current weights.
        norm: the batch norm after the layer.
        equations: the equations of all processes.
        ridge: see :meth:`CentredEquations.solve`.
        scale: the factor of each output between the layer and the target, ``(outputs,)``. An output with factor 0
            keeps its weights.

    Returns:
        The ratio of the target's variance that the layer explains.
    """
    old: Tensor = layer.weight.detach()
    old_weight, old_bias = folded(layer, norm)
    scale = torch.ones_like(old_bias) if scale is None else scale.double()
    prior = (old_weight * scale[:, None]).unflatten(0, (groups_of(layer), -1))
    weight, bias = equations.solve(prior, ridge, intercept=norm is not None or layer.bias is not None)
    explained = equations.explained(weight, bias)
    silent = scale == 0
    new_weight = torch.where(silent[:, None], old_weight, weight.flatten(0, 1) / scale[:, None])
    new_bias = torch.where(silent, old_bias, bias.flatten() / scale)
    layer.weight.copy_(new_weight.reshape(old.shape))
    if norm is not None:
        moments = equations.moments_of(new_weight.unflatten(0, (groups_of(layer), -1)))
        mean, variance = (moment.flatten() for moment in moments)
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(new_bias + mean)
    if layer.bias is not None:
        layer.bias.copy_(new_bias if norm is None else torch.zeros_like(layer.bias))
    return explained


def folded(layer: Fitted, norm: _BatchNorm | None) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the layer before it: weights ``(outputs, inputs)`` and bias of one layer, float64."""
    weight = layer.weight.detach().flatten(1).double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if norm is None:
        return weight, bias
    factor = norm.weight.detach().double() / (norm.get_buffer("running_var").double() + norm.eps).sqrt()
    return weight * factor[:, None], (bias - norm.get_buffer("running_mean").double()) * factor + norm.bias.detach()
