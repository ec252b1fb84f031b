"""Zipping of source values: map source features to merged features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_zipit._matching.maps import Maps, along_axis, mixes
from lightning_zipit.graph import AxisRef


@dataclass(frozen=True)
class Zip:
    """The merge matrices M_i of the outputs of a layer.

    Attributes:
        shares: the contribution of each source to entries without a feature space, ``(N,)``.
        ref: the feature spaces of the outputs; ``None`` in a head, which has one source.
        maps: the merge and unmerge matrices of each space.
    """

    shares: Tensor
    ref: AxisRef | None = None
    maps: Maps = field(default_factory=dict)

    @property
    def mixes(self) -> bool:
        """Whether merged features are linear combinations of source features."""
        return self.ref is not None and mixes(self.ref, self.maps)

    def part(self, source: int, value: Tensor) -> Tensor:
        """Compute M_i z_i ``(samples, W)`` from the values of one source ``(samples, C)``."""
        share = float(self.shares[source])
        if self.ref is None:
            return value * share
        return along_axis(value, 1, self.ref, self.maps, source, elsewhere=share)

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """Compute M·[z_1 … z_N], ``(samples, W)``, from the values of all sources."""
        return sum((self.part(source, value) for source, value in enumerate(values[1:], 1)), self.part(0, values[0]))
