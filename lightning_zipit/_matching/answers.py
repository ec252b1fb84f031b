"""Validation of a matcher's results, and conversion to maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._matching.families import Match, Rule, check_matrices
from lightning_zipit._matching.maps import DenseMap, FeatureMap, SpaceMap
from lightning_zipit._matching.spaces import Spaces
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph.spaces import handed_over


def maps_from(answers: Mapping[str, Match], spaces: Spaces, matcher: Rule) -> dict[str, FeatureMap]:
    """Convert the matchings that a matcher returned to maps.

    Args:
        answers: the matching of each space.
        spaces: the spaces that were passed to the matcher.
        matcher: the matcher, for error messages.

    Returns:
        The maps, in the order of the spaces.

    Raises:
        ConfigurationError: if a space has no matching, or its matching cannot be applied.
    """
    missing = [name for name in spaces if name not in answers]
    if missing:
        raise ConfigurationError(
            f"{matcher!r} returned no matching for the spaces {', '.join(map(repr, missing))}: `match` must return a "
            "matching for every space in its argument."
        )
    return {name: _map_from(answers, spaces, name, matcher) for name in spaces}


def _map_from(answers: Mapping[str, Match], spaces: Spaces, name: str, matcher: Rule) -> FeatureMap:
    found, space = answers[name].features, spaces[name]
    count, width = spaces.num_models, spaces.width(name)
    if not isinstance(found, Tensor):
        if space.pinned or space.units or name in handed_over(spaces.graph) or name in spaces.rigid_of():
            raise ConfigurationError(
                f"{matcher!r} returned matrices for the space {name!r}, but linear combinations of its features cannot "
                "be merged: return labels for this space."
            )
        return DenseMap(check_matrices(found, space.size, width, count, repr(matcher)))
    labels = found.cpu()
    problem = _problem(labels, answers, spaces, name)
    if problem:
        raise ConfigurationError(f"{matcher!r} returned invalid labels for the space {name!r}: {problem}.")
    return SpaceMap(labels, count)


def _problem(labels: Tensor, answers: Mapping[str, Match], spaces: Spaces, name: str) -> str:
    """Return why labels are invalid, or an empty string if they are valid."""
    space, count, width = spaces[name], spaces.num_models, spaces.width(name)
    features = count * space.size
    if labels.shape != (features,) or labels.dtype != torch.int64:
        return f"they must be int64 of shape ({features},), got {labels.dtype} of shape {tuple(labels.shape)}"
    if not torch.equal(labels.unique(), torch.arange(width)):
        return f"they must contain every number from 0 to {width - 1}, and no other number"
    if space.pinned and not torch.equal(labels, F.average(features, count)):
        return f"the features of this space must be matched by index ({space.pinned})"
    units = answers[space.units].features if space.units else None
    if isinstance(units, Tensor):
        of_feature = torch.tensor(space.unit_of)
        expected = units.cpu().view(count, -1)[:, of_feature].flatten()  # the merged unit of each source feature
        if not torch.equal(of_feature[labels], expected):
            return f"each feature must stay in the merged unit of {space.units!r} to which its own unit was matched"
    return ""
