"""Linear interpolation between two networks of one task, after their features are matched."""

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
    """Interpolate linearly between two networks, with the features of the second permuted to match the first.

    Args:
        networks: two networks of one architecture and one output space. They are not changed.
        batches: inputs on which features are matched. They are iterated several times.
        shares: the weights t of the second network, each 0 to 1.
        settings: matcher and refinement; by default ``Permute()`` and no refinement. With a matcher that is not one to
            one, the results for t = 0 and t = 1 differ from the two networks.

    Yields:
        For each t, the network (1 - t) a + t b. It has the class and the order of features of the first network.

    Raises:
        ConfigurationError: if ``networks`` does not hold two networks, if a share is out of range, or if the networks
            cannot be merged as a whole.

    Example:
        >>> import torch
        >>> first, second = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> middle, end = interpolate([first, second], [torch.randn(32, 3)], [0.5, 1.0])
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(end(x), second(x), atol=1e-5)
        True
    """
    if len(networks) != 2:
        raise ConfigurationError(f"`networks` must hold exactly two networks, got {len(networks)}.")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ConfigurationError(f"`shares` must be between 0 and 1, got {wrong}.")
    settings = replace(settings or MergeSettings(matcher=Permute(), refine=None), merge_heads=True)
    if (settings.start_at, settings.stop_at, settings.width, settings.weights) != (None, None, 1, None):
        raise ConfigurationError(
            "Interpolation merges whole networks: leave `start_at`, `stop_at`, `width` and `weights` at their defaults."
        )
    named = dict(zip(("first", "second"), networks, strict=True))
    pipeline = Pipeline(make_sources(named, settings), settings)
    push(pipeline, [batches], pipeline.calibration_passes)
    for share in shares:
        weighted = pipeline.weighted((1 - share, share))
        push(weighted, [batches])
        network = copy_module(networks[0])
        # Parameters that the forward does not use keep the values of the first network.
        network.load_state_dict(weighted.finish().trunk.state_dict(), strict=False)
        yield network
