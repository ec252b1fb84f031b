"""What a forward does in training mode alone comes back when trunk and heads are in training mode."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.capturing import module
from torch import nn

from lightning_zipit._merging.rebuild import build_head, build_trunk
from lightning_zipit.graph import trace


def drops(self, x):
    return F.dropout(self.inner(F.dropout(self.stem(x), 0.3, self.training)).relu(), training=self.training)


def drops_never(self, x):
    return F.dropout(self.inner(self.stem(x)).relu(), 0.5, False)


def attends(self, x):
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.inner(self.stem(x)).chunk(3, -1))
    rate = 0.4 if self.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2).flatten(2)


def normalizes(self, x):
    y = self.stem(x).transpose(1, 2)
    y = F.batch_norm(y, self.mean, self.var, training=self.training, momentum=0.5)
    return self.inner(y.transpose(1, 2))


def calls(name):
    return lambda self, x: getattr(self, name)(self.stem(x))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return F.dropout(self.inner(x), 0.5, self.training)


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def attention():
    return nn.TransformerEncoderLayer(6, 2, 12, dropout=0.3, batch_first=True)


def with_parts(forward, **more):
    network = module(forward, stem=nn.Linear(4, 6), **more)
    whole = module(lambda self, x: self.head(self.body(x)), body=network, head=nn.Linear(6, 3))
    return whole


def statistics():
    network = with_parts(normalizes, inner=nn.Linear(6, 6))
    network.body.register_buffer("mean", torch.zeros(6))
    network.body.register_buffer("var", torch.ones(6))
    return network


NETWORKS = {
    "functional dropout": lambda: with_parts(drops, inner=nn.Linear(6, 6)),
    "dropout that is always off": lambda: with_parts(drops_never, inner=nn.Linear(6, 6)),
    "dropout in attention": lambda: with_parts(attends, inner=nn.Linear(6, 18)),
    "functional batch norm": statistics,
    "dropout modules": lambda: with_parts(calls("inner"), inner=nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))),
    "transformer layer": lambda: with_parts(calls("inner"), inner=attention()),
    "LSTM of several layers": lambda: with_parts(
        calls("inner"), inner=Recurrent(6, 6, 2, batch_first=True, dropout=0.5)
    ),
}


class Parts(nn.Module):
    """Trunk and head of a network."""

    def __init__(self, network, x, stop_at):
        super().__init__()
        self.graph = trace(network, stop_at, example_input=x)
        self.trunk, self.head = build_trunk(self.graph), build_head(self.graph)

    def forward(self, x):
        return self.head(*self.trunk(x))


X = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))


def seeded(network):
    torch.manual_seed(1)
    return network(X)


@pytest.mark.parametrize("kind", NETWORKS)
def test_parts_compute_in_each_mode_what_the_network_does(kind):
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    parts = Parts(network.eval(), X, "body.stem")
    parts.graph = None
    for twin in (parts, copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        for mode in (True, False, True):
            expected = seeded(copy.deepcopy(network).train(mode))
            torch.testing.assert_close(seeded(copy.deepcopy(twin).train(mode)), expected)
    random = not torch.equal(parts.train()(X), parts(X))
    assert random == (kind not in ("dropout that is always off", "functional batch norm"))


def test_the_mode_of_the_module_around_decides():
    network = module(lambda self, x: self.head(self.nested(self.stem(x))), stem=nn.Linear(4, 6), nested=Nested())
    network.head = nn.Linear(6, 3)
    parts = Parts(network.eval(), X, "stem")
    parts.train().head.nested.eval()
    torch.testing.assert_close(parts(X), network(X))


def test_batch_norm_in_training_mode_updates_its_statistics():
    network = statistics().eval()
    parts = Parts(network, X, None)
    network.train()(X), parts.train()(X)
    torch.testing.assert_close(parts.trunk.get_buffer("body.mean"), network.body.mean)
    assert network.body.mean.any()


def branches(self, x):
    x = self.stem(x).relu()
    if self.training:
        x = F.dropout(x, 0.5)
    return self.head(x)


def test_what_the_graph_does_not_have_is_noted():
    network = module(branches, stem=nn.Linear(4, 6), head=nn.Linear(6, 3))
    (note,) = (note for note in trace(network, example_input=X).notes if "training mode" in note)
    assert "`dropout`" in note and "test_training_mode.py" in note
    plain = with_parts(drops, inner=nn.Linear(6, 6))
    assert not any("training mode" in note for note in trace(plain, example_input=X).notes)


def writes(self, x):
    if self.training:
        self.table.data.add_(1)
        self.seen = getattr(self, "seen", 0) + 1
    y = F.dropout(self.stem(x) + self.table, 0.5, self.training)
    return self.head(y + torch.zeros(6, dtype=y.dtype))


def test_runs_in_training_mode_leave_the_network_and_random_numbers_as_they_were():
    network = module(writes, stem=nn.Linear(4, 6), table=nn.Parameter(torch.zeros(6)), head=nn.Linear(6, 3)).eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    graph = trace(network, example_input=X)
    assert torch.equal(torch.rand(1), expected)
    assert not network.table.any() and not hasattr(network, "seen") and not network.training
    assert any("in_training" in node.meta for node in graph.fx_graph.nodes)
