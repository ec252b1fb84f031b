"""Matching by weights: coordinate descent over the spaces, until no label changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_zipit import functional as F
from lightning_zipit._matching.families import Match, Rule, as_labels
from lightning_zipit._matching.spaces import Spaces


def match_by_weights(spaces: Spaces, rule: Rule, tau: float, rounds: int, seed: int) -> dict[str, Match]:
    """Match all spaces by weights and activations, by coordinate descent.

    The weights of two features can be compared only if their input and output features are already matched. So the
    matching of each space depends on its neighbours. The spaces are matched in turn, in random order, until no label
    changes (Git Re-Basin, arXiv 2209.04836, algorithm 1). The descent starts from the matching by activations, or by
    index if there are no activations. The first round goes from the input to the output, because the order of the
    input is the same in all models.

    Args:
        spaces: all spaces.
        rule: the matcher for one space.
        tau: weight of the similarity of weights. The similarity of activations has weight 1 - ``tau``.
        rounds: the highest number of rounds.
        seed: random seed for the order of the spaces.

    Returns:
        The matching of each space.
    """
    descent = _Descent(spaces, rule, tau)
    everything, generator = list(spaces.families), torch.Generator().manual_seed(seed)
    if descent.activations:
        descent.run_round(everything, by_weights=False)
    order = everything
    for _ in range(rounds):
        if not descent.run_round(order, by_weights=True):
            break
        order = [everything[index] for index in torch.randperm(len(everything), generator=generator).tolist()]
    return descent.found


class _Descent:
    """The current matching of all spaces."""

    def __init__(self, spaces: Spaces, rule: Rule, tau: float) -> None:
        self.spaces, self.rule, self.tau = spaces, rule, tau
        known = {name: spaces.similarity(name) for name in spaces}
        self.activations = {name: similarity for name, similarity in known.items() if similarity is not None}
        count = spaces.num_models
        self.labels = {name: F.average(count * space.size, count) for name, space in spaces.items()}
        self.found = {name: Match(labels) for name, labels in self.labels.items()}

    def run_round(self, order: Iterable[Sequence[str]], by_weights: bool) -> bool:
        """Match each family once, and return whether a label has changed."""
        changed = False
        for family in order:
            similarities = self._weighed(family) if by_weights else self.activations
            similarities = {name: similarities[name] for name in family if name in similarities}
            for name, match in self.spaces.match_family(family, self.rule, similarities).items():
                labels = match.features
                if match.similarity is not None:
                    labels = as_labels(labels, match.similarity, self.spaces.num_models)
                assert isinstance(labels, Tensor)
                changed |= not torch.equal(labels, self.labels[name])
                self.labels[name], self.found[name] = labels, Match(labels, match.similarity)
        return changed

    def _weighed(self, family: Sequence[str]) -> Mapping[str, Tensor]:
        """Compute the weighted similarity of weights and activations for each space of a family."""
        found = {}
        for name in family:
            if self.spaces[name].pinned:
                continue
            rows, measured = self.spaces.weights(name, self.labels), self.activations.get(name)
            if rows is None:
                if measured is not None:
                    found[name] = measured
                continue
            cosine = F.correlation(rows @ rows.T)
            found[name] = cosine if measured is None else cosine.mul_(self.tau).add_(measured, alpha=1 - self.tau)
        return found
