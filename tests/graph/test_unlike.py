"""Tensors without features are shared only if their values work in all sources."""

import copy

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones
from lightning_zipit.errors import VerificationError

USES = {
    "mask": lambda y, m: y * m,
    "where": lambda y, m: torch.where(m, y, -y),
    "filled": lambda y, m: y.masked_fill(m, 0.0),
    "power": lambda y, m: y ** (m + 1),
    "getitem": lambda y, m: y[:, m],
    "index_select": lambda y, m: y.index_select(1, m),
    "gather": lambda y, m: y.gather(1, m.expand(y.shape[0], -1)),
}


class Buffered(nn.Module):
    """Uses an integer or boolean buffer along its hidden features."""

    def __init__(self, use, buffer):
        super().__init__()
        self.a, self.b, self.c, self.use = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), use
        self.register_buffer("m", buffer)

    def forward(self, x):
        return self.c(self.b(USES[self.use](self.a(x).tanh(), self.m)).relu())


ORDER = torch.tensor([3, 0, 6, 1, 7, 5, 2, 4])


@pytest.mark.parametrize("refine", [None, "least_squares"])
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_buffers_that_go_with_features_are_not_shared(use, refine):
    indices = use in ("getitem", "index_select", "gather")
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    buffer = torch.randperm(8) if indices else mask if use == "power" else mask.bool()
    net = Buffered(use, buffer)
    other = copy.deepcopy(net)  # the features of the first layer in another order
    other.a.weight.copy_(net.a.weight[ORDER]), other.a.bias.copy_(net.a.bias[ORDER])
    if indices:  # what is read at place k comes from where that feature lies now
        other.m.copy_(ORDER.argsort()[net.m])
    else:
        other.m.copy_(net.m[ORDER]), other.b.weight.copy_(net.b.weight[:, ORDER])
    x = torch.randn(64, 6)
    torch.testing.assert_close(other(x), net(x))
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(refine=refine))
    for head in merged.heads.values():
        torch.testing.assert_close(head(*merged.trunk(x)), net(x), rtol=1e-4, atol=1e-5)


class Normalised(nn.Module):
    """Normalizes its input by buffers, and counts its calls in another buffer."""

    def __init__(self, mean=0.0):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.full((6,), mean))

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x - self.mean)).relu()).relu())


def test_buffers_without_effect_may_differ():
    nets = {task: Normalised().eval() for task in "ab"}
    nets["b"].norm.num_batches_tracked.fill_(7)
    merged = merge_backbones(nets, [torch.randn(32, 6)], MergeSettings(refine=None))
    assert not merged.graphs["a"].barriers


def test_positions_that_the_sources_cannot_share_are_named():
    nets = {"a": Normalised().eval(), "b": Normalised(mean=2.0).eval()}
    with pytest.raises(VerificationError, match=r"different values of `mean`"):
        merge_backbones(nets, [torch.randn(32, 6)], MergeSettings(refine=None))
