"""Tied tensors: every name has a row, and a tensor with two roles is untied."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.errors import ArchitectureMismatchError

REFINEMENTS = (None, "batch_norm", "repair", "least_squares")


def rows(module, order):
    module.weight.copy_(module.weight[order].clone())
    if module.bias is not None:
        module.bias.copy_(module.bias[order].clone())


def columns(module, order):
    module.weight.copy_(module.weight[:, order].clone())


def assert_merges_exactly(net, other, x, refine, **settings):
    """Check that two permuted copies of one function merge exactly."""
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-5)
    merged = merge_backbones({"a": net, "b": other}, [x], MergeSettings(refine=refine, **settings))
    for head in merged.heads.values():
        torch.testing.assert_close(head(*merged.trunk(x)), net(x), rtol=1e-3, atol=1e-3 * float(net(x).abs().max()))
    return merged


class LanguageModel(nn.Module):
    """An embedding that is tied to the output layer."""

    def __init__(self, output_first=False, vocabulary=20, dim=12):
        super().__init__()
        if output_first:
            self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.tok, self.norm = nn.Embedding(vocabulary, dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 16), nn.Linear(16, dim)
        if not output_first:
            self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.tok.weight

    def forward(self, ids):
        x = self.tok(ids)
        return self.lm_head(self.norm(x + self.fc2(F.gelu(self.fc1(x)))))


class Functional(LanguageModel):
    """Like `LanguageModel`, but the output layer is `F.linear` with the weight of the embedding."""

    def forward(self, ids):
        x = self.tok(ids)
        return F.linear(self.norm(x + self.fc2(F.gelu(self.fc1(x)))), self.tok.weight)


class Product(LanguageModel):
    """Like `LanguageModel`, but the output layer is a product with the transposed weight."""

    def forward(self, ids):
        x = self.tok(ids)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x)))) @ self.tok.weight.t()


@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize(
    "make",
    [LanguageModel, lambda: LanguageModel(output_first=True), Functional, Product],
    ids=["module", "first", "F", "@"],
)
@torch.no_grad()
def test_an_embedding_tied_to_the_output_merges_exactly(make, refine):
    net = make().eval()
    net.norm.weight.add_(torch.rand(12)), net.norm.bias.add_(torch.rand(12))
    other, order = copy.deepcopy(net), torch.randperm(12)
    columns(other.tok, order), columns(other.fc1, order), rows(other.fc2, order), rows(other.norm, order)
    assert_merges_exactly(net, other, torch.randint(0, 20, (48, 9)), refine)


def test_every_name_of_a_tied_tensor_has_its_row():
    net = LanguageModel()
    graph = trace(net, example_input=torch.zeros(2, 9, dtype=torch.int64))
    assert set(graph.axes) == {name for name, _ in net.named_parameters(remove_duplicate=False)}
    assert str(graph.axes["tok.weight"][1]) == "→ tok" and str(graph.axes["lm_head.weight"][1]) == "← tok"


class Tied(nn.Module):
    """Two tied layers whose call order differs from their definition order."""

    def __init__(self):
        super().__init__()
        self.first, self.b, self.a = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.a.weight, self.a.bias = self.b.weight, self.b.bias

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize("stop_at", [None, "a"])
@torch.no_grad()
def test_two_tied_layers_merge_exactly_in_any_order(refine, stop_at):
    net, order = Tied(), torch.randperm(8)
    other = copy.deepcopy(net)
    rows(other.first, order), rows(other.b, order), columns(other.b, order), columns(other.last, order)
    merged = assert_merges_exactly(net, other, torch.randn(128, 6), refine, stop_at=stop_at)
    if stop_at is None and refine is None:
        assert merged.trunk.a.weight is merged.trunk.b.weight


class TiedAutoencoder(nn.Module):
    """A decoder that uses the transposed weight of the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.mid, self.shift = nn.Linear(6, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.linear(self.mid(self.encoder(x).tanh()).tanh(), self.encoder.weight.t(), self.shift)


@pytest.mark.parametrize("refine", REFINEMENTS)
@torch.no_grad()
def test_a_decoder_that_uses_the_encoders_weight_merges_exactly(refine):
    net, order = TiedAutoencoder(), torch.randperm(8)
    other = copy.deepcopy(net)
    rows(other.encoder, order), columns(other.mid, order)
    rows(other.mid, order)  # what the decoder reads is in the order of the encoder's rows
    assert_merges_exactly(net, other, torch.randn(128, 6), refine)


class TwoRoles(nn.Module):
    """A layer of the trunk that uses the transposed weight of another layer."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.mid, self.last = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.up(self.first(x).relu()).relu()
        return self.last(self.mid(F.linear(x, self.up.weight.t()).relu()).relu())


@torch.no_grad()
def test_a_tensor_with_two_roles_in_the_trunk_ends_it_and_merges_exactly():
    net = TwoRoles()
    graph = trace(net, verify=torch.randn(4, 5))
    assert any("another role" in why for why in graph.barriers.values())
    other, first, up = copy.deepcopy(net), torch.randperm(6), torch.randperm(8)
    rows(other.first, first), columns(other.up, first), rows(other.up, up), columns(other.mid, first)
    assert_merges_exactly(net, other, torch.randn(64, 5), None)


def test_sources_that_are_tied_in_other_ways_are_refused():
    untied = Tied()
    untied.a = nn.Linear(8, 8)
    with pytest.raises(ArchitectureMismatchError, match=r"`a.weight` is tied to .* in the first and not tied"):
        merge_backbones({"a": Tied(), "b": untied}, [torch.randn(16, 6)], MergeSettings(refine=None))
