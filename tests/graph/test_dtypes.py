"""A merged network in another floating-point type computes what its source does in that type."""

import copy

import pytest
import torch
from helpers.capturing import module
from torch import nn

from lightning_zipit._merging.rebuild import build_head, build_trunk
from lightning_zipit.graph import trace

LENGTH = 7


def normed(self, x):
    """A norm in float32, whose squares float16 cannot hold, and factories of every kind of type."""
    h = self.stem(x) * 100
    given = h.dtype
    h = h.to(torch.float32)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(given)
    h = self.inner(h + torch.ones(h.shape[-1], dtype=h.dtype)).relu()
    mask = torch.full((h.shape[1], h.shape[1]), float("-inf"), dtype=self.head.weight.dtype).triu(1)
    h = (h @ h.mT + mask).softmax(-1) @ h
    places = torch.arange(h.shape[1], dtype=torch.int64).unsqueeze(-1).to(h) / 10
    scale = torch.tensor([0.5, 2.0], dtype=x.dtype).repeat(3)
    return self.head((h * scale + places).mean(1))


def recurrent(self, x):
    return self.head(self.rnn(self.stem(x))[0].mean(1))


def tokens(self, x):
    h = self.stem(x)
    start = torch.zeros(h.shape[1], 6, dtype=h.dtype)
    return self.head((self.inner(h).relu() + start).mean(1))


def defaults(self, x):
    return self.head(self.inner(self.stem(x).relu() + torch.ones(6)).mean(1))


def linears(**more):
    return {"stem": nn.Linear(4, 6), "inner": nn.Linear(6, 6), "head": nn.Linear(6, 3), **more}


NETWORKS = {
    "casts and masks": lambda: module(normed, **linears()),
    "LSTM": lambda: module(recurrent, **linears(rnn=nn.LSTM(6, 6, batch_first=True))),
    "tokens": lambda: module(tokens, **linears(stem=nn.Embedding(9, 6))),
}


def inputs(kind):
    torch.manual_seed(0)
    return torch.randint(0, 9, (8, LENGTH)) if kind == "tokens" else torch.randn(8, LENGTH, 4)


class Parts(nn.Module):
    """Trunk and head of a network."""

    def __init__(self, network, x):
        super().__init__()
        graph = trace(network, "stem", example_input=x)
        self.trunk, self.head = build_trunk(graph), build_head(graph)

    def forward(self, x):
        return self.head(*self.trunk(x))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    x = inputs(request.param)
    network = NETWORKS[request.param]().eval()
    return network, Parts(network, x), x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_types_that_the_forward_takes_from_tensors_follow(case, dtype):
    network, merged, x = case
    x = x.to(dtype) if x.is_floating_point() else x
    expected = copy.deepcopy(network).to(dtype)(x)
    found = copy.deepcopy(merged).to(dtype)(x)
    assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_it_runs_in_autocast(case):
    network, merged, x = case
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(merged(x), network(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_types_that_the_forward_does_not_write_out_follow_the_default_of_torch():
    x = inputs("")
    network = module(defaults, **linears()).eval()
    merged = Parts(network, x)
    expected = copy.deepcopy(network).double()(x.double())
    torch.testing.assert_close(copy.deepcopy(merged).double()(x.double()), expected)
    before = torch.get_default_dtype()
    try:  # as Lightning does with precision="bf16-true"
        torch.set_default_dtype(torch.bfloat16)
        found = copy.deepcopy(merged).bfloat16()(x.bfloat16())
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_network_in_another_type_exports(case):
    network, parts, x = case
    parts, x = copy.deepcopy(parts).double(), x.double() if x.is_floating_point() else x
    program = torch.export.export(parts, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), copy.deepcopy(network).double()(x))
