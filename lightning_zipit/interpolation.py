"""The straight line between two networks of one task, once their features are in one order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._phases.prepare import make_sources
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Permute
from lightning_zipit.pipeline import Pipeline
from lightning_zipit.plain import push
from lightning_zipit.settings import MergeSettings


def interpolate(
    networks: Sequence[nn.Module],
    batches: Iterable[Tensor],
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    settings: MergeSettings | None = None,
) -> Iterator[nn.Module]:
    """The networks on the line from one network to another whose features were permuted onto the first's.

    Args:
        networks: two networks of one architecture and one output space; they are left as they are.
        batches: inputs to match features on, to be gone through several times.
        shares: how much the second network counts in each result, 0 to 1.
        settings: how features are matched, and what follows; by default ``Permute()`` and nothing. With a matcher that
            is not one to one, the ends are not the two networks.

    Yields:
        Per share (1 - t) a + t b, a network of the class of the first, in the order of its features.

    Raises:
        ConfigurationError: if there are not two networks, a share is out of range, or they cannot be merged whole.

    Example:
        >>> import torch
        >>> first, second = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> middle, end = interpolate([first, second], [torch.randn(32, 3)], [0.5, 1.0])
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(end(x), second(x), atol=1e-5)
        True
    """
    if len(networks) != 2:
        raise ConfigurationError(f"A line has two ends: give two networks, got {len(networks)}.")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ConfigurationError(f"`shares` must lie from 0 to 1, got {wrong}.")
    settings = replace(settings or MergeSettings(matcher=Permute(), refine=None), merge_heads=True)
    if (settings.start_at, settings.stop_at, settings.width, settings.weights) != (None, None, 1, None):
        raise ConfigurationError(
            "The networks are merged whole: leave `start_at`, `stop_at`, `width` and `weights` as they are."
        )
    named = dict(zip(("first", "second"), networks, strict=True))
    pipeline = Pipeline(make_sources(named, settings), settings)
    push(pipeline, [batches], pipeline.calibration_passes)
    for share in shares:
        weighted = pipeline.weighted((1 - share, share))
        push(weighted, [batches])
        network = copy_module(networks[0])
        # Parameters that the forward does not use stay those of the first network.
        network.load_state_dict(weighted.finish().trunk.state_dict(), strict=False)
        yield network
