"""Parts of a network: modules under any name, and all that a module can do."""

import copy
import inspect
import pickle
from dataclasses import dataclass

import pytest
import torch
from helpers.nets import Wrap, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import MultiHeadModule, ZipIt, export_merged
from lightning_zipit._merging.rebuild import build_head, build_trunk
from lightning_zipit.graph import trace

NAMES = ("code", "graph", "meta", "recompile", "print_readable", "captured", "barriers")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """Layers that have the names of attributes of ``torch.fx.GraphModule``, in a trunk and in a head."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        for name in NAMES:
            x = getattr(self, name)(x)
        return self.last(x)


@pytest.fixture(scope="module")
def merged():
    torch.manual_seed(0)
    models = {"a": Wrap(Named()), "b": Wrap(Named())}
    return ZipIt(trainer()).merge(models, DataLoader(X, 4), backbone="net", stop_at="recompile", refine=None)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    network = Named().eval()
    graph = trace(network, "recompile", example_input=X)
    return network, build_trunk(graph), build_head(graph)


@torch.no_grad()
def test_parts_compute_the_network_with_its_modules_under_their_names(parts):
    network, trunk, head = parts
    assert torch.equal(head(*trunk(X)), network(X))
    assert {**dict(trunk.named_parameters()), **dict(head.named_parameters())}.keys() == network.state_dict().keys()
    assert (type(trunk).__name__, type(head).__name__) == ("Trunk", "Head")
    assert list(inspect.signature(trunk.forward).parameters) == ["x"]


def pickled(part):
    return pickle.loads(pickle.dumps(part))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
@torch.no_grad()
def test_copies_compute_the_same_and_can_be_changed(parts, copied):
    _, trunk, _ = parts
    twin = copied(trunk.train())
    assert twin.training and type(twin).__name__ == "Trunk" and torch.equal(twin(X)[0], trunk(X)[0])
    twin.eval()
    assert trunk.training
    with torch.no_grad():
        deep = copied is not copy.copy
        next(twin.parameters()).add_(deep)
        assert torch.equal(twin(X)[0], trunk(X)[0]) != deep


def test_a_part_is_freed_without_the_garbage_collector(parts):
    import gc
    import weakref

    twin = copy.deepcopy(parts[1])
    reference = weakref.ref(twin)
    gc.disable()
    try:
        del twin
        assert reference() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_merged_module_of_such_networks_is_whole(merged, tmp_path):
    run = trainer()
    run.strategy.connect(merged)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(
        tmp_path / "merged.ckpt", models={"a": Wrap(Named()), "b": Wrap(Named())}
    )
    export_merged(merged, tmp_path / "merged.pt2")
    exported = torch.export.load(tmp_path / "merged.pt2").module()
    for other in (loaded, copy.deepcopy(merged), pickle.loads(pickle.dumps(merged)), exported):
        torch.testing.assert_close(other(X), merged(X))


@torch.no_grad()
def test_it_can_be_split_and_merged_again(merged):
    network = merged.split()["a"].net
    torch.testing.assert_close(network(X), merged(X, task="a"))
    again = ZipIt(trainer()).merge(
        {"one": merged, "two": Wrap(Named())}, DataLoader(X, 4), backbone="net", stop_at="recompile", refine=None
    )
    assert set(again(X)) == {"a", "b", "two"}


def test_torch_compiles_a_part(parts):
    _, trunk, _ = parts
    compiled = torch.compile(trunk, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), trunk(X))


def test_a_traceback_shows_the_line_of_a_part(parts):
    import traceback

    try:
        parts[1](torch.zeros(4, 5))
    except RuntimeError as error:
        assert "self.code" in "".join(traceback.format_exception(error))


@dataclass
class Output:
    logits: torch.Tensor


class OwnNames(nn.Module):
    """Modules that have the names of those that parts of a merged network get."""

    def __init__(self):
        super().__init__()
        self.merge, self.unmerge, self.returned = (nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.merge(x).relu()
        x = x + self.unmerge(x).relu()
        return Output(self.last(x + self.returned(x).relu()))


@torch.no_grad()
@pytest.mark.parametrize(("start_at", "stop_at"), [(None, "merge"), (None, "unmerge"), ("unmerge", None)])
def test_modules_may_have_the_names_of_merges_and_unmerges(start_at, stop_at):
    torch.manual_seed(0)
    models = [Wrap(network := OwnNames()), Wrap(copy.deepcopy(network))]
    options = {"backbone": "net", "start_at": start_at, "stop_at": stop_at, "refine": None}
    merged = ZipIt(trainer()).merge(models, DataLoader(X, 4), **options)
    expected = network.eval()(X).logits
    torch.testing.assert_close(merged(X, task="task_1").logits, expected)
    if start_at is None:
        torch.testing.assert_close(merged.split()["task_1"].net(X).logits, expected)
        again = ZipIt(trainer()).merge({"one": merged, "two": models[0]}, DataLoader(X, 4), **options)
        torch.testing.assert_close(again(X, task="task_1").logits, expected)
