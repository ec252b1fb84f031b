"""What files hold is read as what it is: hyperparameters as arguments, numbers as numbers, text as text."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

import pytest
import torch
import torchmetrics
from helpers.nets import images, trainer
from helpers.strangers import INSTANTIATE, QUIET, Lit, rewrite, spec
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_zipit import CalibrationStatistics, Ensemble, MergeReport, MultiHeadModule, ZipIt, ZipItModule
from lightning_zipit._lightning.commands import inspect
from lightning_zipit._lightning.files.hyperparameters import make_arguments
from lightning_zipit._lightning.files.loading import load_source
from lightning_zipit._lightning.files.trust import Trust
from lightning_zipit._sweep.results import ResultsFile
from lightning_zipit.errors import CheckpointError, StatisticsError
from lightning_zipit.graph.notes import read_barriers


class Colour(Enum):
    RED = 1
    BLUE = 2


class Typed(LightningModule):
    """As LightningCLI makes them, with arguments of many kinds."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] = torch.optim.Adam,
        act: Callable = torch.tanh,
        layer: type[nn.Module] = nn.ReLU,
        metrics: dict[str, torchmetrics.Metric] | None = None,
        layers: list[nn.Module] | None = None,
        colour: Colour = Colour.RED,
        sizes: tuple[int, ...] = (1, 2),
        dtype: torch.dtype = torch.float32,
        place: Path | None = None,
        untyped=torchmetrics.MeanMetric,
        function=nn.functional.gelu,
        pair=(1, 2),
    ):
        super().__init__()
        self.save_hyperparameters()
        self.given = (optimizer, act, layer, metrics, layers, colour, sizes, dtype, place, untyped, function, pair)
        self.net = net


def test_hyperparameters_of_lightnings_command_line_are_read_as_it_reads_them(tmp_path):
    words = [
        *("--model.net=torch.nn.Linear", "--model.net.in_features=2", "--model.net.out_features=3"),
        *("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5", "--model.colour=BLUE"),
        *("--model.metrics={acc: {class_path: torchmetrics.MeanSquaredError}}", "--model.sizes=[3, 4]"),
        *("--model.layers=[{class_path: torch.nn.Hardtanh, init_args: {max_val: 0.5}}]", "--model.place=here"),
        "--model.untyped=torchmetrics.SumMetric",
    ]
    made = LightningCLI(Typed, run=False, args=[*words, *QUIET], save_config_callback=None)
    made.trainer.strategy.connect(made.model)
    made.trainer.save_checkpoint(tmp_path / "typed.ckpt")
    loaded = load_source(str(tmp_path / "typed.ckpt"), Typed)
    optimizer, act, layer, metrics, layers, *others = loaded.given
    assert optimizer(loaded.parameters()).defaults["lr"] == 0.5 and isinstance(
        optimizer(loaded.parameters()), torch.optim.SGD
    )
    assert act is torch.tanh and layer is nn.ReLU  # the defaults, which the user's own code names
    assert isinstance(metrics["acc"], torchmetrics.MeanSquaredError) and layers[0].max_val == 0.5
    assert others[:4] == [Colour.BLUE, (3, 4), torch.float32, Path("here")]
    assert others[4:] == [torchmetrics.SumMetric, nn.functional.gelu, (1, 2)]
    assert others == list(made.model.given[5:])
    assert torch.equal(loaded.net.weight, made.model.net.weight) and dict(loaded.hparams) == dict(made.model.hparams)


def test_a_string_that_a_parameter_does_not_take_is_an_error():
    with pytest.raises(TypeError, match="'yesterday'"):
        make_arguments({"sizes": "yesterday"}, Typed, Trust())


@pytest.mark.parametrize("dtype", ["load", "hub", "_dynamo", "nn.Linear", "no_such_type", ""])
def test_a_type_of_tensors_is_nothing_else(inbox, dtype):
    before = set(sys.modules)

    def name_type(content):
        content["lightning_zipit"]["inputs"]["tuple"][0]["tuple"][0]["tensor"] = dtype or "__dict__"

    rewrite("merged.ckpt", name_type)
    with pytest.raises(CheckpointError, match="not a tensor type"):
        MultiHeadModule.load_from_checkpoint("merged.ckpt")
    with pytest.raises(CheckpointError, match="not a tensor type"):
        inspect(ckpt_path="merged.ckpt")
    assert set(sys.modules) == before


@pytest.mark.parametrize("dtype", ["load", "_dynamo", "finfo"])
def test_statistics_name_no_functions(inbox, dtype, monkeypatch):
    sources = {"a": Lit(), "b": Lit()}
    ZipIt(trainer()).merge(sources, images(count=16, size=8), backbone="net", refine=None, statistics="s.safetensors")
    with safe_open("s.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["lightning_zipit"])
    header["inputs"]["tuple"][0]["tuple"][0]["tensor"] = dtype
    monkeypatch.setattr("lightning_zipit._calibration.statistics_file.digest_tensors", lambda *_: header["digest"])
    save_file(load_file("s.safetensors"), "s.safetensors", {"lightning_zipit": json.dumps(header)})
    before = set(sys.modules)
    with pytest.raises(StatisticsError, match="not a tensor type"):
        CalibrationStatistics.load("s.safetensors")
    with pytest.raises(StatisticsError, match="not a tensor type"):
        ZipIt(trainer()).merge(sources, backbone="net", refine=None, statistics="s.safetensors")
    assert set(sys.modules) == before


@pytest.mark.parametrize("cls", [Ensemble, ZipItModule])
def test_what_is_never_saved_is_never_read(inbox, cls):
    held = {"_instantiator": INSTANTIATE, "models": spec("os.mkdir", path="marker")}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    with pytest.raises(CheckpointError, match="cannot be loaded from a checkpoint"):
        cls.load_from_checkpoint("trained.ckpt")
    assert not Path("marker").exists()


def test_rows_and_reports_are_text(inbox):
    file = ResultsFile("sweep.csv", "digest", ["val_loss"])
    record = dict.fromkeys(file.columns, "__import__('os').mkdir('marker')")
    record |= {"models": "digest", "network": "merged", "error": ""} | dict.fromkeys(
        ("val_loss", *file.columns[-4:-1]), "1"
    )
    with open("sweep.csv", "w", newline="") as written:
        writer = csv.DictWriter(written, file.columns)
        writer.writeheader()
        writer.writerow(record)
    ResultsFile("sweep.csv", "digest", ["val_loss"])
    content = torch.load("merged.ckpt", weights_only=True)["lightning_zipit"]["report"]
    content["spaces"][0]["tap"] = spec("os.mkdir", path="marker")
    Path("report.json").write_text(json.dumps(content))
    MergeReport.load("report.json")
    content["class_path"], content["merged"]["class_path"] = "os.mkdir", "os.mkdir"
    Path("report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a report"):
        MergeReport.load("report.json")
    assert not Path("marker").exists()


def test_texts_in_a_file_cannot_command_a_terminal():
    assert read_barriers({"node": "a\x1b]0;title\x07b"}) == {"node": "a ]0;title b"}
