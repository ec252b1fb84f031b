"""A network merged with copies whose units were put into another order by hand keeps its function."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_cases import CASES
from helpers.nets import settle
from helpers.permuted import permuted_copy, random_orders
from torch.nn import BatchNorm2d

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.matchers import GreedyZip

NORMED = {name for name, case in CASES.items() if any(isinstance(part, BatchNorm2d) for part in case.make().modules())}
WHOLE = [(None, "whole"), ("least_squares", "whole"), ("batch_norm", "whole")]
CUT = [("least_squares", "cut"), ("repair", "cut")]
NIGHTLY = [(None, "cut"), ("repair", "whole"), ("batch_norm", "cut")]
REFINED = [
    pytest.param(name, refine, end, marks=pytest.mark.nightly if (refine, end) in NIGHTLY else ())
    for name in CASES
    for refine, end in WHOLE + CUT + NIGHTLY
    if refine != "batch_norm" or name in NORMED
]


@torch.no_grad()
def trained(case, x):
    """A network whose norms have scales, and the statistics of some data."""
    network = case.make().double()
    for tensor in network.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) / 4)
    return settle(network, x)


@torch.no_grad()
def error(merged, expected, x):
    """The largest deviation of an output, relative to how much outputs vary."""
    handed = merged.trunk(x)
    handed = handed if isinstance(handed, tuple) else (handed,)
    scale = (expected - expected.mean(0)).abs().max()
    return max(((head(*handed) - expected).abs().max() / scale).item() for head in merged.heads.values())


@pytest.mark.parametrize(("name", "refine", "end"), REFINED)
def test_a_copy_permuted_by_hand_merges_to_the_same_function(name, refine, end):
    case, x = CASES[name], CASES[name].example()
    network = trained(case, x)
    generator = torch.Generator().manual_seed(1)
    copies = [permuted_copy(case, network, random_orders(case, generator)) for _ in range(2 if refine is None else 1)]
    with torch.no_grad():
        expected = network(x)
        for other in copies:
            torch.testing.assert_close(other(x), expected, msg="the copy is none: mend the case")
    sources = {f"task {number}": source for number, source in enumerate([network, *copies])}
    stop_at = case.cut.module if end == "cut" else None
    settings = MergeSettings(stop_at, GreedyZip(alpha=1.0), refine, verify=False)
    assert error(merge_backbones(sources, [x], settings), expected, x) < (1e-3 if refine else 1e-9)
