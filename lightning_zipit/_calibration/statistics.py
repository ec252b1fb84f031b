"""Means and covariances of features, accumulated over batches, devices and sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_zipit._common.collectives import all_reduce_sums

STATES = ("count", "origin", "total", "comoment")

LEAF = 128
"""Number of rows up to which a Gram matrix is computed as one product instead of by halves."""

AT_ONCE = 2**22
"""Number of sample entries that are shifted and multiplied at once. It bounds the memory of one update."""


class Moments(NamedTuple):
    """Sample count, mean and covariance of features: the result of :class:`FeatureStatistics`.

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

    Samples are shifted by an origin near their mean. The Gram matrix of a batch is computed in ``gram_dtype`` and
    summed in float64. The final result corrects for the offset of the mean from the origin. So neither a large mean
    nor the split into batches costs precision. Statistics with different origins are shifted to one origin before they
    are added.

    Args:
        sizes: the number of features of each model.
        gram_dtype: the dtype of the Gram matrix of one batch, ``torch.float32`` or ``torch.float64``. Features of a
            wider dtype keep their dtype.
        dtype: another name for ``gram_dtype``.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``sizes`` is empty or holds a number below 1, or if ``gram_dtype`` is another dtype.

    Example:
        >>> statistics = FeatureStatistics([1, 1])
        >>> statistics.update([torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])])
        >>> statistics.compute().covariance
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """

    full_state_update = True  # states are not plain sums, so `forward` must not add them up
    higher_is_better = None
    is_differentiable = False
    count: Tensor
    origin: Tensor  # near the mean, to keep precision; for a constant feature, exactly its value
    total: Tensor  # sum of the samples' offsets from the origin
    comoment: Tensor  # co-moments of these offsets, on and above the diagonal; entries below it are undefined

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
        size = sum(sizes)
        for name, shape in zip(STATES, [(), (size,), (size,), ()], strict=True):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self._samples = 0  # number of samples since the origin was set
        self.float64_limit = size  # up to this number of samples, Gram matrices are computed in float64
        self._shrink_default()
        self.comoment = torch.zeros(size, size, dtype=torch.float64)  # set here because `add_state` would copy it

    def _shrink_default(self) -> None:
        """Store the default of the co-moments as a single expanded zero, which saves the memory of a full matrix."""
        size = sum(self.sizes)
        self._defaults["comoment"] = torch.zeros_like(self.count).expand(size, size)

    def update(self, features: Sequence[Tensor], features_first: bool = False) -> None:
        """Add samples.

        Args:
            features: the features of each model, ``(samples, C_i)``. All models have the same samples in the same
                order.
            features_first: whether the features have shape ``(C_i, samples, …)`` instead. Every position is then a
                sample.

        Raises:
            ValueError: if the shapes do not match ``sizes``, or the numbers of samples differ.
        """
        shapes = [tuple(feature.shape) for feature in features]
        given = [feature if features_first or feature.ndim != 2 else feature.T for feature in features]
        positions = tuple(given[0].shape[1:]) if given else ()
        if not positions or [tuple(feature.shape) for feature in given] != [(size, *positions) for size in self.sizes]:
            expected = "(C, samples, …)" if features_first else "(samples, C)"
            raise ValueError(
                f"`features` must be {len(self.sizes)} tensors of shapes {expected} with C in {list(self.sizes)} "
                f"and the same number of samples, got shapes {shapes}."
            )
        total = sum(self.sizes)
        at_once = max(AT_ONCE // total, 2 * total) // max(1, math.prod(positions[1:]))
        with torch.no_grad(), full_precision(given[0].device.type):
            for parts in zip(*(feature.split(max(1, at_once), dim=1) for feature in given), strict=True):
                if parts[0].numel():
                    self._add_samples(parts)

    def consume(self, rows: Tensor) -> None:
        """Add samples, and overwrite their memory with intermediate results.

        Args:
            rows: the features of all models, ``(n, samples)``. Their values are undefined afterwards.
        """
        with torch.no_grad(), full_precision(rows.device.type):
            self._add_samples(rows.split(self.sizes), rows)

    def _add_samples(self, features: Sequence[Tensor], room: Tensor | None = None) -> None:
        """Add samples of each model, ``(C_i, samples, …)``: shift and copy them in one pass, then compute one product.

        Args:
            features: the samples of each model.
            room: memory for the shifted samples, ``(n, samples)``. It is used if it has the right dtype.
        """
        samples, size = features[0][0].numel(), sum(self.sizes)
        self._make_writable()
        if not self._samples:
            self._set_origin(features)
        self._samples += samples
        # With few samples only the last digits distinguish a copy of a feature from a near copy, and float64 is cheap.
        dtype = torch.float64 if self._samples <= self.float64_limit else self.gram_dtype
        dtype = torch.promote_types(features[0].dtype, dtype)
        rows = empty_like_features(size, features[0], dtype) if room is None or room.dtype != dtype else room
        origins = self.origin.to(dtype).split(self.sizes)
        for part, feature, origin in zip(rows.split(self.sizes), features, origins, strict=True):
            torch.sub(feature, origin.view(-1, *[1] * (feature.ndim - 1)), out=part)
        rows = rows.flatten(1)
        self.count += samples
        self.total += rows.mean(1).double() * samples
        add_gram(self.comoment, rows)

    def _make_writable(self) -> None:
        """Clone states that were created in inference mode, because they cannot be changed in place outside of it."""
        if self.comoment.is_inference() and not torch.is_inference_mode_enabled():
            for name in STATES:
                setattr(self, name, getattr(self, name).clone())

    def _set_origin(self, features: Sequence[Tensor]) -> None:
        """Move the origin near the mean of all samples, or of the first batch.

        The origin is exact in single precision, so subtracting it does not round.
        """
        if self.count > 0:
            origin = self.origin.to(torch.promote_types(features[0].dtype, torch.float32))
        else:
            origin = torch.cat([mean_by_first(feature) for feature in features])
        self._move_origin(origin.double())

    def _move_origin(self, origin: Tensor) -> None:
        """Shift the origin, for old offsets x: Σ (x + d)(x + d)ᵀ = Σ x xᵀ + d (Σ x)ᵀ + (Σ x + n d) dᵀ."""
        if self.count > 0:
            moved = self.origin - origin
            self.comoment.addr_(moved, self.total)
            self.total += self.count * moved
            self.comoment.addr_(self.total, moved)
        self.origin.copy_(origin)
        self._samples = 0

    def compute(self) -> Moments:
        """Compute the moments of the samples of all processes.

        Raises:
            ValueError: if no sample was added.
        """
        return self.moments()

    def moments(self) -> Moments:
        """Compute the moments of the samples of this process only; see :meth:`compute`."""
        count = int(self.count.item())
        if not count:
            raise ValueError("These statistics have no samples: call `update` first.")
        offset = self.total / count
        covariance = self.comoment.addr(offset, offset, alpha=-count).triu_().div_(max(count - 1, 1))
        covariance += covariance.triu(1).T
        return Moments(count, self.origin + offset, covariance)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = 0

    def free(self) -> None:
        """Free the memory of the statistics. Their content is lost.

        Deleting the metric is not enough: it refers to its own bound methods, so its matrix would stay in memory until
        the garbage collector runs.
        """
        for name in STATES:
            setattr(self, name, getattr(self, name).new_empty(0))

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:  # type: ignore[override]
        """Return the statistics of the samples of both, for example of two sites."""
        if not isinstance(other, FeatureStatistics) or other.sizes != self.sizes:
            raise ValueError("Only statistics of the same sizes can be added to each other.")
        joint = FeatureStatistics(self.sizes, self.gram_dtype).to(self.comoment.device)
        joint.merge_state(self)
        joint.merge_state(other)
        return joint

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another instance, or of its states, in place."""
        if isinstance(incoming_state, Metric):
            if not isinstance(incoming_state, FeatureStatistics) or incoming_state.sizes != self.sizes:
                raise ValueError("Only statistics of the same sizes can be added to each other.")
            incoming_state = incoming_state.metric_state
        states = {name: torch.as_tensor(incoming_state[name]) for name in STATES}
        if any(state.shape != getattr(self, name).shape for name, state in states.items()):
            raise ValueError("Only statistics of the same sizes can be added to each other.")
        self._computed = None
        if states["count"] > 0:
            self._update_count += 1
            self._make_writable()
            if not self.count:
                self._move_origin(states["origin"])
            moved = states["origin"] - self.origin
            total = states["total"] + states["count"] * moved
            self.comoment.add_(states["comoment"]).addr_(moved, states["total"]).addr_(total, moved)
            self.total += total
            self.count += states["count"]

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Sum the states by all-reduce. By default, torchmetrics gathers the states of all ranks on every rank."""
        sum_over_processes([self], process_group or self.process_group)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._computed = None
        self._update_count = int(self.count > 0)
        self._samples = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FeatureStatistics:
        def move(tensor: Tensor) -> Tensor:  # changes the device, never the dtype
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, *args, **kwargs)
        self._shrink_default()
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> FeatureStatistics:
        """Keep the states in float64, also if the surrounding module is cast to another dtype."""
        return self


def sum_over_processes(statistics: Sequence[FeatureStatistics], group: Any = None) -> None:
    """Sum statistics over all processes, in place. The result is identical on every process.

    The co-moments are shifted to a common origin and then summed. This takes three all-reduces, plus one for every
    64 MiB.

    Args:
        statistics: statistics of the same spaces on every process, in the same order, on one device.
        group: the process group; by default all processes.
    """
    origins = [torch.cat([(each.count > 0).double()[None], each.origin * (each.count > 0)]) for each in statistics]
    all_reduce_sums(origins, group)
    for each, (contributors, *_), packed in zip(statistics, origins, origins, strict=True):
        each._make_writable()
        each._move_origin(packed[1:] / contributors.clamp(min=1))
    all_reduce_sums([state for each in statistics for state in (each.count[None], each.total)], group)
    all_reduce_sums([each.comoment for each in statistics], group)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows rowsᵀ`` to a symmetric matrix in place. Only entries on and above the diagonal are computed.

    Args:
        total: ``(n, n)``.
        rows: ``(n, samples)``.
    """
    size = len(rows)
    if size <= LEAF:
        total += rows @ rows.T
        return
    first, second = slice(size // 2), slice(size // 2, size)
    total[first, second] += rows[first] @ rows[second].T
    for half in (first, second):
        add_gram(total[half, half], rows[half])


def empty_like_features(size: int, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a tensor ``(size, …)`` with the memory layout (channels first or last) of features ``(C, …)``."""
    positions = features.shape[1:]
    if features.stride(0) == 1:  # the layout of channels_last
        return features.new_empty(*positions, size, dtype=dtype).movedim(-1, 0)
    return features.new_empty(size, *positions, dtype=dtype)


def mean_by_first(features: Tensor) -> Tensor:
    """Compute the mean of each feature, ``(C, …)`` to ``(C,)``. For a constant feature it is exactly its value."""
    rows = features.flatten(1)
    first = rows[:, 0].to(torch.promote_types(rows.dtype, torch.float32))
    return first + (rows - first[:, None]).mean(1)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disable autocast and TF32: their precision is too low for a correlation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
