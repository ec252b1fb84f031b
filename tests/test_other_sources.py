"""Sources of other kinds: of the other package, with adapters, in 16 bits, scripted, quantised, without weights."""

import copy

import pytest
import pytorch_lightning
import torch
from helpers.nets import trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_zipit import MultiHeadModule, ZipIt, merge_backbones
from lightning_zipit._lightning.entering import Entering
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.matchers import Average

G = torch.Generator().manual_seed(3)
X, Y = torch.randn(16, 6, generator=G), torch.randint(0, 3, (16,), generator=G)
DATA = DataLoader(TensorDataset(X, Y), 8)
EXACT = {"backbone": "net", "matcher": Average(), "refine": None}


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


class Steps:
    """What a user writes, for a module of either package."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def on_validation_epoch_start(self):
        self.counted = 0

    def validation_step(self, batch, batch_idx):
        self.counted += 1
        assert self.device == next(self.parameters()).device
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0].to(self.net[0].weight)), batch[1]))

    def on_validation_epoch_end(self):
        self.log_dict({"counted": float(self.counted)})

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Lit(Steps, LightningModule):
    pass


class Other(Steps, pytorch_lightning.LightningModule):
    pass


def merge(module, run=None, **how):
    return ZipIt(run or trainer()).merge({"a": module, "b": copy.deepcopy(module)}, DATA, **(EXACT | how))


def test_a_module_of_pytorch_lightning_is_as_good_as_one_of_lightning(tmp_path):
    torch.manual_seed(0)
    source, run = Other().eval(), trainer(max_epochs=1)
    expected = pytorch_lightning.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    ).validate(source, DATA, verbose=False)[0]
    merged = merge(source, run)
    found = run.validate(merged, [DATA, DATA], verbose=False)
    logged = {name: value for each in found for name, value in each.items()}
    assert logged == pytest.approx({f"{task}/{name}": value for task in "ab" for name, value in expected.items()})
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert torch.equal(loaded(X)["a"], merged(X)["a"])
    before = merged.trunk.get_parameter("0.weight").clone()
    trainer(max_epochs=1).fit(merged, [DATA, DATA])
    assert not torch.equal(before, merged.trunk.get_parameter("0.weight"))


def test_a_trainer_of_pytorch_lightning_is_told_what_to_import():
    other = pytorch_lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ConfigurationError, match=r"Trainer of `pytorch_lightning`. Import Trainer from `lightning."):
        ZipIt(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"get_input": lambda batch: batch[0]}])
def test_a_source_of_16_bits_is_merged_in_its_type(dtype, how, tmp_path):
    class Plain(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    torch.manual_seed(0)
    source, run = Plain().to(dtype).eval(), trainer()
    merged = merge(source, run, refine="least_squares", **how)
    expected = source.net(X.to(dtype))
    torch.testing.assert_close(merged(X.to(dtype))["b"], expected, atol=2e-2, rtol=2e-2)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    loaded = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt", models={"a": Plain(), "b": Plain()})
    assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(X.to(dtype))["a"], merged(X.to(dtype))["a"])


def test_inputs_that_a_network_of_16_bits_takes_are_not_converted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 3)

        def forward(self, time):
            return self.last(torch.cat([time.sin(), time.cos()], 1).to(self.last.weight))

    source = Lit().eval()
    source.net = Net().bfloat16()
    source.validation_step = lambda batch, batch_idx: source.net(batch)
    times = torch.full((4, 1), 999.0)
    (call,) = Entering(source, "net", "a").calls(times, 0, None)
    assert torch.equal(call.tensors[0], times)


class Adapted(nn.Module):
    """A network with low-rank adapters, with the methods of PEFT's models."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(6, rank, bias=False), nn.Linear(rank, 8, bias=False)

    def forward(self, x):
        return self.base[1:](self.base[0](x) + self.up(self.down(x)))

    @torch.no_grad()
    def merge_and_unload(self):
        self.base[0].weight += self.up.weight @ self.down.weight
        return self.base


class AdaptedLayer(nn.Module):
    """A layer with an adapter, with the methods of PEFT's layers."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(1.5))
        self.merged = False

    def forward(self, x):
        return self.base(x) * (1.0 if self.merged else self.scale)

    @torch.no_grad()
    def merge(self):
        self.base.weight *= self.scale
        self.base.bias *= self.scale
        self.merged = True

    def get_base_layer(self):
        return self.base


@pytest.mark.parametrize("where", ["network", "layer"])
def test_adapters_are_merged_into_their_layers_first(where):
    torch.manual_seed(0)
    source = Lit().eval()
    if where == "network":
        source.net = Adapted(source.net)
    else:
        source.net[2] = AdaptedLayer(source.net[2])
    expected = source.net(X)
    merged = merge(source)
    torch.testing.assert_close(merged(X)["a"], expected)
    names = {name for name, _ in merged.trunk.named_parameters()}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(source.net(X), expected)


class Scripted(Lit):
    """Has parts of torch.jit around its network."""

    def __init__(self):
        super().__init__()
        self.before, self.loss = torch.jit.script(nn.Linear(6, 6)), torch.jit.script(nn.CrossEntropyLoss())

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(self.net(self.before(batch[0])), batch[1]))

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(self.before(batch[0])), batch[1])


def test_scripted_parts_outside_the_backbone_are_kept():
    torch.manual_seed(0)
    source = Scripted().eval()
    merged = merge(source)
    expected = trainer().validate(source, DATA, verbose=False)[0]["loss"]
    assert trainer().validate(merged, [DATA, DATA], verbose=False)[1]["b/loss"] == pytest.approx(expected, rel=1e-5)
    trainer(max_epochs=1).fit(merged, [DATA, DATA])
    assert all(tensor.requires_grad for tensor in source.parameters())


def lazy(net):
    return nn.Sequential(nn.LazyLinear(8), *net[1:])


def quantised(net):
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})


def partly_quantised(net):
    return nn.Sequential(net[0], *quantised(net)[1:])


def traced(net):
    return torch.jit.trace(net, X)


def partly_scripted(net):
    net[2] = torch.jit.script(net[2])
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lazy, r"Task 'b'.* `0` is lazy.*Run the network on a batch"),
        (quantised, r"Task 'b'.*quantised weights.*Merge the networks before"),
        (partly_quantised, r"Task 'b'.*`2.*quantised weights"),
        (torch.jit.script, r"Task 'b'.*whole network.*torch.jit.*load_state_dict"),
        (traced, r"Task 'b'.*whole network.*torch.jit"),
        (partly_scripted, r"Task 'b'.*`2`.*torch.jit"),
    ],
)
def test_layers_that_cannot_be_read_are_named_with_the_way_out(change, message):
    good, source = Lit().eval(), Lit().eval()
    source.net = change(source.net)
    with pytest.raises(ConfigurationError, match=message):
        ZipIt(trainer()).merge({"a": good, "b": source}, DATA, **EXACT)
    with pytest.raises(ConfigurationError, match=message):
        merge_backbones({"a": good.net, "b": source.net}, [X])
