"""Backbones of any number of inputs, nested in any way, and of outputs of any type."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn

from lightning_zipit import Ensemble, MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.samples import describe_inputs, inputs_of
from lightning_zipit._lightning.export import export_merged
from lightning_zipit._lightning.loaders import Batches
from lightning_zipit.errors import ConfigurationError, TraceError


@dataclass
class Scores:
    logits: torch.Tensor
    features: torch.Tensor
    loss: torch.Tensor | None = None


class Reader(nn.Module):
    """Token ids, a mask of padding, and floats; returns a dataclass."""

    def __init__(self, classes=3):
        super().__init__()
        self.embed, self.numbers = nn.Embedding(20, 8), nn.Linear(4, 8)
        self.a, self.b, self.fc = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, classes)

    def forward(self, ids, mask=None, *, numbers=None, scale: float = 1.0):
        mask = torch.ones_like(ids) if mask is None else mask
        x = self.embed(ids) * mask.unsqueeze(-1)
        x = x.sum(1) / mask.sum(1, keepdim=True)
        if numbers is not None:
            x = x + self.numbers(numbers)
        x = x + self.b(self.a(x).relu()) * scale
        return Scores(self.fc(x), x)


def batch(samples=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (samples, 6), generator=g)
    mask = (torch.arange(6) < torch.randint(2, 7, (samples, 1), generator=g)).long()
    return ids, mask, torch.randn(samples, 4, generator=g)


def reordered(net):
    """The same function, with the hidden features in another order."""
    other, order = copy.deepcopy(net), torch.tensor([5, 0, 3, 1, 4, 2, 7, 6, 11, 8, 10, 9])
    with torch.no_grad():
        other.a.weight.copy_(net.a.weight[order]), other.a.bias.copy_(net.a.bias[order])
        other.b.weight.copy_(net.b.weight[:, order])
    return other


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Reader()

    def validation_step(self, batch, batch_idx):
        found = self.net(batch["ids"], batch["mask"], numbers=batch["numbers"] / 2)
        self.log("size", found.features.abs().mean())


@pytest.fixture(scope="module")
def lit():
    torch.manual_seed(0)
    return Lit().eval()


@pytest.fixture(scope="module")
def merged(lit):
    other = copy.deepcopy(lit)
    other.net = reordered(lit.net)
    keys = ("ids", "mask", "numbers")
    batches = [dict(zip(keys, batch(seed=seed), strict=True)) for seed in range(2)]
    return ZipIt(trainer()).merge({"a": lit, "b": other}, Batches(batches), backbone="net", refine=None)


@torch.no_grad()
def test_arguments_of_the_step_reach_the_backbone_and_its_output_keeps_its_type(lit, merged):
    ids, mask, numbers = batch(5, seed=9)
    wanted = lit.net(ids, mask, numbers=numbers)
    for task, found in merged(ids, mask, numbers=numbers).items():
        assert type(found) is Scores and found.loss is None, task
        torch.testing.assert_close(found.logits, wanted.logits)
        torch.testing.assert_close(found.features, wanted.features)
    (result, _) = trainer().validate(
        merged, [Batches([{"ids": ids, "mask": mask, "numbers": numbers}])] * 2, verbose=False
    )
    size = lit.net(ids, mask, numbers=numbers / 2).features.abs().mean()
    assert result["a/size"] == pytest.approx(float(size), rel=1e-4)


@torch.no_grad()
def test_a_merge_of_several_inputs_is_saved_and_exported(merged, tmp_path):
    run = trainer()
    run.strategy.connect(merged)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    read = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models={"a": Lit(), "b": Lit()})
    ids, mask, numbers = batch(3, seed=4)
    first, second = merged(ids, mask, numbers=numbers), read(ids, mask, numbers=numbers)
    assert torch.equal(first["b"].logits, second["b"].logits)
    args, kwargs = read.example.arguments
    assert [tuple(each.shape) for each in args] == [(1, 6), (1, 6)] and list(kwargs) == ["numbers"]


def test_other_arguments_than_captured_are_refused(merged):
    ids, mask, numbers = batch(4)
    with pytest.raises(ConfigurationError, match="captured for other arguments"):
        merged(ids, mask, numbers=numbers, scale=2.0)


@torch.no_grad()
def test_calls_that_mean_the_same_are_the_same(lit, merged):
    ids, mask, numbers = batch(4)
    wanted = lit.net(ids, mask, numbers=numbers).logits
    given = {"numbers": numbers, "mask": mask, "ids": ids}
    split = merged.split()["a"].net
    for network in (merged, copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        for found in (
            network(ids, task="a", mask=mask, numbers=numbers),
            network(**given, task="a"),
            network(ids, mask, numbers=numbers, scale=1.0)["b"],
            network({"a": {**given, "scale": 1.0}})["a"],
        ):
            torch.testing.assert_close(found.logits, wanted)
    torch.testing.assert_close(split(**given).logits, wanted)
    ones = torch.ones_like(ids)
    own = Ensemble({"a": lit}, backbone="net")
    torch.testing.assert_close(own(mask=ones, ids=ids, scale=2.0)["a"].logits, lit.net(ids, scale=2.0).logits)


class OtherOrder(Lit):
    def validation_step(self, batch, batch_idx):
        found = self.net(scale=1.0, numbers=batch["numbers"] / 2, mask=batch["mask"], ids=batch["ids"])
        self.log("size", found.features.abs().mean())


@torch.no_grad()
def test_sources_may_call_their_backbones_in_other_ways(lit):
    other = OtherOrder().eval()
    other.net = reordered(lit.net)
    data = Batches([dict(zip(("ids", "mask", "numbers"), batch(seed=seed), strict=True)) for seed in range(2)])
    merged = ZipIt(trainer()).merge({"a": lit, "b": other}, data, backbone="net", refine=None)
    ids, mask, numbers = batch(5, seed=9)
    assert isinstance(merged.example, Call)
    for found in merged(numbers=numbers, ids=ids, mask=mask).values():
        torch.testing.assert_close(found.logits, lit.net(ids, mask, numbers=numbers).logits)
    results = trainer().validate(merged, [data, data], verbose=False)
    assert results[0]["a/size"] == pytest.approx(results[1]["b/size"], rel=1e-4)


def takes_all(self, x, /, y, z=None, *more, scale=1.0, **other):
    return None


@pytest.mark.parametrize(
    ("args", "kwargs", "positional", "keywords"),
    [
        ((1, 2), {"z": None, "scale": 1.0}, (1, 2), {}),
        ((1,), {"scale": 2.0, "y": 2}, (1, 2), {"scale": 2.0}),
        ((1, 2, None, 4), {}, (1, 2, None, 4), {}),
        ((1, 2, 3), {"last": 5, "scale": 1, "own": 6}, (1, 2, 3), {"scale": 1, "last": 5, "own": 6}),
        ((1, 2), {"y": 3}, (1, 2), {"y": 3}),
    ],
)
def test_calls_are_written_in_one_way(args, kwargs, positional, keywords):
    def with_tensors(value):
        return torch.full((2,), float(value)) if type(value) is int and value > 1 else value

    arguments = Arguments.of(type("Network", (nn.Module,), {"forward": takes_all})())
    given = Call.of_arguments(tuple(map(with_tensors, args)), {key: with_tensors(x) for key, x in kwargs.items()})
    wanted = Call.of_arguments(
        tuple(map(with_tensors, positional)), {key: with_tensors(x) for key, x in keywords.items()}
    )
    bound = arguments.bind(given)
    assert bound.structure == wanted.structure and arguments.bind(bound).structure == bound.structure
    assert all(map(torch.equal, bound.tensors, wanted.tensors))


def test_keywords_alone_are_a_dict(lit):
    ids, mask, numbers = batch(4)
    graph = trace(lit.net, example_input={"ids": ids, "mask": mask, "numbers": numbers})
    assert "a" in graph.spaces and not graph.barriers
    with pytest.raises(TraceError, match="captured for other arguments"):
        graph.captured.tensors(Call.of(ids))


def test_one_sample_of_any_arguments_is_described_in_a_file():
    ids, mask, numbers = batch(4)
    call = Call.of_arguments((ids, [mask, {"x": None, "y": 2.5}]), {"numbers": numbers, "table": torch.rand(7, 2)})
    made = inputs_of(describe_inputs(call))
    assert made.structure == call.structure and made.batched == call.batched == (True, True, True, False)
    assert [tuple(each.shape) for each in made.tensors] == [(1, 6), (1, 6), (1, 4), (7, 2)]
    assert made.tensors[1].min() == 1 and made.tensors[0].dtype == torch.int64
    assert describe_inputs(Call.of_arguments((Scores(ids, mask),), {})) is None


class Pyramid(nn.Module):
    """Two depths of features, and no classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x).relu()
        fine = x + self.first(x).relu()
        return {"fine": fine, "coarse": nn.functional.avg_pool2d(fine + self.second(fine).relu(), 2)}


@torch.no_grad()
def test_a_backbone_without_a_classifier_is_shared_whole():
    net = Pyramid()
    other, order = copy.deepcopy(net), torch.randperm(8)
    other.stem.weight.copy_(net.stem.weight[order]), other.stem.bias.copy_(net.stem.bias[order])
    for layer in ("first", "second"):
        mine, own = getattr(net, layer), getattr(other, layer)
        own.weight.copy_(mine.weight[order][:, order]), own.bias.copy_(mine.bias[order])
    x = torch.randn(32, 3, 8, 8)
    merged = merge_backbones({"a": net, "b": other}, x.split(16), MergeSettings(refine=None))
    assert not any(True for head in merged.heads.values() for _ in head.parameters())
    for task, source in (("a", net), ("b", other)):
        found, wanted = merged.heads[task](*merged.trunk(x)), source(x)
        assert list(found) == ["fine", "coarse"]
        torch.testing.assert_close(found["fine"], wanted["fine"])
        torch.testing.assert_close(found["coarse"], wanted["coarse"])


@pytest.mark.parametrize("named", [(), ("y",), ("x", "y")])
def test_several_inputs_are_exported(named, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return self.fc((self.a(x) + self.b(y)).relu())

    class Both(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def test_step(self, batch, batch_idx):
            given = dict(zip("xy", batch, strict=True))
            keywords = {name: given.pop(name) for name in named}
            return self.net(*given.values(), **keywords)

    data = [(torch.randn(8, 4), torch.randn(8, 5))]
    found = ZipIt(trainer()).merge({"a": Both(), "b": Both()}, Batches(data), backbone="net", refine=None)
    export_merged(found, tmp_path / "merged.pt2")
    run = torch.export.load(tmp_path / "merged.pt2").module()
    x, y = torch.randn(3, 4), torch.randn(3, 5)
    with torch.no_grad():
        torch.testing.assert_close(run(x, y)["b"], found(x, y, task="b"))
