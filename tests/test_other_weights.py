"""Weights of any origin: state dicts under any key and prefix, averages of weights, and safetensors."""

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_zipit._lightning.files.loading import load_source
from lightning_zipit.errors import CheckpointError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


class Lit(LightningModule):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))
        self.register_buffer("mean", torch.zeros(6))

    def training_step(self, batch, batch_idx):
        return self.net(batch - self.mean).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Headed(Lit):
    """Has parameters outside its network."""

    def __init__(self, classes: int = 3):
        super().__init__(classes)
        self.head = nn.Linear(classes, 2)


class Own(Lit):
    """Reads its own state dicts."""

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict({name.removeprefix("own/"): each for name, each in state.items()})


def trained(kind=Lit):
    torch.manual_seed(1)
    return kind().eval()


def renamed(state, old, new):
    return {name.replace(old, new, 1): each for name, each in state.items()}


def zeros(state):
    return {name: torch.zeros_like(each) for name, each in state.items()}


def averaged(model):
    return {**AveragedModel(model).state_dict(), "n_averaged": torch.tensor(2)}


FILES = {
    "a Lightning checkpoint": lambda m: {"state_dict": m.state_dict(), "epoch": 3},
    "a state dict": lambda m: m.state_dict(),
    "of the network alone": lambda m: m.net.state_dict(),
    "under another key": lambda m: {"model_state_dict": m.state_dict(), "optimizer_state_dict": {"state": {}}},
    "of the network under a key": lambda m: {"ckpt": {"net": m.net.state_dict()}, "step": 3},
    "of a compiled module": lambda m: renamed(m.state_dict(), "", "_orig_mod."),
    "of a compiled network": lambda m: renamed(m.state_dict(), "net.", "net._orig_mod."),
    "of a compiled network, in a checkpoint": lambda m: {
        "state_dict": renamed(m.state_dict(), "net.", "net._orig_mod.")
    },
    "of a data parallel module": lambda m: renamed(m.state_dict(), "", "module."),
    "of a data parallel network": lambda m: renamed(m.state_dict(), "net.", "net.module."),
    "of an average": averaged,
    "of another module with the network": lambda m: renamed(m.net.state_dict(), "", "encoder.backbone."),
    "beside weights for something else": lambda m: {"net": m.net.state_dict(), "other": {"w": torch.zeros(3)}},
}


@pytest.mark.parametrize("content", FILES)
def test_weights_are_found(content, tmp_path):
    model, path = trained(), str(tmp_path / "a.pt")
    torch.save(FILES[content](model), path)
    loaded = load_source(path, Lit)
    pairs = zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_safetensors_of_the_network_are_found(tmp_path):
    model, path = trained(), str(tmp_path / "a.safetensors")
    save_file(model.net.state_dict(), path)
    assert torch.equal(load_source(path, Lit()).net(X), model.net(X)) is False  # in train mode
    assert torch.equal(load_source(path, Lit()).eval().net(X), model.net(X))


def test_a_pickled_network_is_read_where_that_is_allowed(tmp_path):
    model, path = trained(), str(tmp_path / "a.pt")
    torch.save(model.net, path)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        load_source(path, Lit)
    assert torch.equal(load_source(path, Lit, weights_only=False).eval().net(X), model.net(X))


def test_of_several_sets_the_usual_one_or_the_chosen_one_is_used(tmp_path):
    model, path = trained(), str(tmp_path / "a.pt")
    torch.save({"state_dict": zeros(model.state_dict()), "state_dict_ema": model.state_dict()}, path)
    with pytest.warns(UserWarning, match="also holds weights under 'state_dict_ema'.*--weights_key=state_dict_ema"):
        assert load_source(path, Lit).net[0].weight.count_nonzero() == 0
    assert torch.equal(load_source(path, Lit, weights_key="state_dict_ema").eval().net(X), model.net(X))
    with pytest.raises(CheckpointError, match=r"no weights under 'ema'. It holds weights under 'state_dict', 'state_"):
        load_source(path, Lit, weights_key="ema")


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_of_two_networks_in_one_state_dict_the_user_chooses(key, tmp_path):
    model, path = trained(), str(tmp_path / "a.pt")
    both = {
        "mean": model.mean,
        **renamed(zeros(model.net.state_dict()), "", "net."),
        **renamed(model.net.state_dict(), "", "ema.module."),
    }
    torch.save({key: both} if key else both, path)
    with pytest.raises(CheckpointError, match=r"several sets of weights that fit Lit.*weights_key='.*ema.module'"):
        load_source(path, Lit)
    assert torch.equal(load_source(path, Lit, weights_key="ema.module").eval().net(X), model.net(X))
    assert load_source(path, Lit, weights_key="net").net[0].weight.count_nonzero() == 0


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (lambda m: m.net.state_dict(), Headed),  # the head would stay untrained
        (lambda m: {**m.state_dict(), "head.weight": torch.zeros(2, 3)}, Lit),  # a part that the class does not have
        (lambda m: renamed(m.state_dict(), "mean", "average"), Lit),
        (lambda m: {"state_dict": {name: each for name, each in m.state_dict().items() if name != "mean"}}, Lit),
        (lambda m: renamed(m.state_dict(), "net.0.weight", "net.0.kernel"), Lit),
        (lambda m: Lit(4).state_dict(), Lit),
    ],
)
def test_weights_that_do_not_fit_are_refused(content, kind, tmp_path):
    torch.save(content(trained()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a.pt (cannot be loaded into|.*nor a state_dict of) {kind.__name__}"):
        load_source(str(tmp_path / "a.pt"), kind)


def test_a_module_that_reads_its_weights_in_its_own_way_does_so(tmp_path):
    model = trained(Own)
    torch.save({"state_dict": renamed(model.state_dict(), "", "own/")}, tmp_path / "a.ckpt")
    assert torch.equal(load_source(str(tmp_path / "a.ckpt"), Own).eval().net(X), model.net(X))
