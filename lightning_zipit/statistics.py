"""Means and covariances of features, gathered batch by batch, device by device or site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_zipit.collectives import all_reduce_sums

STATES = ("count", "origin", "offset", "comoment")

ROWS_AT_ONCE = 65_536
"""Samples that are centred and multiplied at a time: bounds the memory of one update."""


class Moments(NamedTuple):
    """What :class:`FeatureStatistics` computes.

    Attributes:
        count: number of samples.
        mean: float64 ``(n,)``.
        covariance: float64 ``(n, n)``, symmetric, with Bessel's correction (divided by ``count - 1``).
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    covariance: Tensor


class FeatureStatistics(Metric):
    """Mean and covariance of the features of N models, side by side.

    Every update centres its samples by their own mean, takes their Gram matrix in ``gram_dtype`` and adds it to a
    float64 co-moment with the exact correction for the two means (Chan, Golub and LeVeque 1983), so that neither a
    large mean nor the split into batches costs precision. Across processes the co-moments are brought to the common
    mean and summed, by three all-reduces.

    Args:
        sizes: how many features each model has.
        gram_dtype: the type in which Gram matrices of one batch are taken, ``torch.float32`` or ``torch.float64``.
            Features of a wider type keep theirs. Also accepted under the name ``dtype``.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``sizes`` is empty or holds a number below 1, or ``gram_dtype`` is neither of the two.

    Example:
        >>> statistics = FeatureStatistics([1, 1])
        >>> statistics.update([torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])])
        >>> statistics.compute().covariance
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """

    full_state_update = True  # `forward` may not add up states as if they were sums
    higher_is_better = None
    is_differentiable = False
    count: Tensor
    origin: Tensor  # near the first samples' mean: what is added to it stays small, so that no digit of it is lost
    offset: Tensor  # of the mean from the origin
    comoment: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        gram_dtype: torch.dtype = torch.float32,
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        gram_dtype = dtype or gram_dtype
        if not sizes or any(size < 1 for size in sizes):
            raise ValueError(f"`sizes` must list at least one positive number of features, got {list(sizes)}.")
        if gram_dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {gram_dtype}.")
        self.sizes = tuple(sizes)
        self.gram_dtype = gram_dtype
        total = sum(sizes)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("origin", torch.zeros(total, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("offset", torch.zeros(total, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state(
            "comoment", torch.zeros(total, total, dtype=torch.float64), dist_reduce_fx="sum", persistent=True
        )
        self._shrink_default()

    def _shrink_default(self) -> None:
        """What `reset` copies is a matrix of zeros as large as the statistics: a single zero will do."""
        self._defaults["comoment"] = torch.zeros_like(self.count).expand_as(self.comoment)

    def update(self, features: Sequence[Tensor]) -> None:
        """Add samples.

        Args:
            features: of each model ``(samples, C_i)``, the same samples in the same order.

        Raises:
            ValueError: if the shapes are not those of ``sizes``, or the numbers of samples differ.
        """
        shapes = [tuple(feature.shape) for feature in features]
        samples = shapes[0][0] if shapes and shapes[0] else 0
        if shapes != [(samples, size) for size in self.sizes]:
            raise ValueError(
                f"`features` must be {len(self.sizes)} tensors of shapes (samples, C) with C in {list(self.sizes)} "
                f"and equal samples, got shapes {shapes}."
            )
        with torch.no_grad(), full_precision(features[0].device.type):
            for rows in zip(*(feature.split(ROWS_AT_ONCE) for feature in features), strict=True):
                if len(rows[0]):
                    self._add(*batch_moments(torch.cat(rows, dim=1), self.gram_dtype))

    def _add(self, count: Tensor, origin: Tensor, offset: Tensor, comoment: Tensor) -> None:
        if self.comoment.is_inference() and not torch.is_inference_mode_enabled():
            for name in STATES:  # made in inference mode, where every tensor is sealed on leaving it
                setattr(self, name, getattr(self, name).clone())
        # In place: states that were made outside inference mode stay usable there and after.
        self.origin.copy_(torch.where(self.count == 0, origin, self.origin))
        offset = offset + (origin - self.origin)
        total = self.count + count
        apart = (offset - self.offset) * (self.count * count / total).sqrt()
        self.comoment.add_(comoment).addmm_(apart[:, None], apart[None, :])
        self.offset.lerp_(offset, count / total)
        self.count.copy_(total)

    def compute(self) -> Moments:
        """Moments of all samples of all processes.

        Raises:
            ValueError: if no sample was added.
        """
        return self.moments()

    def moments(self) -> Moments:
        """Moments of the samples that this process holds; see :meth:`compute`."""
        count = int(self.count.item())
        if not count:
            raise ValueError("No sample was added to these statistics: call `update` first.")
        covariance = (self.comoment + self.comoment.T).div_(2 * max(count - 1, 1))
        return Moments(count, self.origin + self.offset, covariance)

    def free(self) -> None:
        """Give the memory back, and with it what was gathered.

        A metric holds methods that are bound to it: once forgotten, it waits for the garbage collector, and its matrix
        with it.
        """
        for name in STATES:
            setattr(self, name, getattr(self, name).new_empty(0))

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:  # type: ignore[override]
        """Statistics of the samples of both, for example of two sites."""
        if not isinstance(other, FeatureStatistics) or other.sizes != self.sizes:
            raise ValueError("Only statistics of the same sizes can be added to each other.")
        joint = FeatureStatistics(self.sizes, self.gram_dtype).to(self.comoment.device)
        joint.merge_state(self)
        joint.merge_state(other)
        return joint

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another instance, or of its states, to this one, in place."""
        if isinstance(incoming_state, Metric):
            if not isinstance(incoming_state, FeatureStatistics) or incoming_state.sizes != self.sizes:
                raise ValueError("Only statistics of the same sizes can be added to each other.")
            incoming_state = incoming_state.metric_state
        count, *rest = (torch.as_tensor(incoming_state[name]) for name in STATES)
        if [state.shape for state in rest] != [self.origin.shape, self.offset.shape, self.comoment.shape]:
            raise ValueError("Only statistics of the same sizes can be added to each other.")
        self._computed = None
        if count > 0:
            self._update_count += 1
            self._add(count, *rest)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """True all-reduces instead of the default gathering of all states on all ranks."""
        sum_over_processes([self], process_group or self.process_group)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._computed = None
        self._update_count = int(self.count > 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FeatureStatistics:
        def move(tensor: Tensor) -> Tensor:  # to another device, never to another type
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, *args, **kwargs)
        self._shrink_default()
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> FeatureStatistics:
        """Keep the states in float64, whatever type the surrounding module is cast to."""
        return self


def sum_over_processes(statistics: Sequence[FeatureStatistics], group: Any = None) -> None:
    """Put the samples of all processes into the statistics of each; the results are identical on all.

    The co-moments are brought to the common mean and summed: three all-reduces, or one more for every 64 MiB.

    Args:
        statistics: the same on every process, in the same order, on one device.
        group: the process group; by default all processes.
    """
    has_data = [(each.count > 0).double() for each in statistics]
    origins = [
        torch.cat([has[None], each.count[None], each.origin * has])
        for has, each in zip(has_data, statistics, strict=True)
    ]
    all_reduce_sums(origins, group)
    counts = [packed[1] for packed in origins]
    origins = [packed[2:] / packed[0].clamp(min=1) for packed in origins]
    own_offsets = [
        (each.offset + (each.origin - origin)) * has
        for each, origin, has in zip(statistics, origins, has_data, strict=True)
    ]
    offsets = [offset * each.count for offset, each in zip(own_offsets, statistics, strict=True)]
    all_reduce_sums(offsets, group)
    offsets = [offset / count.clamp(min=1) for offset, count in zip(offsets, counts, strict=True)]
    for each, own_offset, offset in zip(statistics, own_offsets, offsets, strict=True):
        apart = (own_offset - offset) * each.count.sqrt()
        each.comoment = torch.addr(each.comoment, apart, apart)
    all_reduce_sums([each.comoment for each in statistics], group)
    for each, count, origin, offset in zip(statistics, counts, origins, offsets, strict=True):
        each.count, each.origin, each.offset = count.clone(), origin, offset


def batch_moments(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean (as origin and offset) and co-moment of one batch.

    The batch is shifted by its first sample, which is exact where values lie close together and leaves zeros of a
    constant, and then by its mean; what rounding that mean leaves is corrected in float64.

    Args:
        features: ``(samples, n)``, at least one sample.
        dtype: the type of the Gram matrix, unless that of ``features`` is wider.

    Returns:
        All float64: the count, an origin ``(n,)`` near the mean, the offset of the mean from it ``(n,)``, and the
        co-moment Σ (x - mean)(x - mean)ᵀ ``(n, n)``.
    """
    # Fewer samples than features: copies of a feature are told apart from near copies by the last digits, and the
    # product is cheap.
    dtype = torch.float64 if len(features) <= features.shape[1] else dtype
    features = features.to(torch.promote_types(features.dtype, dtype))
    count = torch.tensor(len(features), dtype=torch.float64, device=features.device)
    origin = features[0]
    centred = features - origin
    shift = centred.mean(0, dtype=torch.float64).to(features.dtype)
    centred -= shift
    rest = centred.mean(0, dtype=torch.float64)  # (n,)
    gram = centred.T @ centred  # (n, n)
    if gram.dtype != torch.float64:  # else what rounding the mean has left is below the digits of the Gram matrix
        apart = rest * count.sqrt()
        gram = gram.double().addmm_(apart[:, None], apart[None, :], alpha=-1)
    return count, origin.double(), shift.double() + rest, gram


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast and no TF32, whatever the Trainer's precision is: a correlation needs the digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
