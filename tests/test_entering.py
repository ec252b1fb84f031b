"""What a backbone is given: the source's own step runs on the batch until it calls the backbone."""

import copy

import pytest
import torch
from helpers.nets import SmallResNet, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import ZipIt
from lightning_zipit._lightning.entering import Entering, side_by_side
from lightning_zipit._lightning.loaders import Batches
from lightning_zipit.errors import CalibrationError
from lightning_zipit.matchers import WeightMatching


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Lit(LightningModule):
    """A step as users write it."""

    def __init__(self, step, name="validation_step"):
        super().__init__()
        self.net = Net()
        self.given = []
        self.after = 0
        setattr(type(self), name, lambda self, batch, batch_idx: step(self, batch))

    def __init_subclass__(cls):
        super().__init_subclass__()


def lit(step, name="validation_step"):
    return type("Own", (Lit,), {})(step, name).eval()


def calls(module, batch, count=1):
    entering = Entering(module, "net", "a")
    return [entering.calls(batch, index, None) for index in range(count)][-1]


X = torch.arange(12.0).reshape(3, 4)


def normalised(self, batch):
    x, y = batch
    out = self.net((x - 2) / 3)
    self.after += 1
    self.log("loss", nn.functional.cross_entropy(out, y))


def test_preprocessing_in_the_step_has_happened():
    (call,) = calls(lit(normalised), (X, torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(call.tensors[0], (X - 2) / 3)


def test_nothing_after_the_backbone_runs_from_the_second_batch_on():
    module = lit(normalised)
    calls(module, (X, torch.zeros(3, dtype=torch.int64)), count=4)
    assert module.after == 1


def test_a_step_that_fails_after_the_backbone_is_followed():
    (call,) = calls(lit(lambda self, batch: self.net(batch["pixels"]) + batch["missing"]), {"pixels": X})
    assert torch.equal(call.tensors[0], X)


def test_every_call_of_the_backbone_counts():
    def twice(self, batch):
        self.net(batch)
        return self.net(batch.flip(0))

    for _ in range(2):
        first, second = calls(lit(twice), X, count=2)
    assert torch.equal(first.tensors[0], X) and torch.equal(second.tensors[0], X.flip(0))


@pytest.mark.parametrize("name", ["test_step", "predict_step", "training_step"])
def test_the_first_step_that_reaches_the_backbone_is_used(name):
    module = lit(lambda self, batch: self.net(batch * 2), name)
    module.__class__.validation_step = lambda self, batch, batch_idx: None
    assert torch.equal(calls(module, X)[0].tensors[0], X * 2)


def test_a_tensor_is_not_unpacked_into_image_and_label():
    (call,) = calls(lit(normalised), torch.randn(2, 5, 4))
    assert call.tensors[0].shape == (2, 5, 4)


def test_a_batch_without_input_is_an_error_that_says_how_each_step_ended():
    with pytest.raises(
        CalibrationError, match=r"a dict with keys \['a'\].*`validation_step` ends.*KeyError.*get_input"
    ):
        calls(lit(lambda self, batch: self.net(batch["x"])), {"a": X})


def test_the_module_is_as_it_was_after_a_step():
    module = lit(normalised)
    before = dict(vars(module)), dict(vars(module.net))
    calls(module, (X, torch.zeros(3, dtype=torch.int64)))
    assert (set(vars(module)), vars(module.net)) == (set(before[0]), before[1])


def test_backbones_that_are_given_the_same_share_one_input():
    def given(change):
        return calls(lit(lambda self, batch: self.net(change(batch[0]))), (X, None))

    same = side_by_side({"a": given(lambda x: x), "b": given(lambda x: x)})
    other = side_by_side({"a": given(lambda x: x), "b": given(lambda x: -x)})
    assert torch.equal(same[0].tensors[0], X) and torch.equal(other[0]["b"].tensors[0], -X)
    with pytest.raises(CalibrationError, match="other numbers of samples"):
        side_by_side({"a": given(lambda x: x), "b": given(lambda x: torch.cat([x, x]))})


class Normalising(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = SmallResNet()

    def validation_step(self, batch, batch_idx):
        return self.net(batch[0] / 255)


def test_batches_of_none_are_left_out():
    a = Normalising().eval()
    x = torch.rand(16, 3, 8, 8) * 255
    how = dict(backbone="net", refine="batch_norm")
    merged = [
        ZipIt(trainer()).merge({"a": a, "b": copy.deepcopy(a)}, Batches(data), **how) for data in ([(x,), None], [(x,)])
    ]
    assert all(torch.equal(one, two) for one, two in zip(*(each.state_dict().values() for each in merged), strict=True))


def test_a_loader_of_several_tasks_is_read_as_one_per_task():
    a, b = Normalising().eval(), Normalising().eval()
    own = [DataLoader(TensorDataset(torch.rand(12, 3, 8, 8) * 255), 6) for _ in range(2)]
    loaders = CombinedLoader({"a": own[0], "b": own[1]}, "max_size_cycle")
    how = dict(backbone="net", refine=None)
    first = ZipIt(trainer()).merge({"a": a, "b": b}, loaders, **how)
    second = ZipIt(trainer()).merge({"a": a, "b": b}, own, **how)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_weights_are_matched_without_any_data():
    a = Normalising().eval()
    b, order = copy.deepcopy(a), torch.randperm(8)
    first, second = a.net.layer1[0], b.net.layer1[0]
    with torch.no_grad():
        second.conv1.weight.copy_(first.conv1.weight[order])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(second.bn1, name).copy_(getattr(first.bn1, name)[order])
        second.conv2.weight.copy_(first.conv2.weight[:, order])
    merged = ZipIt(trainer()).merge({"a": a, "b": b}, backbone="net", matcher=WeightMatching(), refine=None)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x)["b"], a.net(x), rtol=1e-4, atol=1e-5)
