"""Captured networks: permuted as their rules say, by hand, they must compute the same."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.capturing import captured, module, tensor, tokens
from helpers.equivariance import Permutations
from torch import nn

from lightning_zipit._common.calls import Call
from lightning_zipit.errors import TraceError
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.operators import aten
from lightning_zipit.graph.replay import in_dtype
from lightning_zipit.graph.values import Features, leaves


def lstm(**options):
    return module(
        lambda self, x: self.out(self.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 6, 2, batch_first=True, **options), out=sized(3)
    )


def sized(features):
    return nn.LazyLinear(features)


def last_states(self, x):
    _, (h, c) = self.rnn(x)
    return self.out(torch.cat([h[-2], h[-1], c[0]], 1))


def encoder_decoder(self, x):
    _, state = self.encoder(x)
    return self.out(self.decoder(x.flip(1), state)[0])


def learned_start(self, x):
    start = self.start.weight[:, None].expand(-1, x.shape[0], -1).contiguous()
    return self.out(self.rnn(x, start)[0])


def steps(self, x):
    h = c = torch.zeros(x.shape[0], 6)
    for step in x.unbind(1):
        h, c = self.cell(step, (h, c))
    return self.out(h)


def spectral(norm):
    return module(
        lambda self, x: self.out(self.b(self.a(x).relu()).relu().mean((2, 3))),
        a=norm(nn.Conv2d(2, 4, 3)),
        b=norm(nn.Conv2d(4, 5, 3)),
        out=sized(3),
    )


def weight_norm(norm, **options):
    return module(
        lambda self, x: self.out(self.b(self.a(x).relu()).relu().mean(2)),
        a=norm(nn.Conv1d(3, 4, 3)),
        b=norm(nn.Conv1d(4, 6, 3, groups=2), **options),
        out=sized(3),
    )


def frozen_norm(self, x):
    y, n = self.a(x), self.norm
    scale = n.weight * (n.running_var + n.eps).rsqrt()
    bias = n.bias - n.running_mean * scale
    return self.out((y * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)).relu().mean((2, 3)))


def cross_attention(self, x):
    memory = self.b(x[:, :3]).relu()
    return self.out(self.attention(self.a(x), memory, memory)[0].mean(1))


def text(self, x):
    y = self.words(x)[:, None]
    return self.out(torch.cat([conv(y).squeeze(3).relu().amax(2) for conv in (self.a, self.b)], 1))


def generator(self, x):
    y = self.norm(self.a(x).unflatten(1, (4, 3, 3))).relu()
    return self.b(y).relu().mean((2, 3)) @ self.c.weight


def resampled(self, x):
    y = self.patches(x)
    table = F.interpolate(self.table.weight.reshape(1, 2, 2, 6).permute(0, 3, 1, 2), y.shape[2:], mode="bilinear")
    return self.out((y + table).relu().mean((2, 3)))


def class_token(self, x):
    y = torch.cat([self.token.weight[None].expand(x.shape[0], -1, -1), self.a(x)], 1)
    kept = torch.cat([self.table.weight[-1:], self.table.weight[:4]], 0)
    return self.out((y + kept).relu()[:, 0])


def grouped_queries(self, x):
    q, k, v = (layer(x).unflatten(2, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
    if self.repeats:
        k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return self.out(y.transpose(1, 2).flatten(2))


def grouped(repeats):
    net = module(grouped_queries, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), out=nn.Linear(12, 3))
    net.repeats = repeats
    return net


def one_pair_turns(self, x):
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 1.0])
    q, k = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
    q, k = (torch.cat([turned(z[..., :2], angles), z[..., 2:]], 3) for z in (q, k))
    return self.out((q @ k.transpose(2, 3)).softmax(3).to(x.dtype).mean(1) @ self.v(x))


def turned(z, angles):
    return z * angles.cos() + torch.cat([-z[..., 1:], z[..., :1]], 3) * angles.sin()


def rotary(self, x):
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
    q, k = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k))
    if self.complex:
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.float().unflatten(3, (2, 2)).contiguous()) * turn).flatten(3)
            for z in (q, k)
        )
    else:
        cos, sin = (torch.cat([f, f], 1) for f in (angles.cos(), angles.sin()))
        q, k = (z * cos + torch.cat([-z[..., 2:], z[..., :2]], 3) * sin for z in (q, k))
    return self.out((q @ k.transpose(2, 3)).softmax(3).to(x.dtype).mean(1) @ self.v(x))


def rotating(of_complex):
    net = module(rotary, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 6), out=nn.Linear(6, 3))
    net.complex = of_complex
    return net


def transformer(self, x):
    theta = self.where(x.flatten(1)).reshape(-1, 2, 3)
    y = F.grid_sample(self.a(x), F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    return self.out(y.relu().mean((2, 3)))


def experts(self, x):
    y = torch.stack([expert(x).relu() for expert in (self.a, self.b, self.c)], 1)
    return self.out((self.gate(x).softmax(1)[..., None] * y).sum(1))


def selective_kernels(self, x):
    y = torch.stack([self.a(x), self.b(x)], 1)
    weights = self.expand(y.sum(1).mean((2, 3)).relu()).unflatten(1, (2, 4)).softmax(1)
    return self.out((y * weights[..., None, None]).sum(1).mean((2, 3)))


def pooled_tokens(self, x):
    y = self.a(x).relu()
    return self.out(torch.einsum("bl,bld->bd", self.attention(y).softmax(1)[..., 0], y))


def unit_queries(self, x):
    q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
    y = F.normalize(q, dim=3) @ F.normalize(k, dim=3).transpose(2, 3) @ v
    return self.out(y.transpose(1, 2).flatten(2))


def one_key(self, x):
    q, k, v = self.q(x).unflatten(2, (3, 4)).transpose(1, 2), self.k(x), self.v(x)
    scores = torch.einsum("bhid,bjd->bhij", q, k).softmax(3)
    return self.out(torch.einsum("bhij,bjd->bhid", scores, v).transpose(1, 2).flatten(2))


def relative(self, x):
    q, table = self.q(x), self.k(self.norm(self.table.weight))
    scores = q @ table.T
    distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).clamp(-2, 2) + 2
    scores = scores.gather(2, distance.expand(x.shape[0], -1, -1))
    return self.out(scores.softmax(2) @ self.v(x))


def masked_tokens(self, x):
    y = self.a(x).clone()
    y[:, torch.tensor([0, 2])] = self.token.weight[0]
    return self.out(y.relu().mean(1))


def filters(self, x):
    y = torch.fft.rfft(self.a(x), dim=1) * torch.view_as_complex(self.filter.weight.reshape(3, 5, 2))
    return self.out(torch.fft.irfft(y, n=x.shape[1], dim=1).relu().mean(1))


def low_rank(self, x):
    weight = self.a.weight + self.up.weight @ self.down.weight
    return self.out(F.linear(x, weight).relu())


def gated(self, x):
    return self.out(F.glu(self.b(F.glu(self.a(x), 1)), 1).mean(2))


PLAIN = nn.utils.weight_norm, nn.utils.spectral_norm
PARAMETRIZED = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
CASES = {
    "LSTM": (lstm(), tensor(5, 4), ()),
    "LSTM in both directions": (lstm(bidirectional=True), tensor(5, 4), ()),
    "LSTM with a projection": (lstm(proj_size=3), tensor(5, 4), ()),
    "last states of an LSTM": (
        module(last_states, rnn=nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), out=sized(3)),
        tensor(5, 4),
        (),
    ),
    "GRU that starts at the state of another": (
        module(encoder_decoder, encoder=nn.GRU(4, 6, 2), decoder=nn.GRU(4, 6, 2), out=sized(3)),
        lambda n: ((torch.randn(5, n, 4).transpose(0, 1).contiguous().transpose(0, 1),), {}),
        (),
    ),
    "RNN that starts at a parameter": (
        module(learned_start, rnn=nn.RNN(4, 6, batch_first=True), start=nn.Embedding(1, 6), out=sized(3)),
        tensor(5, 4),
        (),
    ),
    "LSTM cells": (module(steps, cell=nn.LSTMCell(4, 6), out=sized(3)), tensor(3, 4), ()),
    "weight norm": (weight_norm(PLAIN[0]), tensor(3, 9), ()),
    "weight norm, parametrized": (weight_norm(PARAMETRIZED[0]), tensor(3, 9), ()),
    "weight norm over positions": (
        weight_norm(PARAMETRIZED[0], dim=2),
        tensor(3, 9),
        ("b.parametrizations.weight.original0",),
    ),
    "spectral norm": (spectral(PLAIN[1]), tensor(2, 8, 8), ("a.weight_v",)),
    "spectral norm, parametrized": (spectral(PARAMETRIZED[1]), tensor(2, 8, 8), ("a.parametrizations.weight.0._v",)),
    "norm written out": (
        module(frozen_norm, a=nn.Conv2d(2, 5, 3), norm=nn.BatchNorm2d(5), out=sized(3)),
        tensor(2, 6, 6),
        (),
    ),
    "cross attention": (
        module(
            cross_attention,
            a=nn.Linear(5, 8),
            b=nn.Linear(5, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
            out=sized(3),
        ),
        tensor(6, 5),
        (),
    ),
    "convolutions over words": (
        module(text, words=nn.Embedding(20, 5), a=nn.Conv2d(1, 4, (2, 5)), b=nn.Conv2d(1, 4, (3, 5)), out=sized(3)),
        tokens,
        (),
    ),
    "images from a linear layer": (
        module(generator, a=nn.Linear(5, 36), norm=nn.BatchNorm2d(4), b=nn.ConvTranspose2d(4, 6, 2), c=nn.Linear(3, 6)),
        tensor(5),
        ("c.bias",),
    ),
    "resampled table of positions": (
        module(resampled, patches=nn.Conv2d(3, 6, 2, 2), table=nn.Embedding(4, 6), out=sized(3)),
        tensor(3, 6, 6),
        (),
    ),
    "token and parts of a table": (
        module(class_token, a=nn.Linear(5, 6), token=nn.Embedding(1, 6), table=nn.Embedding(6, 6), out=sized(3)),
        tensor(4, 5),
        (),
    ),
    "grouped queries": (grouped(False), tensor(4, 5), ()),
    "grouped queries, repeated": (grouped(True), tensor(4, 5), ()),
    "queries of unit length": (
        module(unit_queries, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 8), out=nn.Linear(8, 3)),
        tensor(4, 5),
        (),
    ),
    "one key for all heads": (
        module(one_key, q=nn.Linear(5, 12), k=nn.Linear(5, 4), v=nn.Linear(5, 4), out=nn.Linear(12, 3)),
        tensor(4, 5),
        (),
    ),
    "rotary embedding of one pair of each head": (
        module(one_pair_turns, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 6), out=nn.Linear(6, 3)),
        tensor(4, 5),
        (),
    ),
    "rotary embedding": (rotating(False), tensor(4, 5), ()),
    "rotary embedding of complex numbers": (rotating(True), tensor(4, 5), ()),
    "spatial transformer": (
        module(transformer, where=nn.Linear(48, 6), a=nn.Conv2d(3, 5, 1), out=sized(3)),
        tensor(3, 4, 4),
        ("where",),
    ),
    "mixture of experts": (
        module(experts, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(5, 6), gate=nn.Linear(5, 3), out=sized(3)),
        tensor(5),
        ("gate",),
    ),
    "selective kernels": (
        module(
            selective_kernels,
            a=nn.Conv2d(3, 4, 3, padding=1),
            b=nn.Conv2d(3, 4, 5, padding=2),
            expand=nn.Linear(4, 8),
            out=sized(3),
        ),
        tensor(3, 6, 6),
        (),
    ),
    "tokens that attention pools": (
        module(pooled_tokens, a=nn.Linear(5, 6), attention=nn.Linear(6, 1), out=sized(3)),
        tensor(4, 5),
        ("attention.bias",),
    ),
    "relative positions": (
        module(
            relative,
            q=nn.Linear(5, 6),
            k=nn.Linear(6, 6),
            v=nn.Linear(5, 6),
            norm=nn.LayerNorm(6),
            table=nn.Embedding(5, 6),
            out=sized(3),
        ),
        tensor(4, 5),
        (),
    ),
    "tokens that a mask replaces": (
        module(masked_tokens, a=nn.Linear(5, 6), token=nn.Embedding(1, 6), out=sized(3)),
        tensor(4, 5),
        (),
    ),
    "product of parameters": (
        module(low_rank, a=nn.Linear(5, 6), up=nn.Linear(2, 6), down=nn.Linear(5, 2), out=sized(3)),
        tensor(5),
        ("a.bias", "up.bias", "down.bias"),
    ),
    "gated convolutions": (
        module(gated, a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(4, 12, 1), out=nn.Linear(6, 3)),
        tensor(3, 9),
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_network_that_is_permuted_as_its_rules_say_computes_the_same(name):
    aten.register_all()
    network, example, still = CASES[name]
    torch.manual_seed(0)
    args, _ = example(2)
    network(*args)
    network = network.eval()
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point():
            value.add_(torch.rand(value.shape) / 2)
    found = captured(network, example)
    found = replace(found, graph=in_dtype(found.graph, torch.float64))
    given = [each.double() if each.is_floating_point() else each for each in found.tensors(Call.of_arguments(args, {}))]
    network = network.double()
    ctx, output = interpret(network, found.graph)
    permutations = Permutations(ctx, output)
    assert not permutations.clash()
    table = permutations.draw()
    before, moved = dict(network.state_dict()), copied(network)
    permutations.move_parameters(moved, table)
    expected = found.outputs.unflatten(output_of(found, network, given))
    got = found.outputs.unflatten(output_of(found, moved, given))
    want = permutations.move(expected, output[0], table)
    torch.testing.assert_close(got, want)
    alike = {key for key, value in moved.state_dict().items() if torch.equal(value, before[key]) and value.ndim}
    assert alike == {key for key in alike if key.startswith(still or ("-",))}


def interpret(network, graph):
    """Run the rules on a captured graph, which none of them may refuse."""
    shapes = {node.name: node.meta["shape"] for node in graph.nodes if isinstance(node.meta.get("shape"), tuple)}
    shapes = {name: shape for name, shape in shapes.items() if all(isinstance(size, int) for size in shape)}
    nodes = list(graph.nodes)
    ctx = Context(network, shapes)
    values = ctx.run(nodes, {}, tolerant=())
    return ctx, [value for value in leaves(values[nodes[-1]])]


def output_of(found, network, given):
    return list(torch.fx.Interpreter(network, graph=found.graph).run(*given))


def copied(network):
    memo = {
        id(value): value.clone() for module in network.modules() for value in vars(module).values() if is_plain(value)
    }
    return copy.deepcopy(network, memo)


def is_plain(value):
    """Whether a value is the weight that a hook of weight norm has computed, which cannot be copied."""
    return isinstance(value, torch.Tensor)


def test_an_index_of_features_is_a_barrier():
    aten.register_all()
    net = module(lambda self, x: self.codes(self.a(x).argmax(1)), a=nn.Linear(5, 6), codes=nn.Embedding(6, 4))
    found = captured(net, tensor(5))
    with pytest.raises(TraceError, match=r"argmax.*indices of features"):
        interpret(net, found.graph)


def test_states_of_two_layers_are_features_of_their_own():
    aten.register_all()
    net = module(lambda self, x: self.rnn(x)[1], rnn=nn.GRU(4, 6, 2, batch_first=True))
    ctx, (state,) = interpret(net, captured(net, tensor(5, 4)).graph)
    assert isinstance(state, Features) and state.axes == (0, 2)
    assert len(set(ctx.components()[state.ids].ravel().tolist())) == 12
