"""A capture computes what the network does: any forward, any inputs and outputs, at sizes that it has not seen."""

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit.errors import CalibrationError, TraceError
from lightning_zipit.graph.capture import capture
from lightning_zipit.graph.functional_form import writes
from lightning_zipit.graph.structure import UnknownContainerError, flatten
from lightning_zipit.graph.whole_modules import fold

UNSEEN = 7


def call(example, samples):
    """Positional and keyword arguments of an example of another number of samples, with new numbers."""
    torch.manual_seed(samples)
    args, kwargs = example(samples)
    return args, kwargs


def captured(network, example):
    args, kwargs = call(example, 2)
    return capture(network, kwargs if kwargs else args)


def check_replay(network, example, samples=UNSEEN):
    """Capture a network and compare the graph with it on a batch of another size."""
    torch.manual_seed(0)
    found = captured(network, example)
    args, kwargs = call(example, samples)
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        want = network(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        torch.manual_seed(0)
        got = found.run(network, *args, **kwargs)
    (one, structure), (two, expected) = flatten(got), flatten(want)
    assert structure == expected and type(got) is type(want)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    return found


def tensor(*shape):
    return lambda n: ((torch.randn(n, *shape),), {})


def tokens(n, length=6):
    return (torch.randint(0, 20, (n, length)),), {}


def module(forward, **parts):
    """A module of some parts with a forward."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Module.forward = forward
    return Module()


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


NETWORKS = {
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
    "noise": lambda: (module(lambda self, x: self.fc(x) + torch.randn(3), fc=nn.Linear(4, 3)), tensor(4)),
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
        got = found.in_dtype(torch.float64).run(
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


class Cache:
    def __init__(self, keys):
        self.keys = keys


def test_a_cache_in_the_output_is_refused_with_the_way_out():
    network = module(lambda self, x: {"logits": self.fc(x), "cache": Cache(self.fc(x))}, fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"returns a Cache \(output\['cache'\]\)[\s\S]*use_cache"):
        captured(network, tensor(4))
    with pytest.raises(UnknownContainerError):
        flatten(object())


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


def test_sizes_that_the_forward_decides_by_are_refused():
    network = module(lambda self, x: self.fc(x).relu() if x.shape[1] > 4 else self.fc(x), fc=nn.Linear(3, 3)).eval()
    found = captured(network, tensor(6, 3))
    long, short = torch.randn(2, 9, 3), torch.randn(2, 4, 3)
    assert torch.equal(found.run(network, long), network(long))
    with pytest.raises(TraceError, match="condition"):
        found.run(network, short)
    with pytest.raises(TraceError, match="condition"):
        found.check(network, short)


def test_a_fixed_size_is_refused_by_name():
    network = module(lambda self, x: F.max_pool1d(self.fc(x), x.size(1)), fc=nn.Linear(8, 8)).eval()
    with pytest.raises(TraceError, match=r"fixed|shape \(2, 5, 8\)"):
        captured(network, tensor(4, 8)).run(network, torch.randn(2, 5, 8))


def test_other_arguments_are_refused():
    network = nn.Linear(4, 3)
    with pytest.raises(TraceError, match="other arguments"):
        captured(network, tensor(4)).run(network, input=torch.randn(2, 4))


def decides_by_data(self, x):
    return self.fc(x) if (x.abs() < 100).all() else self.fc(x) * 2


def test_a_decision_on_data_is_reported_with_its_line():
    (decision,) = captured(module(decides_by_data, fc=nn.Linear(4, 3)), tensor(4)).decisions
    assert decision.value is True and decision.line.startswith(f"{__file__}:")


def test_a_decision_on_constants_is_none():
    network, example = NETWORKS["causal mask"]()
    assert not captured(network, example).decisions


def test_a_decision_that_changes_with_the_batch_is_refused():
    network = module(lambda self, x: self.fc(x) * (2 if x.sum() > 8.5 else 1), fc=nn.Linear(2, 3))
    with pytest.raises(TraceError, match=r"decides by its data: .*test_capture\.py:\d+"):
        capture(network, torch.ones(2, 2))


def test_a_number_read_from_data_is_refused_with_its_line():
    network = module(lambda self, x: self.fc(x)[:, : int(x.argmax()) % 2 + 1], fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"reads from tensors that depend on the input: .*test_capture\.py:\d+"):
        capture(network, torch.eye(4)[:1])


def test_what_cannot_be_followed_is_refused_with_module_line_and_way_out():
    def forward(self, x):
        if torch.compiler.is_exporting():
            raise NotImplementedError("not for export")
        return x

    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(module(forward)), nn.Linear(4, 2))
    with pytest.raises(TraceError, match=r"`1\.0` \(Module\) at .*test_capture\.py:\d+, in forward") as error:
        capture(network, torch.rand(2, 4))
    assert "such as `0` or `2`" in str(error.value)


def test_a_size_that_data_decides_is_refused_with_its_line_and_without_noise(capfd):
    network = module(lambda self, x: self.fc(x)[: len(x[x > 0]) % 2 + 1], fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"test_capture\.py:\d+"):
        capture(network, torch.eye(4)[:1])
    assert capfd.readouterr() == ("", "")


def test_a_loop_over_samples_is_refused():
    network = module(lambda self, x: torch.stack([self.fc(row) for row in x]), fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match="loop over samples"):
        capture(network, torch.rand(2, 4))


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(CalibrationError, match=r"Linear cannot take an input of shape \(3, 7\)"):
        capture(nn.Linear(4, 3), torch.randn(2, 7))


def test_a_forward_that_counts_its_calls_is_refused():
    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls

    network = module(forward, fc=nn.Linear(4, 3))
    network.calls = 0
    check_replay(network, tensor(4))  # each run is the first of a copy
    assert network.calls == 0


def test_calls_of_modules_are_put_back():
    parts = {"a": nn.Linear(4, 4), "act": nn.ReLU(True), "norm": nn.BatchNorm1d(4), "drop": nn.Dropout(0.5)}
    network = module(lambda self, x: self.drop(self.norm(self.act(self.a(self.act(self.a(x)))).flatten(1))), **parts)
    found = captured(network, tensor(4))
    fold(found.graph, network, lambda each: not list(each.children()))
    called = [node.target for node in found.graph.nodes if node.op == "call_module"]
    assert called == ["a", "act", "a", "act", "norm", "drop"]
    x = torch.randn(UNSEEN, 4)
    torch.testing.assert_close(found.run(network.eval(), x), network(x))


def test_modules_that_return_tuples_stay_open():
    network = module(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(4, 5, batch_first=True))
    found = captured(network, tensor(3, 4))
    fold(found.graph, network, lambda each: not list(each.children()))
    assert not any(node.op == "call_module" for node in found.graph.nodes)
    x = torch.randn(UNSEEN, 3, 4)
    torch.testing.assert_close(found.run(network.eval(), x), network(x))
