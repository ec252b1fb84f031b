"""Means and covariances of features, gathered batch by batch, device by device or site by site."""

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
"""Rows of a product that are not worth halving."""

AT_ONCE = 2**22
"""Entries of samples that are shifted and multiplied at a time: bounds the memory of one update."""


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

    Samples are shifted by an origin near their mean, Gram matrices of a batch are taken in ``gram_dtype`` and added up
    in float64, and what the mean differs from the origin is corrected in the end, so that neither a large mean nor the
    split into batches costs precision. Statistics of several origins are brought to one before they are added.

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
    origin: Tensor  # near the mean, so that no digit is lost; of a feature that is constant, its value
    total: Tensor  # of the samples' offsets from the origin
    comoment: Tensor  # of these offsets, on and above the diagonal; what lies below means nothing

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
        self._samples = 0  # since the origin was set
        self.few = size  # up to so many samples, Gram matrices are taken in float64
        self._shrink_default()
        self.comoment = torch.zeros(size, size, dtype=torch.float64)  # once: `add_state` would keep a copy

    def _shrink_default(self) -> None:
        """What `reset` copies is a matrix of zeros as large as the statistics: a single zero will do."""
        size = sum(self.sizes)
        self._defaults["comoment"] = torch.zeros_like(self.count).expand(size, size)

    def update(self, features: Sequence[Tensor], features_first: bool = False) -> None:
        """Add samples.

        Args:
            features: of each model ``(samples, C_i)``, the same samples in the same order.
            features_first: they are ``(C_i, samples, …)`` instead, every position a sample.

        Raises:
            ValueError: if the shapes are not those of ``sizes``, or the numbers of samples differ.
        """
        shapes = [tuple(feature.shape) for feature in features]
        given = [feature if features_first or feature.ndim != 2 else feature.T for feature in features]
        positions = tuple(given[0].shape[1:]) if given else ()
        if not positions or [tuple(feature.shape) for feature in given] != [(size, *positions) for size in self.sizes]:
            expected = "(C, samples, …)" if features_first else "(samples, C)"
            raise ValueError(
                f"`features` must be {len(self.sizes)} tensors of shapes {expected} with C in {list(self.sizes)} "
                f"and equal samples, got shapes {shapes}."
            )
        total = sum(self.sizes)
        at_once = max(AT_ONCE // total, 2 * total) // max(1, math.prod(positions[1:]))
        with torch.no_grad(), full_precision(given[0].device.type):
            for parts in zip(*(feature.split(max(1, at_once), dim=1) for feature in given), strict=True):
                if parts[0].numel():
                    self._add_samples(parts)

    def consume(self, rows: Tensor) -> None:
        """Add samples, and use their memory for what is computed of them: afterwards they mean nothing.

        Args:
            rows: the features of all models ``(n, samples)``.
        """
        with torch.no_grad(), full_precision(rows.device.type):
            self._add_samples(rows.split(self.sizes), rows)

    def _add_samples(self, features: Sequence[Tensor], room: Tensor | None = None) -> None:
        """Add samples of each model, ``(C_i, samples, …)``: one pass that shifts and copies them, and one product.

        Where there is room of the right type for what is shifted, ``(n, samples)``, it is used.
        """
        samples, size = features[0][0].numel(), sum(self.sizes)
        self._unseal()
        if not self._samples:
            self._set_origin(features)
        self._samples += samples
        # Few samples: copies of a feature are told apart from near copies by the last digits, and the product is cheap.
        dtype = torch.float64 if self._samples <= self.few else self.gram_dtype
        dtype = torch.promote_types(features[0].dtype, dtype)
        rows = empty_like_features(size, features[0], dtype) if room is None or room.dtype != dtype else room
        origins = self.origin.to(dtype).split(self.sizes)
        for part, feature, origin in zip(rows.split(self.sizes), features, origins, strict=True):
            torch.sub(feature, origin.view(-1, *[1] * (feature.ndim - 1)), out=part)
        rows = rows.flatten(1)
        self.count += samples
        self.total += rows.mean(1).double() * samples
        add_gram(self.comoment, rows)

    def _unseal(self) -> None:
        """States made in inference mode, where every tensor is sealed on leaving it, are made anew outside."""
        if self.comoment.is_inference() and not torch.is_inference_mode_enabled():
            for name in STATES:
                setattr(self, name, getattr(self, name).clone())

    def _set_origin(self, features: Sequence[Tensor]) -> None:
        """An origin that single precision holds without rounding: near the mean of all samples, or of the first."""
        if self.count > 0:
            origin = self.origin.to(torch.promote_types(features[0].dtype, torch.float32))
        else:
            origin = torch.cat([mean_by_first(feature) for feature in features])
        self._move_origin(origin.double())

    def _move_origin(self, origin: Tensor) -> None:
        """Σ (x + d)(x + d)ᵀ = Σ x xᵀ + d (Σ x)ᵀ + (Σ x + n d) dᵀ, for offsets x from the origin that was."""
        if self.count > 0:
            moved = self.origin - origin
            self.comoment.addr_(moved, self.total)
            self.total += self.count * moved
            self.comoment.addr_(self.total, moved)
        self.origin.copy_(origin)
        self._samples = 0

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
        offset = self.total / count
        covariance = self.comoment.addr(offset, offset, alpha=-count).triu_().div_(max(count - 1, 1))
        covariance += covariance.triu(1).T
        return Moments(count, self.origin + offset, covariance)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = 0

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
        states = {name: torch.as_tensor(incoming_state[name]) for name in STATES}
        if any(state.shape != getattr(self, name).shape for name, state in states.items()):
            raise ValueError("Only statistics of the same sizes can be added to each other.")
        self._computed = None
        if states["count"] > 0:
            self._update_count += 1
            self._unseal()
            if not self.count:
                self._move_origin(states["origin"])
            moved = states["origin"] - self.origin
            total = states["total"] + states["count"] * moved
            self.comoment.add_(states["comoment"]).addr_(moved, states["total"]).addr_(total, moved)
            self.total += total
            self.count += states["count"]

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """True all-reduces instead of the default gathering of all states on all ranks."""
        sum_over_processes([self], process_group or self.process_group)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._computed = None
        self._update_count = int(self.count > 0)
        self._samples = 0

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

    The co-moments are brought to a common origin and summed: three all-reduces, or one more for every 64 MiB.

    Args:
        statistics: the same on every process, in the same order, on one device.
        group: the process group; by default all processes.
    """
    origins = [torch.cat([(each.count > 0).double()[None], each.origin * (each.count > 0)]) for each in statistics]
    all_reduce_sums(origins, group)
    for each, (shares, *_), packed in zip(statistics, origins, origins, strict=True):
        each._unseal()
        each._move_origin(packed[1:] / shares.clamp(min=1))
    all_reduce_sums([state for each in statistics for state in (each.count[None], each.total)], group)
    all_reduce_sums([each.comoment for each in statistics], group)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows rowsᵀ`` to a symmetric matrix, in place, on and above its diagonal, which is half of the work.

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
    """Room for ``(size, …)``, with features in memory as those of ``(C, …)``: next to each other, or far apart."""
    positions = features.shape[1:]
    if features.stride(0) == 1:  # the layout of channels_last
        return features.new_empty(*positions, size, dtype=dtype).movedim(-1, 0)
    return features.new_empty(size, *positions, dtype=dtype)


def mean_by_first(features: Tensor) -> Tensor:
    """The mean of each feature, ``(C, …)`` to ``(C,)``: exactly its value, where it has but one."""
    rows = features.flatten(1)
    first = rows[:, 0].to(torch.promote_types(rows.dtype, torch.float32))
    return first + (rows - first[:, None]).mean(1)


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
