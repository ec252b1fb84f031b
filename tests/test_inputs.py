"""Backbones of any number of inputs, nested in any way, and of outputs of any type."""

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn

from lightning_zipit import MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
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
        merged(ids, task="a", mask=mask, numbers=numbers)
    with pytest.raises(ConfigurationError, match="captured for other arguments"):
        merged(ids, mask, numbers=numbers, scale=2.0)


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


def test_a_submodule_with_a_name_that_graph_modules_use_is_refused():
    net = nn.Module()
    net.code, net.forward = nn.Linear(3, 4), lambda x: x
    with pytest.raises(ConfigurationError, match=r"submodule named `code`.*Rename"):
        trace(net, example_input=torch.randn(2, 3))


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
