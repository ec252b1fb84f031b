"""A capture computes what the network does: any forward, any inputs and outputs, at sizes that it has not seen."""

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from helpers.capturing import UNSEEN, call, captured, check_replay, module, tensor, tokens
from torch import nn

from lightning_zipit.graph.functional_form import writes
from lightning_zipit.graph.replay import in_dtype
from lightning_zipit.graph.whole_modules import fold


def decides_on_sizes(self, x):
    batch, channels, *rest = x.shape
    if x.ndim == 4 and x.shape[2] > 3:
        x = self.conv(x)
    assert channels == 3, "three channels"
    return self.fc(x.reshape(batch, -1)) * len(rest)


def pads_by_difference(self, x):
    y = self.up(F.max_pool2d(x, 2))
    right, below = x.size(3) - y.size(3), x.size(2) - y.size(2)
    return self.conv(torch.cat([x, F.pad(y, [right // 2, right - right // 2, below // 2, below - below // 2])], 1))


def attends(self, x):
    q, k, v = self.qkv(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(y.transpose(1, 2).flatten(2))


def splits_patches(self, x):
    n, c, h, w = x.shape
    x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, (h // 4) * (w // 4), -1)
    return torch.einsum("bnd,ed->bne", x, self.fc.weight)


def writes_through_a_view(self, x):
    y = self.fc(x)
    y[:, 0] = 0
    y[:, 1:3].mul_(2)
    z = y.clone()
    z[z < 0] = 0.5
    return y + z.add_(1)


def writes_into_what_is_read_later(self, x):
    y = self.fc(x)
    flat = y.view(-1, 2)
    flat.relu_()
    first = F.dropout(y.flatten(1), 0.5, self.training, inplace=True)[:, :3]
    return first.add_(y[:, 3:]), y


def makes_tensors(self, x):
    places = torch.arange(x.shape[1])
    start = torch.zeros(x.size(0), 4)
    table = torch.tensor([[0.5, 1.0, 2.0, 3.0]])
    return self.fc(self.embed(places) + x * table + start.unsqueeze(1))


def masks_causally(self, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
    return self.encoder(self.embed(x), mask=mask)


def masks_padding(self, x):
    padding = x == 0
    y = self.encoder(self.embed(x), src_key_padding_mask=padding)
    return y.masked_fill(padding.unsqueeze(-1), 0).sum(1) / (~padding).sum(1, keepdim=True)


def starts_recurrence(self, x):
    start = torch.zeros(1, x.size(0), 5, device=x.device)
    y, (h, _) = self.rnn(x, (start, start))
    return self.fc(y[:, -1]) + self.fc(h[-1])


def steps_a_cell(self, x):
    h = x.new_zeros(len(x), 5)
    for step in x.unbind(1):
        h = self.cell(step, h)
    return self.fc(h)


def reads_attribute(self, x):
    return self.fc(x) * self.plain


def tied(self, x):
    return F.linear(self.embed(x), self.embed.weight)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def frozen_and_exact(self, x):
    with torch.no_grad():
        y = self.a(x).relu()
        with torch.autocast("cpu", enabled=False):
            y, z = y.float() * 2, y.softmax(1)
    return self.fc(y + z)


def powers_in_place(self, x):
    degrees = x.abs().sum(1)
    scale = degrees.pow_(-0.5)
    return self.fc(x * scale[:, None])


NETWORKS = {
    "blocks without gradients and autocast": (
        lambda: (module(frozen_and_exact, a=nn.Linear(4, 6), fc=nn.Linear(6, 3)), tensor(4))
    ),
    "powers in place": lambda: (module(powers_in_place, fc=nn.Linear(4, 3)), tensor(4)),
    "decisions on sizes": lambda: (
        module(decides_on_sizes, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(64, 5)),
        tensor(3, 6, 6),
    ),
    "any number of arguments": lambda: (
        module(lambda self, *xs, scale=1.0: self.fc(sum(xs) * scale), fc=nn.Linear(4, 3)),
        lambda n: ((torch.randn(n, 4), torch.randn(n, 4)), {}),
    ),
    "keywords of any name": lambda: (
        module(lambda self, **inputs: self.fc(inputs["x"]) + inputs["y"], fc=nn.Linear(4, 3)),
        lambda n: ((), {"x": torch.randn(n, 4), "y": torch.randn(n, 3)}),
    ),
    "paddings by differences": lambda: (
        module(pads_by_difference, up=nn.ConvTranspose2d(2, 3, 2, 2), conv=nn.Conv2d(5, 4, 3)),
        tensor(2, 9, 7),
    ),
    "unpacked chunks": lambda: (module(attends, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)), tensor(5, 8)),
    "rearranged patches": lambda: (module(splits_patches, fc=nn.Linear(48, 6)), tensor(3, 8, 8)),
    "writes through views": lambda: (module(writes_through_a_view, fc=nn.Linear(4, 6)), tensor(4)),
    "writes into what is read later": lambda: (
        module(writes_into_what_is_read_later, fc=nn.Linear(4, 6)),
        tensor(4),
    ),
    "tensors of the forward": lambda: (
        module(makes_tensors, embed=nn.Embedding(9, 4), fc=nn.Linear(4, 3)),
        tensor(5, 4),
    ),
    "causal mask": lambda: (module(masks_causally, embed=nn.Embedding(20, 8), encoder=encoder()), tokens),
    "padding mask": lambda: (
        module(masks_padding, embed=nn.Embedding(20, 8), encoder=encoder(norm_first=True)),
        tokens,
    ),
    "LSTM with a start": lambda: (
        module(starts_recurrence, rnn=nn.LSTM(4, 5, batch_first=True), fc=nn.Linear(5, 2)),
        tensor(6, 4),
    ),
    "GRU in both directions": lambda: (
        module(lambda self, x: self.rnn(x)[0], rnn=nn.GRU(4, 5, 2, batch_first=True, bidirectional=True)),
        tensor(6, 4),
    ),
    "projected LSTM": lambda: (
        module(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(4, 5, proj_size=2, batch_first=True)),
        tensor(6, 4),
    ),
    "cell": lambda: (module(steps_a_cell, cell=nn.GRUCell(4, 5), fc=nn.Linear(5, 2)), tensor(3, 4)),
    "plain attribute": lambda: (module(reads_attribute, fc=nn.Linear(4, 3), plain=torch.randn(3)), tensor(4)),
    "tied weights": lambda: (module(tied, embed=nn.Embedding(20, 8)), tokens),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU()),
        tensor(4),
    ),
    "spectral norm": lambda: (nn.utils.spectral_norm(nn.Linear(4, 5)), tensor(4)),
    "in place and dropout": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.5, True), nn.ReLU6(True)),
        tensor(3, 5, 5),
    ),
    "plain numbers of the batch": lambda: (
        module(lambda self, x: self.fc(x.reshape(len(x) * 2, -1)).view(int(x.shape[0]), -1), fc=nn.Linear(4, 3)),
        tensor(8),
    ),
    "rows that the data chooses": lambda: (
        module(lambda self, x: self.fc(x[x.sum(1) > 0]), fc=nn.Linear(4, 3)),
        tensor(4),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_graph_computes_what_the_network_does_at_another_batch_size(kind):
    torch.manual_seed(0)
    network, example = NETWORKS[kind]()
    before = copy.deepcopy(network.state_dict())
    found = check_replay(network.train(), example)
    assert not any(writes(node) for node in found.graph.nodes)
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", ["decisions on sizes", "padding mask", "LSTM with a start", "tensors of the forward"])
def test_a_graph_computes_the_same_in_float64(kind):
    torch.manual_seed(0)
    network, example = NETWORKS[kind]()
    network.eval()
    (x,), _ = call(example, UNSEEN)
    found = captured(network, example)
    with torch.no_grad():
        want = network(x)
        got = replace(found, graph=in_dtype(found.graph, torch.float64)).run(
            copy.deepcopy(network).double(), x.double() if x.is_floating_point() else x
        )
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want)


def test_einops_is_captured():
    einops = pytest.importorskip("einops.layers.torch")
    layers = einops.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 5)
    check_replay(nn.Sequential(*layers), tensor(3, 8, 8))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple
    name: str = "output"


Pair = namedtuple("Pair", "first second")

RETURNS = {
    "dict": lambda y: {"a": y, "b": [y + 1, None]},
    "dataclass": lambda y: Output(y, (y * 2, y)),
    "named tuple": lambda y: Pair(y, y.sum(1)),
    "mapping": lambda y: UserDict(x=y),
    "distribution": lambda y: torch.distributions.Normal(y, y.exp()),
    "several": lambda y: (y, y.shape[1], "text"),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_outputs_keep_their_structure(kind):
    network = module(lambda self, x: RETURNS[kind](self.fc(x)), fc=nn.Linear(4, 3))
    check_replay(network, tensor(4))


def test_inputs_can_be_nested():
    network = module(lambda self, batch, k: self.fc(batch["x"][0] + batch["x"][1]) * k, fc=nn.Linear(4, 3))
    check_replay(network, lambda n: ((), {"batch": {"x": [torch.randn(n, 4), torch.randn(n, 4)]}, "k": 2}))


def test_parameters_are_read_by_every_name_that_they_have():
    network = module(
        lambda self, x: self.out(self.embed(x)), embed=nn.Embedding(20, 8), out=nn.Linear(8, 20, bias=False)
    )
    network.out.weight = network.embed.weight
    found = check_replay(network, tokens)
    assert {node.target for node in found.graph.nodes if node.op == "get_attr"} == {"embed.weight", "out.weight"}


def test_nodes_know_their_modules_their_line_and_their_shape():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = captured(nn.Sequential(block, nn.Flatten()), tensor(3, 5, 5))
    relu = next(node for node in found.graph.nodes if node.target is torch.ops.aten.relu.default)
    assert list(relu.meta["nn_module_stack"]) == ["", "0", "0.1"]
    assert relu.meta["shape"] == (3, 4, 3, 3) and relu.meta["dtype"] is torch.float32
    assert "in forward" in relu.meta["stack_trace"]


def test_devices_of_the_example_are_not_written_down():
    network, example = NETWORKS["tensors of the forward"]()
    found = captured(network, example)
    written = [value for node in found.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert not any(isinstance(value, torch.device) for value in written)


def test_lengths_stay_free_where_the_forward_leaves_them():
    network, _ = NETWORKS["causal mask"]()
    found = check_replay(network, tokens)
    x = tokens(4, length=9)[0][0]
    torch.testing.assert_close(found.run(network.eval(), x), network(x))


def test_a_batch_of_one_sample_can_be_run():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    x = torch.randn(1, 4)
    assert torch.equal(captured(network, tensor(4)).run(network, x), network(x))


def test_calls_of_modules_are_put_back():
    parts = {"a": nn.Linear(4, 4), "act": nn.ReLU(True), "norm": nn.BatchNorm1d(4), "drop": nn.Dropout(0.5)}
    network = module(lambda self, x: self.drop(self.norm(self.act(self.a(self.act(self.a(x)))).flatten(1))), **parts)
    found = captured(network, tensor(4))
    fold(found.graph, network, lambda each: not list(each.children()))
    called = [node.target for node in found.graph.nodes if node.op == "call_module"]
    assert called == ["a", "act", "a", "act", "norm", "drop"]
    x = torch.randn(UNSEEN, 4)
    torch.testing.assert_close(found.run(network.eval(), x), network(x))


class Gate(nn.Module):
    """Several tensors and a number, some of which it does not use."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x, gate, power=1.0, *, mask=None, more=()):
        y = x * torch.sigmoid(gate) ** power * self.scale
        return y if mask is None else y * mask.unsqueeze(-1)


def test_calls_of_modules_of_several_arguments_are_put_back():
    def forward(self, x, mask):
        y = self.gate(self.fc(x), x, 2.0, mask=mask)
        y = self.gate(gate=y.detach(), x=x, more=[mask, {"x": y}])
        return self.gate(y, self.table)

    network = module(forward, fc=nn.Linear(4, 4), gate=Gate(), table=nn.Parameter(torch.rand(4)))
    found = captured(network, lambda n: ((torch.randn(n, 4), torch.rand(n)), {}))
    assert set(found.calls) == {"gate", "gate@1", "gate@2"}
    fold(found.graph, network, lambda each: not list(each.children()), found.calls)
    calls = [node for node in found.graph.nodes if node.op == "call_module" and node.target == "gate"]
    assert [len(call.args) for call in calls] == [3, 0, 2] and "aten" not in str(found.graph)
    x, mask = torch.randn(UNSEEN, 4), torch.rand(UNSEEN)
    with torch.no_grad():
        torch.testing.assert_close(found.run(network.eval(), x, mask), network(x, mask))


def test_modules_that_return_tuples_stay_open():
    network = module(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(4, 5, batch_first=True))
    found = captured(network, tensor(3, 4))
    fold(found.graph, network, lambda each: not list(each.children()))
    assert not any(node.op == "call_module" for node in found.graph.nodes)
    x = torch.randn(UNSEEN, 3, 4)
    torch.testing.assert_close(found.run(network.eval(), x), network(x))


def test_a_decision_on_constants_is_none():
    network, example = NETWORKS["causal mask"]()
    assert not captured(network, example).decisions
