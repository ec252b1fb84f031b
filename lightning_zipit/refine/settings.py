"""What can follow merging."""

from __future__ import annotations

from dataclasses import dataclass


class Refinement:
    """What follows merging, on the same unlabelled data."""


@dataclass(frozen=True)
class BatchNorm(Refinement):
    """Re-estimates the running statistics of batch norm: the trunk's on all data, a head's on its own task's.

    Args:
        per_task: give the trunk a batch norm for each task, with statistics of that task's data alone. The trunk then
            runs once for each task that is asked for.
    """

    per_task: bool = False


@dataclass(frozen=True)
class LayerByLayer(Refinement):
    """A refinement that goes through the layers of trunk and heads in order.

    Args:
        positions: how many positions of an image or sequence are looked at in each layer, at random; ``None`` for all.
        cache_bytes: memory for activations between layers; where those of all calibration data take more, they are
            computed anew for each layer, from the last one where they fitted.

    Raises:
        ValueError: if a number is out of range.
    """

    positions: int | None = 64
    cache_bytes: float = 4 * 2**30

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"`positions` must be at least 1, or None for all, got {self.positions}.")
        if self.cache_bytes < 0:
            raise ValueError(f"`cache_bytes` must not be negative, got {self.cache_bytes}.")


@dataclass(frozen=True)
class Repair(LayerByLayer):
    """Gives every output of a layer the mean and deviation that the sources' have on average.

    This is REPAIR (arXiv 2211.08403), with every task's head included.
    With batch norm behind a layer, its running statistics and affine parameters take them up, else the weights.
    """


@dataclass(frozen=True)
class LeastSquares(LayerByLayer):
    """Fits every convolution and linear layer to what the sources compute there, in closed form.

    A layer of the trunk is fitted to the zipped outputs of the sources, from what the merged network feeds it; one that
    ends a residual branch, to the zipped sum less what the merged shortcut gives; one of a head to its own source's
    outputs. Neither labels nor gradients are used.

    Args:
        positions: how many positions of an image or sequence are looked at in each layer, at random; ``None`` for all.
        cache_bytes: memory for activations between layers; where those of all calibration data take more, they are
            computed anew for each layer, from the last one where they fitted.
        ridge: how strongly weights are held to those that zipping gives, as a share of the mean square of a layer's
            inputs. One divided by the number of images or sequences is added: they count as one more.
        pre_activations: match features by what they are in front of their activation function, as that is what layers
            are fitted to, and not behind it, as the paper does. Statistics are then those of other tensors. Matchers
            that ask for covariances, as those of linear maps do, are always given those behind it.

    Raises:
        ValueError: if a number is out of range.
    """

    ridge: float = 3e-3
    pre_activations: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise ValueError(f"`ridge` must be above 0, got {self.ridge}.")


NAMED: dict[str, Refinement] = {"batch_norm": BatchNorm(), "repair": Repair(), "least_squares": LeastSquares()}
