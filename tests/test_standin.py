"""What the code of a source finds in place of its backbone."""

import copy
import pickle

import pytest
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_zipit import Ensemble, ZipIt
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
DATA = DataLoader(X, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_classes = 3
        self.task = "detect"
        self.embed = False
        self.encoder = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def features(self, x):
        return self.encoder(x)

    def forward(self, x):
        features = self.features(x)
        return features if self.embed else self.fc(features)


class Lit(LightningModule):
    """Keeps everything that its step can see of its network."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.seen = {}

    def forward(self, x):
        return self.net(x)

    def look(self, x):
        raise NotImplementedError

    def predict_step(self, batch, batch_idx):
        return self.look(batch)


def merge_with_copy(module, backbone="net", twin=None, **options):
    """The merge of a network with its copy is the network itself: what parts of it compute is known."""
    options = {"refine": None, "matcher": Average()} | options
    twin = copy.deepcopy(module) if twin is None else twin
    twin.load_state_dict(module.state_dict())
    return ZipIt(trainer()).merge({"a": module, "b": twin}, DATA, backbone=backbone, **options)


def predict(module, tasks="ab"):
    if not hasattr(module, "tasks"):
        return torch.cat(trainer().predict(module, DATA))
    return [torch.cat(each) for each in trainer().predict(module, dict.fromkeys(tasks, DATA))]


LOOKS = {
    "the backbone": lambda self, x: self.net(x),
    "an attribute": lambda self, x: self.net(x)[:, : self.net.num_classes - 1],
    "an attribute that the library has too": lambda self, x: x * len(self.net.task),
    "a method": lambda self, x: self.net.features(x),
    "its parts": lambda self, x: self.net.fc(self.net.encoder(x)),
    "a layer": lambda self, x: self.net.encoder[0](x),
    "its parameters": lambda self, x: sum(p.square().sum() for p in self.net.parameters()).expand(len(x)),
    "its named parameters": lambda self, x: x.new_tensor([[p.sum() for _, p in self.net.named_parameters()]] * len(x)),
    "its modules": lambda self, x: x.new_tensor([[isinstance(m, nn.Linear) for m in self.modules()].count(True)] * 24),
    "its state": lambda self, x: torch.stack([t.sum() for t in self.net.state_dict().values()]).expand(len(x), 6),
    "a copy": lambda self, x: copy.deepcopy(self.net)(x),
    "a function of it": lambda self, x: torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,)),
    "a weight": lambda self, x: x @ self.net.encoder[0].weight.T,
}


@pytest.fixture(scope="module")
def trio():
    torch.manual_seed(0)
    module = Lit()
    return module, merge_with_copy(module), Ensemble({"a": module, "b": copy.deepcopy(module)}, backbone="net")


@pytest.mark.parametrize("what", LOOKS)
def test_a_step_sees_the_backbone_as_before(trio, what, monkeypatch):
    monkeypatch.setattr(Lit, "look", LOOKS[what])
    expected, *merged = [predict(each) for each in trio]
    for found in merged:
        assert all(torch.allclose(one, expected, atol=1e-5) for one in found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_stand_ins_for_themselves(trio, copied, monkeypatch):
    monkeypatch.setattr(Lit, "look", LOOKS["a method"])
    twin = copied(trio[1])
    with torch.no_grad():
        twin.trunk.get_parameter("encoder.0.weight").zero_()
        twin.trunk.get_parameter("encoder.0.bias").zero_()
    changed = predict(twin)[0]
    assert torch.allclose(changed, changed[:1].expand_as(changed))
    assert torch.allclose(predict(trio[1])[0], predict(trio[0]), atol=1e-5)


def test_nothing_of_the_stand_in_is_in_the_merged_module(trio):
    names = list(trio[1].state_dict())
    assert names and all(name.startswith(("trunk.", "heads.")) for name in names)
    parameters = [name for name, _ in trio[1].named_parameters()]
    assert sorted(parameters) == sorted(names)


def test_an_attribute_that_a_step_sets_has_its_effect(trio, monkeypatch):
    def look(self, x):
        self.net.embed = True
        features = self.net(x)
        self.net.embed = False
        return torch.cat([features, self.net(x)], 1)

    monkeypatch.setattr(Lit, "look", look)
    assert torch.allclose(predict(trio[1])[1], predict(trio[0]), atol=1e-5)


def method_hook(self):
    self.net.encoder.register_forward_hook(self.keep)


def layer_hook(self):
    self.net.encoder[3].register_forward_hook(self.keep)


def closure_hook(self):
    def keep(module, inputs, output):
        self.seen["kept"] = output

    self.net.encoder.register_forward_hook(keep)


def container_hook(self):
    seen = self.seen
    self.net.encoder[3].register_forward_hook(lambda module, inputs, output: seen.update(kept=output))


HOOKS = [method_hook, layer_hook, closure_hook, container_hook]


class Hooked(Lit):
    def __init__(self, register, outside=False):
        super().__init__()
        register(self)
        self.probe = nn.Linear(8, 2) if outside else None

    def keep(self, module, inputs, output):
        self.seen["kept"] = output

    def look(self, x):
        self.seen.clear()
        self.net(x)
        return self.seen["kept"] if self.probe is None else self.probe(self.seen["kept"])


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_the_source_run_in_the_merged_network(register):
    module = Hooked(register)
    expected = predict(module)
    module.seen.clear()
    merged = merge_with_copy(module, twin=Hooked(register))
    assert not module.seen, "the hook of a copy wrote into the source"
    assert all(torch.allclose(one, expected, atol=1e-5) for one in predict(merged))
    assert not module.seen
    assert not any(each._forward_hooks for part in (merged.trunk, *merged.heads.values()) for each in part.children())


def test_a_hook_that_is_registered_in_setup_belongs_to_its_task():
    class Late(Hooked):
        def setup(self, stage):
            self.calls = []
            self.net.encoder[0].register_forward_hook(lambda *_: self.calls.append(1))

        def look(self, x):
            self.net(x)
            return x.new_full((1,), len(self.calls))

    merged = ZipIt(trainer()).merge(
        [Late(lambda _: None) for _ in range(2)], DATA, backbone="net", matcher=Average(), refine=None
    )
    assert [each.tolist() for each in predict(merged, ["task_0", "task_1"])] == [[1, 2, 3]] * 2


def test_layers_outside_the_backbone_must_not_read_merged_features():
    merged = merge_with_copy(Hooked(method_hook, outside=True))
    with pytest.raises(ConfigurationError, match=r"Task 'a'.*has a hook.*`probe.weight`"):
        predict(merged)


class Probing(Lit):
    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(8, 2)

    def look(self, x):
        return self.probe(self.net.features(x))


def test_a_part_that_layers_outside_read_is_refused_but_the_whole_is_not(monkeypatch):
    module = Probing()
    merged = merge_with_copy(module)
    with pytest.raises(ConfigurationError, match=r"runs a part of its backbone.*`probe.weight`"):
        predict(merged)
    monkeypatch.setattr(Probing, "look", LOOKS["the backbone"])
    assert torch.allclose(predict(merged)[0], predict(module), atol=1e-5)


def test_a_part_is_refused_where_the_head_unmerges_between_layers(monkeypatch):
    monkeypatch.setattr(Lit, "look", LOOKS["a method"])

    class Residual(Net):
        def features(self, x):
            return self.encoder[0](x) + self.inner(self.encoder[0](x).relu())

        def __init__(self):
            super().__init__()
            self.inner, self.fc = nn.Linear(10, 10), nn.Linear(10, 3)

    module = Lit()
    module.net = Residual()
    with pytest.raises(ConfigurationError, match="unmerged between the layers"):
        predict(merge_with_copy(module, stop_at="encoder.0"))


class Whole(LightningModule):
    """Its forward is the backbone, but its step calls the parts."""

    def __init__(self):
        super().__init__()
        self.encoder, self.fc = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return self.scale * self.fc(self.encoder(x))

    def predict_step(self, batch, batch_idx):
        return self.scale * self.fc(self.encoder(batch))


def test_a_step_calls_the_parts_of_a_backbone_that_is_the_whole_forward():
    module = Whole()
    expected = predict(module)
    merged = merge_with_copy(module, backbone="")
    assert all(torch.allclose(one, expected, atol=1e-5) for one in predict(merged))
    again = ZipIt(trainer()).merge({"ab": merged, "c": copy.deepcopy(module)}, DATA, matcher=Average(), refine=None)
    assert all(torch.allclose(one, expected, atol=1e-5) for one in predict(again, "abc"))


def test_other_references_to_a_part_are_the_merged_part():
    class Twice(Lit):
        def __init__(self):
            super().__init__()
            self.encoder, self.classifier = self.net.encoder, self.net.fc
            self.parts = [self.net.encoder]

        def look(self, x):
            return torch.cat([self.classifier(self.encoder(x)), self.parts[0](x)], 1)

    module = Twice()
    merged = merge_with_copy(module)
    assert all(torch.allclose(one, predict(module), atol=1e-5) for one in predict(merged))
    with torch.no_grad():
        merged.heads["a"].get_parameter("fc.weight").zero_()
    first, second = predict(merged)
    assert first[:, :3].std(0).max() < 1e-6 < second[:, :3].std(0).max()
    assert not [name for name in merged.state_dict() if name.startswith("sources")]


def test_a_module_merged_again_has_the_stand_ins_of_its_sources(trio, monkeypatch):
    again = ZipIt(trainer()).merge(
        {"ab": trio[1], "c": copy.deepcopy(trio[0])}, DATA, backbone="net", matcher=Average(), refine=None
    )
    for what in ("a method", "an attribute", "its parts"):
        monkeypatch.setattr(Lit, "look", LOOKS[what])
        assert all(torch.allclose(one, predict(trio[0]), atol=1e-5) for one in predict(again, "abc"))


def test_a_layer_that_the_forward_does_not_use_says_that_it_was_merged_away():
    class Auxiliary(Lit):
        def __init__(self):
            super().__init__()
            self.net.auxiliary = nn.Linear(8, 2)

        def look(self, x):
            return self.net.auxiliary(self.net.features(x))

    with pytest.raises(ConfigurationError, match="`auxiliary` of the backbone was merged away"):
        predict(merge_with_copy(Auxiliary()))


def test_a_backbone_that_is_a_container_is_used_as_one():
    class Stacked(Lit):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

        def look(self, x):
            features = self.net[0](x)
            for layer in self.net:
                x = layer(x)
            return torch.cat([x, features, self.net[:2](x.repeat(1, 2)), x.new_full((len(x), 1), len(self.net))], 1)

    module = Stacked()
    assert all(torch.allclose(one, predict(module), atol=1e-5) for one in predict(merge_with_copy(module)))


class OwnState(nn.Linear):
    """A layer that writes its state itself, and has to have it."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach()
        destination[f"{prefix}bias"] = self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight.data.copy_(state_dict[f"{prefix}weight"])
        self.bias.data.copy_(state_dict[f"{prefix}bias"])


def test_layers_that_write_their_state_themselves_have_none_once_merged(tmp_path):
    models = {task: Lit() for task in "ab"}
    for model in models.values():
        model.net.encoder[2] = OwnState(10, 8)
    run = trainer()
    merged = ZipIt(run).merge(models, DATA, backbone="net", refine=None)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = type(merged).load_from_checkpoint(tmp_path / "merged.ckpt", models=models)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), merged(X))
