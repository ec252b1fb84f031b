"""The trunk or a head during a layer-by-layer refinement, with the inputs of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, fx, nn

from lightning_zipit._calibration.positions import choose_positions
from lightning_zipit._common.collectives import all_reduce_sums
from lightning_zipit.graph.layers import Fitted, Layer, Norm
from lightning_zipit.graph.run import Values
from lightning_zipit.refine.finite import MERGED, check_values
from lightning_zipit.refine.frontier import Frontier
from lightning_zipit.refine.moments import FeatureMoments
from lightning_zipit.refine.zip import Zip


class AtLayer(NamedTuple):
    """Values of one batch at one layer.

    Attributes:
        merged: the values of the merged network just before the layer; one entry for each separate input.
        sources: the values of each source network just after the target of the layer.
        marks: a number for each sample that determines the chosen positions.
    """

    merged: list[Values]
    sources: list[Values]
    marks: Tensor


class Part:
    """The trunk or a head with its sources, during a layer-by-layer refinement.

    Args:
        name: ``trunk`` or ``heads.TASK``.
        frontier: the merged network, ``paths`` times, followed by the sources.
        zip_of: returns, for the name of a layer, the :class:`Zip` of the sources' outputs.
        marks: per batch, a number for each sample; see :func:`~lightning_zipit._calibration.positions.marks`.
        sources: the description of each source in error messages.
        positions: the number of positions of a sample that are used; ``None`` for all.
        images: the number of samples of all processes.
        paths: the number of runs of the merged network for each batch.
    """

    def __init__(
        self,
        name: str,
        frontier: Frontier,
        zip_of: Callable[[str], Zip],
        marks: Sequence[Tensor],
        sources: Sequence[str],
        positions: int | None,
        images: int,
        paths: int = 1,
    ) -> None:
        self.name, self.zip_of, self.images = name, zip_of, images
        self._frontier, self._marks, self._sources = frontier, marks, list(sources)
        self._count, self._paths = positions, paths
        self._node_index = {node: index for index, node in enumerate(frontier.runs[0].nodes)}
        self._sources_end = 0  # index of the node before which the sources stop

    @property
    def merged(self) -> nn.Module:
        """The merged trunk or head."""
        return self._frontier.runs[0].network

    @property
    def sources(self) -> list[nn.Module]:
        """The source networks."""
        return [run.network for run in self._frontier.runs[self._paths :]]

    def batches(self, stop: Layer | Norm, target: fx.Node | None = None) -> Iterator[AtLayer]:
        """Run all batches up to a layer.

        Args:
            stop: the layer. It must come after the layer of the last call.
            target: the last node that the sources run; by default the sources do not advance.
        """
        if target is not None:
            self._sources_end = max(self._sources_end, self._node_index[target] + 1)
        ends = [self._node_index[stop.node]] * self._paths + [self._sources_end] * len(self.sources)
        for marks, values in zip(self._marks, self._frontier.visit(ends), strict=True):
            yield AtLayer(values[: self._paths], values[self._paths :], marks + self._node_index[stop.node])

    def positions(self, layer: Fitted, value: Tensor, marks: Tensor) -> Tensor | None:
        """Choose the positions of each sample for a layer; ``None`` for all.

        The choice depends only on the sample and the layer, so it is the same on every process.

        Args:
            layer: the layer.
            value: outputs of the layer.
            marks: see :class:`AtLayer`.
        """
        count = value[0].numel() // (value.shape[-1] if isinstance(layer, nn.Linear) else value.shape[1])
        if self._count is None or count <= self._count:
            return None
        each, rest = divmod(len(value), len(marks))  # each window counts as a sample
        own = marks.repeat_interleave(each) if not rest else marks.new_zeros(len(value))
        return choose_positions(own, count, self._count)

    def check(self, stop: Layer | Norm, merged: Tensor, sources: Iterable[Tensor] = ()) -> None:
        """Check sums over values of the merged network and the sources at a layer for NaN and Inf.

        Raises:
            CalibrationError: if a sum is not finite. It names the layer and the networks.
        """
        sums = {MERGED: merged, **dict(zip(self._sources, sources, strict=False))}
        check_values(f"{self.name}.{stop.name}", sums)

    def renew(self, stop: Norm) -> None:
        """Set the running statistics of a batch norm to the statistics of its input."""
        norm = self.merged.get_submodule(stop.name)
        mean = norm.get_buffer("running_mean")
        now = FeatureMoments(len(mean), mean.device)
        for batch in self.batches(stop):
            for values in batch.merged:
                now.add(values[stop.input].movedim(1, -1).flatten(0, -2))
        all_reduce_sums([now.sums])
        self.check(stop, now.sums)
        mean.copy_(now.mean)
        norm.get_buffer("running_var").copy_(now.variance)
