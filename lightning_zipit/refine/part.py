"""The trunk or a head on its way through its layers, with the values that reach each of them."""

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
        merged: of the merged network, just before the layer; once for each task with an input of its own.
        sources: of each source network, just after the target of the layer.
        marks: a number for each sample that decides which positions are looked at.
    """

    merged: list[Values]
    sources: list[Values]
    marks: Tensor


class Part:
    """The trunk or a head, with its sources, on the way from layer to layer.

    Args:
        name: its name: ``trunk`` or ``heads.TASK``.
        frontier: the merged network as often as it runs, then the sources.
        zip_of: from the name of a layer to what zips the sources' outputs of that layer.
        marks: per batch, a number for each sample; see :func:`~lightning_zipit._calibration.positions.marks`.
        sources: how errors call each source.
        positions: how many positions of a sample are looked at; ``None`` for all.
        images: the number of samples of all processes.
        paths: how often the merged network runs.
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
        self._position = {node: number for number, node in enumerate(frontier.runs[0].nodes)}
        self._sources_at = 0

    @property
    def merged(self) -> nn.Module:
        """The merged trunk or head."""
        return self._frontier.runs[0].network

    @property
    def sources(self) -> list[nn.Module]:
        """The source networks."""
        return [run.network for run in self._frontier.runs[self._paths :]]

    def batches(self, stop: Layer | Norm, target: fx.Node | None = None) -> Iterator[AtLayer]:
        """Take all batches to a layer.

        Args:
            stop: the layer, behind that of the last call.
            target: the node that the sources are run to, itself included; by default they stay where they are.
        """
        if target is not None:
            self._sources_at = max(self._sources_at, self._position[target] + 1)
        ends = [self._position[stop.node]] * self._paths + [self._sources_at] * len(self.sources)
        for marks, values in zip(self._marks, self._frontier.visit(ends), strict=True):
            yield AtLayer(values[: self._paths], values[self._paths :], marks + self._position[stop.node])

    def positions(self, layer: Fitted, value: Tensor, marks: Tensor) -> Tensor | None:
        """The positions of each sample to look at; ``None`` for all.

        They depend on the sample and the layer alone, so that they are the same on every process.

        Args:
            layer: the layer.
            value: outputs of the layer.
            marks: see :class:`AtLayer`.
        """
        count = value[0].numel() // (value.shape[-1] if isinstance(layer, nn.Linear) else value.shape[1])
        if self._count is None or count <= self._count:
            return None
        each, rest = divmod(len(value), len(marks))  # windows are samples
        own = marks.repeat_interleave(each) if not rest else marks.new_zeros(len(value))
        return choose_positions(own, count, self._count)

    def check(self, stop: Layer | Norm, merged: Tensor, sources: Iterable[Tensor] = ()) -> None:
        """Look for NaN and Inf in sums over what the merged network and the sources compute at a layer.

        Raises:
            CalibrationError: naming the layer and the networks.
        """
        sums = {MERGED: merged, **dict(zip(self._sources, sources, strict=False))}
        check_values(f"{self.name}.{stop.name}", sums)

    def renew(self, stop: Norm) -> None:
        """Give a batch norm the statistics of what reaches it."""
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
