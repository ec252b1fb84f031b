"""A file never causes code to run that the user did not vouch for."""

from __future__ import annotations

import csv
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

import pytest
import torch
import torchmetrics
from helpers.nets import images, trainer
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_zipit import (
    CalibrationStatistics,
    Ensemble,
    MergeReport,
    MultiHeadModule,
    ZipIt,
    ZipItCLI,
    ZipItModule,
    ZipItTrainer,
)
from lightning_zipit.cli import main
from lightning_zipit.commands import export, inspect
from lightning_zipit.errors import CheckpointError, ConfigurationError, StatisticsError, UntrustedError, ZipItError
from lightning_zipit.hyperparameters import make_arguments
from lightning_zipit.loading import load_source
from lightning_zipit.sweep.results import ResultsFile
from lightning_zipit.trust import BUILDING_BLOCKS, Trust, is_building_block

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
INSTANTIATE = "lightning.pytorch.cli.instantiate_module"


class Part(nn.Module):
    """A network of the user's that an argument may name."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class Lit(LightningModule):
    """A module of the user's whose arguments say little of what they are."""

    def __init__(self, net: nn.Module | None = None, extra=None, act: Callable | None = None, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(net or Part(width), nn.Conv2d(width, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.extra, self.act = extra, act

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self(batch[0]).mean())

    def training_step(self, batch, batch_idx):
        return self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    test_step = validation_step


class Data(LightningDataModule):
    def train_dataloader(self):
        return images(count=16, size=8)

    def val_dataloader(self):
        return [images(count=8, size=8) for _ in range(2)]

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The content of a merged checkpoint, and of a trained one."""
    folder = tmp_path_factory.mktemp("trusted")
    run = trainer()
    sources = {"a": Lit(), "b": Lit()}
    ZipIt(run).merge(sources, images(count=16, size=8), backbone="net", refine=None, verify=False)
    run.save_checkpoint(folder / "merged.ckpt")
    run.strategy.connect(sources["a"])
    run.save_checkpoint(folder / "trained.ckpt")
    return {name: (folder / f"{name}.ckpt").read_bytes() for name in ("merged", "trained")}


@pytest.fixture
def folder(contents, tmp_path, monkeypatch):
    """The working folder, with a checkpoint of each kind and a module that nobody has imported."""
    for name, content in contents.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    (tmp_path / "payload.py").write_text("open('marker', 'w')\nfrom test_trust import Lit\nclass Net(Lit): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["main.py"])
    yield tmp_path
    sys.modules.pop("payload", None)


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def spec(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


def refuses(action: Callable, *named: str):
    """Whether an action fails with an error that lists names, and runs and imports nothing."""
    before = set(sys.modules)
    with pytest.raises((ZipItError, SystemExit)) as failure:
        action()
    text = str(failure.value.code if isinstance(failure.value, SystemExit) else failure.value)
    assert all(name in text for name in named) and "trust" in text, text
    assert not Path("marker").exists()
    assert not {name for name in set(sys.modules) - before if name.startswith("payload")}
    return text


MERGED_READERS = {
    "load_from_checkpoint": lambda: MultiHeadModule.load_from_checkpoint("merged.ckpt"),
    "weights_only=False": lambda: MultiHeadModule.load_from_checkpoint("merged.ckpt", weights_only=False),
    "a part of models": lambda: MultiHeadModule.load_from_checkpoint("merged.ckpt", models={"b": Lit()}),
    "export": lambda: export("merged.ckpt", "merged.pt2"),
    "inspect": lambda: inspect(ckpt_path="merged.ckpt"),
    "inspect --model": lambda: main(["inspect", "--ckpt_path=merged.ckpt", "--model=test_trust.Lit"]),
    "merge": lambda: merge({"a": "merged.ckpt", "c": "trained.ckpt"}),
    "sweep": lambda: sweep({"a": "merged.ckpt", "c": "trained.ckpt"}),
    **{
        command: lambda command=command: main([command, *QUIET, "--ckpt_path=merged.ckpt", "--data=test_trust.Data"])
        for command in ("validate", "test", "predict")
    },
    "test of a project": lambda: ZipItCLI(Lit, Data, args=["test", *QUIET, "--ckpt_path=merged.ckpt"]),
}

TRAINED_READERS = {
    "merge": lambda: merge({"a": "trained.ckpt", "b": "trained.ckpt"}),
    "merge --weights_only=false": lambda: merge({"a": "trained.ckpt", "b": "trained.ckpt"}, weights_only=False),
    "merge of a project": lambda: ZipItCLI(
        Lit, Data, args=["merge", *QUIET, "--checkpoints.a=trained.ckpt", "--checkpoints.b=trained.ckpt"]
    ),
    "base": lambda: merge({"a": "fine.ckpt", "b": "fine.ckpt"}, base="trained.ckpt"),
    "sweep": lambda: sweep({"a": "trained.ckpt", "b": "trained.ckpt"}),
    "inspect": lambda: inspect(model="test_trust.Lit", ckpt_path="trained.ckpt", backbone="net"),
    **{
        f"{command} of a project": lambda command=command: ZipItCLI(
            Lit, Data, args=[command, *QUIET, "--ckpt_path=trained.ckpt"]
        )
        for command in ("fit", "validate", "test", "predict")
    },
    "test": lambda: main(
        ["test", *QUIET, "--ckpt_path=trained.ckpt", "--model=test_trust.Lit", "--data=test_trust.Data"]
    ),
}


def merge(checkpoints, output="out.ckpt", **settings):
    settings |= {"backbone": "net", "refine": None, "output": output}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return ZipItTrainer(**quiet).merge(Lit, Data(), checkpoints=checkpoints, **settings)


def sweep(checkpoints):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return ZipItTrainer(**quiet).sweep(Lit, Data(), checkpoints=checkpoints, backbone="net", metric="val_loss")


@pytest.mark.parametrize("reader", MERGED_READERS)
def test_no_reader_of_a_merged_checkpoint_imports_or_calls_what_it_names(folder, reader):
    def poison(content):
        source, other = content["lightning_zipit"]["sources"].values()
        source["class_path"], other["parsed"] = "payload:Net", True
        source["hyperparameters"]["extra"] = [{"deep": spec("os.mkdir", path="marker")}]
        other["hyperparameters"]["extra"] = spec("os.makedirs", name="marker")

    rewrite("merged.ckpt", poison)
    named = ["payload:Net (the class of task 'a')", "os.mkdir (`extra.0.deep` of task 'a')"]
    named += ["os.makedirs (`extra` of task 'b')"] if reader != "a part of models" else []
    refuses(MERGED_READERS[reader], *named, "--trust", "models=", "--model")


@pytest.mark.parametrize("reader", TRAINED_READERS)
def test_no_reader_of_a_trained_checkpoint_calls_what_an_argument_names(folder, reader):
    (folder / "fine.ckpt").write_bytes((folder / "trained.ckpt").read_bytes())

    def poison(content):
        held = content["hyper_parameters"]
        held["_instantiator"], held["extra"] = INSTANTIATE, spec("os.mkdir", path="marker")

    rewrite("trained.ckpt", poison)
    refuses(TRAINED_READERS[reader], "os.mkdir", "`extra`")


@pytest.mark.parametrize("reader", ["merge", "inspect", "test"])
def test_a_class_that_a_trained_checkpoint_names_is_not_imported(folder, reader):
    def poison(content):
        content["hyper_parameters"] |= {"_instantiator": INSTANTIATE, "_class_path": "payload.Net"}

    rewrite("trained.ckpt", poison)
    text = refuses(TRAINED_READERS[reader], "payload.Net")
    assert ("--classes.a=payload.Net" if reader == "merge" else "--model=payload.Net") in text


PAYLOADS = {
    "argument": {"extra": spec("os.mkdir", path="marker")},
    "typed argument": {"net": spec("os.mkdir", path="marker")},
    "list": {"extra": [1, [spec("os.mkdir", path="marker")]]},
    "tuple": {"extra": (spec("os.mkdir", path="marker"),)},
    "dict": {"extra": {"x": {"y": spec("os.mkdir", path="marker")}}},
    "ordered dict": {"extra": OrderedDict(spec("os.mkdir", path="marker"))},
    "inside what is allowed": {"net": spec("torch.nn.ModuleList", modules=[spec("os.mkdir", path="marker")])},
    "dict_kwargs": {"net": {"class_path": "torch.nn.ReLU", "dict_kwargs": {"x": spec("os.mkdir", path="marker")}}},
    "beside the arguments": {"net": {**spec("torch.nn.ReLU"), "more": spec("os.mkdir", path="marker")}},
    "under another key": {"init_args": {"x": spec("os.mkdir", path="marker")}},
    "Hydra": {"extra": {"_target_": "os.mkdir", "path": "marker"}},
    "a name that is no string": {"extra": spec(["os.mkdir"], path="marker")},
    "a function by its name": {"act": "os.mkdir"},
    "a module by its name": {"act": "payload.Net"},
    "_instantiator": {"_instantiator": "payload.make"},
}


@pytest.mark.parametrize("place", PAYLOADS)
@pytest.mark.parametrize("parsed", [True, False], ids=["of a command line", "of a script"])
def test_payloads_are_refused_wherever_they_are(folder, place, parsed):
    held = ({"_instantiator": INSTANTIATE} if parsed else {}) | PAYLOADS[place]
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    if place.endswith("by its name") and not parsed:  # there it is a string as any other
        assert load_source("trained.ckpt", Lit).act == held["act"]
    else:
        refuses(lambda: load_source("trained.ckpt", Lit), "payload" if "payload" in str(held) else "os.mkdir")
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    "text", ["{class_path: os.mkdir, init_args: {path: marker}}", "!!python/object/apply:os.mkdir"]
)
def test_text_is_text(folder, text):
    held = {"_instantiator": INSTANTIATE, "extra": text}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    assert load_source("trained.ckpt", Lit).extra == text
    run = ZipItCLI(Lit, Data, args=["test", *QUIET, "--ckpt_path=trained.ckpt"])
    assert run.model.extra == text and not Path("marker").exists()


def test_hyperparameters_of_old_versions_are_not_looked_at(folder):
    def poison(content):
        content["module_arguments"] = {"_instantiator": INSTANTIATE, "extra": spec("os.mkdir", path="marker")}

    rewrite("trained.ckpt", poison)
    assert load_source("trained.ckpt", Lit).extra is None and not Path("marker").exists()


def test_the_error_lists_all_that_a_file_names(folder):
    def poison(content):
        for task, name in (("a", "payload:Net"), ("b", "payload.more:Net")):
            source = content["lightning_zipit"]["sources"][task]
            inner = [spec("os.mkdir"), spec("torch.nn.ReLU")]
            source |= {"class_path": name, "hyperparameters": {"net": spec("torch.hub.load", x=inner)}}

    rewrite("merged.ckpt", poison)
    names = ("payload:Net", "payload.more:Net", "torch.hub.load", "os.mkdir")
    text = refuses(MERGED_READERS["load_from_checkpoint"], *names, "torch.nn.ReLU (`net.x.1` of task 'a'): allowed")
    assert all(repr(name) in text.partition("trust=")[2] for name in names)


@pytest.mark.parametrize("name", ["lightning_zipit.multihead:MultiHeadModule", "lightning_zipit.ZipItModule"])
def test_our_own_classes_are_never_sources(folder, name):
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].update(class_path=name))
    refuses(MERGED_READERS["load_from_checkpoint"], name)
    with pytest.raises(CheckpointError, match="no source of a merge"):
        MultiHeadModule.load_from_checkpoint("merged.ckpt", trust=["lightning_zipit"])


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "builtins.open", "subprocess.Popen", "functools.partial", "types.FunctionType"),
        *("torch.load", "torch.hub.load", "torch.nn.functional.relu", "torch.nn.Linear.load_state_dict", "torch.nn"),
        *("torch.fx.GraphModule", "torch.jit.ScriptModule", "torch.package.PackageImporter", "torch.nn.DataParallel"),
        *("torch.distributed.nn.RemoteModule", "torch.optim.swa_utils.AveragedModel", "torch.utils.data.DataLoader"),
        *("torch.nn.modules.module._WrappedHook", "torch.nn.os.system", "torch.optim.lr_scheduler.partial"),
        *("torchmetrics.image.FrechetInceptionDistance", "torchmetrics.wrappers.LambdaInputTransformer"),
        *("torchmetrics.text.BERTScore", "torchmetrics.metric.CompositionalMetric"),
        *("lightning.pytorch.Trainer", "lightning.pytorch.cli.LightningCLI", "lightning.pytorch.loggers.CSVLogger"),
        *("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.LightningModule"),
        *("lightning_zipit.MultiHeadModule", "lightning_zipit.cli.main", "test_trust.Part", "test_trust.Lit"),
        *("", ".", "os", ":", "os:", "..os.mkdir", "torch.nn.ReLU ", "test_trust:Lit:x"),
    ],
)
def test_what_can_do_harm_is_no_argument(name):
    assert not Trust().allows(name)


def test_layers_losses_optimizers_schedulers_and_metrics_are_arguments():
    for name in (
        *("torch.nn.ReLU", "torch.nn.modules.activation.ReLU", "torch.nn:TransformerEncoderLayer"),
        *("torch.nn.CrossEntropyLoss", "torch.optim.AdamW", "torch.optim.lr_scheduler.OneCycleLR"),
        *("lightning.pytorch.cli.ReduceLROnPlateau", "torchmetrics.Accuracy", "torchmetrics.MetricCollection"),
    ):
        assert Trust().allows(name), name


def test_no_building_block_is_of_the_packages_that_load_and_run_things():
    assert {place.partition(".")[0] for place, _ in BUILDING_BLOCKS} <= {"torch", "torchmetrics", "lightning"} | {
        "pytorch_lightning"
    }
    modules = [module for name, module in sys.modules.items() if name.startswith(("torch", "lightning"))]
    known = {found for module in modules for found in vars(module).values() if issubclass(type(found), type)}
    allowed = {found.__module__ for found in known if is_building_block(found)}
    assert len(allowed) > 60  # else nothing was looked at
    loading = ("torch.fx", "torch.jit", "torch.distributed", "torch.ao", "torch.utils", "torch.nn.parallel")
    assert not [place for place in allowed if place.startswith(loading)]
    assert not {"audio", "image", "text", "multimodal", "wrappers"} & {place.split(".")[1] for place in allowed}


def test_a_file_of_an_older_version_is_read(folder):
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].pop("left_out"))
    assert MultiHeadModule.load_from_checkpoint("merged.ckpt").tasks == ["a", "b"]


def test_trusting_a_module_allows_its_classes(folder):
    (folder / "payload.py").write_text("from test_trust import Lit\nclass Net(Lit): pass\n")
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].update(class_path="payload:Net"))
    for trust in ("payload", ["payload"], ["payload.Net"], ["payload:Net"]):
        loaded = MultiHeadModule.load_from_checkpoint("merged.ckpt", trust=trust)
        assert type(loaded.sources["a"]).__module__ == "payload"
        sys.modules.pop("payload")
    for words in (["--trust=payload"], ["--trust=[other, payload]"], ["--model=payload.Net"]):
        main(["export", "--ckpt_path=merged.ckpt", "--output=merged.pt2", *words])
        sys.modules.pop("payload")
    main(["test", *QUIET, "--ckpt_path=merged.ckpt", "--data=test_trust.Data", "--trust=payload"])
    sys.modules.pop("payload")
    merge({"a": "merged.ckpt", "c": "trained.ckpt"}, trust="payload", output="again.ckpt")
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(_class_path="payload.Net"))
    sys.modules.pop("payload")
    Path("config.yaml").unlink()
    main(["test", *QUIET, "--ckpt_path=trained.ckpt", "--data=test_trust.Data", "--trust=payload"])


@pytest.mark.parametrize("name", ["payload:subprocess.Popen", "payload.run", "payload.subprocess.run", "payload:Popen"])
def test_what_a_trusted_module_has_imported_is_not_its_own(folder, name):
    (folder / "payload.py").write_text("import subprocess\nfrom subprocess import Popen, run\n")
    rewrite(
        "trained.ckpt", lambda content: content["hyper_parameters"].update(_instantiator=INSTANTIATE, extra=spec(name))
    )
    with pytest.raises(UntrustedError, match="not a class that is defined there"):
        load_source("trained.ckpt", Lit, trust="payload")
    with pytest.raises(UntrustedError, match="names what you have not vouched for"):  # now that it is imported
        load_source("trained.ckpt", Lit, trust="payload")
    with pytest.raises(UntrustedError):
        load_source("trained.ckpt", Lit, trust="payloa")


def test_a_function_is_trusted_by_its_full_name(folder):
    held = {"_instantiator": INSTANTIATE, "extra": spec("os.mkdir", path="marker"), "act": "torch.tanh"}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    refuses(lambda: load_source("trained.ckpt", Lit, trust=["os", "torch"]), "os.mkdir", "torch.tanh")
    assert load_source("trained.ckpt", Lit, trust=["os.mkdir", "torch.tanh"]).act is torch.tanh
    assert Path("marker").is_dir()


@pytest.mark.parametrize("trust", ["", [""], ["my project"], [3], ["os.system()"], ["a:b:c"]])
def test_trust_names_modules_and_classes(folder, trust):
    if trust == "":
        trust = ["."]
    with pytest.raises(ConfigurationError, match="`trust` holds"):
        MultiHeadModule.load_from_checkpoint("merged.ckpt", trust=trust)


def test_arguments_of_the_users_own_are_named_by_a_module_or_on_the_command_line(folder):
    held = {"_instantiator": INSTANTIATE, "net": spec("test_trust.Part", width=4), "act": "torch.tanh"}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    refuses(lambda: load_source("trained.ckpt", Lit), "test_trust.Part", "torch.tanh")
    assert isinstance(load_source("trained.ckpt", Lit(), trust=["torch.tanh"]).net[0], Part)
    named = ["--model.net=test_trust.Part", "--model.act=torch.tanh"]
    run = ZipItCLI(Lit, Data, args=["test", *QUIET, "--ckpt_path=trained.ckpt", *named])
    assert isinstance(run.model.net[0], Part) and run.model.act is torch.tanh
    sources = ["--checkpoints.a=trained.ckpt", "--checkpoints.b=trained.ckpt", "--backbone=net", "--refine=null"]
    ZipItCLI(Lit, Data, args=["merge", *QUIET, *sources, *named, "--output=again.ckpt"])
    loaded = MultiHeadModule.load_from_checkpoint("again.ckpt", trust=["test_trust.Part", "torch.tanh"])
    assert loaded.sources["b"].act is torch.tanh


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
def test_a_type_of_tensors_is_nothing_else(folder, dtype):
    before = set(sys.modules)
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"].update(input_dtype=dtype or "__dict__"))
    with pytest.raises(CheckpointError, match="no type of tensors"):
        MultiHeadModule.load_from_checkpoint("merged.ckpt")
    with pytest.raises(CheckpointError, match="no type of tensors"):
        inspect(ckpt_path="merged.ckpt")
    assert set(sys.modules) == before


@pytest.mark.parametrize("dtype", ["load", "_dynamo", "finfo"])
def test_statistics_name_no_functions(folder, dtype, monkeypatch):
    sources = {"a": Lit(), "b": Lit()}
    ZipIt(trainer()).merge(sources, images(count=16, size=8), backbone="net", refine=None, statistics="s.safetensors")
    with safe_open("s.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["lightning_zipit"])
    header["input_dtype"] = dtype
    monkeypatch.setattr("lightning_zipit.calibration.statistics_file.digest_tensors", lambda *_: header["digest"])
    save_file(load_file("s.safetensors"), "s.safetensors", {"lightning_zipit": json.dumps(header)})
    before = set(sys.modules)
    with pytest.raises(StatisticsError, match="no type of tensors"):
        CalibrationStatistics.load("s.safetensors")
    with pytest.raises(StatisticsError, match="no type of tensors"):
        ZipIt(trainer()).merge(sources, backbone="net", refine=None, statistics="s.safetensors")
    assert set(sys.modules) == before


@pytest.mark.parametrize("cls", [Ensemble, ZipItModule])
def test_what_is_never_saved_is_never_read(folder, cls):
    held = {"_instantiator": INSTANTIATE, "models": spec("os.mkdir", path="marker")}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    with pytest.raises(CheckpointError, match="not read from a checkpoint"):
        cls.load_from_checkpoint("trained.ckpt")
    assert not Path("marker").exists()


def test_rows_and_reports_are_text(folder):
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
    with pytest.raises(CheckpointError, match="no report"):
        MergeReport.load("report.json")
    assert not Path("marker").exists()
