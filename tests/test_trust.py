"""A file never causes code to run that the user did not vouch for: what is refused, and what is allowed."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.strangers import INSTANTIATE, QUIET, Data, Lit, Part, rewrite, spec

from lightning_zipit import MultiHeadModule, ZipItCLI, ZipItTrainer
from lightning_zipit._lightning.cli import main
from lightning_zipit._lightning.commands import export, inspect
from lightning_zipit._lightning.files.hyperparameters import find_requests
from lightning_zipit._lightning.files.loading import load_source
from lightning_zipit._lightning.files.trust import BUILDING_BLOCKS, Trust, is_building_block
from lightning_zipit.errors import CheckpointError, ConfigurationError, UntrustedError, ZipItError


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
    "inspect --model": lambda: main(["inspect", "--ckpt_path=merged.ckpt", "--model=helpers.strangers.Lit"]),
    "merge": lambda: merge({"a": "merged.ckpt", "c": "trained.ckpt"}),
    "sweep": lambda: sweep({"a": "merged.ckpt", "c": "trained.ckpt"}),
    **{
        command: lambda command=command: main(
            [command, *QUIET, "--ckpt_path=merged.ckpt", "--data=helpers.strangers.Data"]
        )
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
    "inspect": lambda: inspect(model="helpers.strangers.Lit", ckpt_path="trained.ckpt", backbone="net"),
    **{
        f"{command} of a project": lambda command=command: ZipItCLI(
            Lit, Data, args=[command, *QUIET, "--ckpt_path=trained.ckpt"]
        )
        for command in ("fit", "validate", "test", "predict")
    },
    "test": lambda: main(
        ["test", *QUIET, "--ckpt_path=trained.ckpt", "--model=helpers.strangers.Lit", "--data=helpers.strangers.Data"]
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
def test_no_reader_of_a_merged_checkpoint_imports_or_calls_what_it_names(inbox, reader):
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
def test_no_reader_of_a_trained_checkpoint_calls_what_an_argument_names(inbox, reader):
    (inbox / "fine.ckpt").write_bytes((inbox / "trained.ckpt").read_bytes())

    def poison(content):
        held = content["hyper_parameters"]
        held["_instantiator"], held["extra"] = INSTANTIATE, spec("os.mkdir", path="marker")

    rewrite("trained.ckpt", poison)
    refuses(TRAINED_READERS[reader], "os.mkdir", "`extra`")


@pytest.mark.parametrize("reader", ["merge", "inspect", "test"])
def test_a_class_that_a_trained_checkpoint_names_is_not_imported(inbox, reader):
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
def test_payloads_are_refused_wherever_they_are(inbox, place, parsed):
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
def test_text_is_text(inbox, text):
    held = {"_instantiator": INSTANTIATE, "extra": text}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    assert load_source("trained.ckpt", Lit).extra == text
    run = ZipItCLI(Lit, Data, args=["test", *QUIET, "--ckpt_path=trained.ckpt"])
    assert run.model.extra == text and not Path("marker").exists()


def test_hyperparameters_of_old_versions_are_not_looked_at(inbox):
    def poison(content):
        content["module_arguments"] = {"_instantiator": INSTANTIATE, "extra": spec("os.mkdir", path="marker")}

    rewrite("trained.ckpt", poison)
    assert load_source("trained.ckpt", Lit).extra is None and not Path("marker").exists()


def test_the_error_lists_all_that_a_file_names(inbox):
    def poison(content):
        for task, name in (("a", "payload:Net"), ("b", "payload.more:Net")):
            source = content["lightning_zipit"]["sources"][task]
            inner = [spec("os.mkdir"), spec("torch.nn.ReLU")]
            source |= {"class_path": name, "hyperparameters": {"net": spec("torch.hub.load", x=inner)}}

    rewrite("merged.ckpt", poison)
    names = ("payload:Net", "payload.more:Net", "torch.hub.load", "os.mkdir")
    text = refuses(MERGED_READERS["load_from_checkpoint"], *names, "torch.nn.ReLU (`net.x.1` of task 'a'): allowed")
    assert all(repr(name) in text.partition("trust=")[2] for name in names)


@pytest.mark.parametrize(
    "name", ["lightning_zipit._lightning.multihead:MultiHeadModule", "lightning_zipit.ZipItModule"]
)
def test_our_own_classes_are_never_sources(inbox, name):
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].update(class_path=name))
    refuses(MERGED_READERS["load_from_checkpoint"], name)
    with pytest.raises(CheckpointError, match="cannot be a source model"):
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
        *(
            "lightning_zipit.MultiHeadModule",
            "lightning_zipit._lightning.cli.main",
            "helpers.strangers.Part",
            "helpers.strangers.Lit",
        ),
        *("", ".", "os", ":", "os:", "..os.mkdir", "torch.nn.ReLU ", "helpers.strangers:Lit:x"),
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


def test_a_file_of_an_older_version_is_read(inbox):
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].pop("left_out"))
    assert MultiHeadModule.load_from_checkpoint("merged.ckpt").tasks == ["a", "b"]


def test_trusting_a_module_allows_its_classes(inbox):
    (inbox / "payload.py").write_text("from helpers.strangers import Lit\nclass Net(Lit): pass\n")
    rewrite("merged.ckpt", lambda content: content["lightning_zipit"]["sources"]["a"].update(class_path="payload:Net"))
    for trust in ("payload", ["payload"], ["payload.Net"], ["payload:Net"]):
        loaded = MultiHeadModule.load_from_checkpoint("merged.ckpt", trust=trust)
        assert type(loaded.sources["a"]).__module__ == "payload"
        sys.modules.pop("payload")
    for words in (["--trust=payload"], ["--trust=[other, payload]"], ["--model=payload.Net"]):
        main(["export", "--ckpt_path=merged.ckpt", "--output=merged.pt2", *words])
        sys.modules.pop("payload")
    main(["test", *QUIET, "--ckpt_path=merged.ckpt", "--data=helpers.strangers.Data", "--trust=payload"])
    sys.modules.pop("payload")
    merge({"a": "merged.ckpt", "c": "trained.ckpt"}, trust="payload", output="again.ckpt")
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(_class_path="payload.Net"))
    sys.modules.pop("payload")
    Path("config.yaml").unlink()
    main(["test", *QUIET, "--ckpt_path=trained.ckpt", "--data=helpers.strangers.Data", "--trust=payload"])


@pytest.mark.parametrize("name", ["payload:subprocess.Popen", "payload.run", "payload.subprocess.run", "payload:Popen"])
def test_what_a_trusted_module_has_imported_is_not_its_own(inbox, name):
    (inbox / "payload.py").write_text("import subprocess\nfrom subprocess import Popen, run\n")
    rewrite(
        "trained.ckpt", lambda content: content["hyper_parameters"].update(_instantiator=INSTANTIATE, extra=spec(name))
    )
    with pytest.raises(UntrustedError, match="not a class defined in that entry"):
        load_source("trained.ckpt", Lit, trust="payload")
    with pytest.raises(
        UntrustedError, match="refers to classes or functions that are not trusted"
    ):  # now that it is imported
        load_source("trained.ckpt", Lit, trust="payload")
    with pytest.raises(UntrustedError):
        load_source("trained.ckpt", Lit, trust="payloa")


def test_a_function_is_trusted_by_its_full_name(inbox):
    held = {"_instantiator": INSTANTIATE, "extra": spec("os.mkdir", path="marker"), "act": "torch.tanh"}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    refuses(lambda: load_source("trained.ckpt", Lit, trust=["os", "torch"]), "os.mkdir", "torch.tanh")
    assert load_source("trained.ckpt", Lit, trust=["os.mkdir", "torch.tanh"]).act is torch.tanh
    assert Path("marker").is_dir()


@pytest.mark.parametrize("trust", ["", [""], ["my project"], [3], ["os.system()"], ["a:b:c"]])
def test_trust_names_modules_and_classes(inbox, trust):
    if trust == "":
        trust = ["."]
    with pytest.raises(ConfigurationError, match="`trust` contains"):
        MultiHeadModule.load_from_checkpoint("merged.ckpt", trust=trust)


def test_arguments_of_the_users_own_are_named_by_a_module_or_on_the_command_line(inbox):
    held = {"_instantiator": INSTANTIATE, "net": spec("helpers.strangers.Part", width=4), "act": "torch.tanh"}
    rewrite("trained.ckpt", lambda content: content["hyper_parameters"].update(held))
    refuses(lambda: load_source("trained.ckpt", Lit), "helpers.strangers.Part", "torch.tanh")
    assert isinstance(load_source("trained.ckpt", Lit(), trust=["torch.tanh"]).net[0], Part)
    named = ["--model.net=helpers.strangers.Part", "--model.act=torch.tanh"]
    run = ZipItCLI(Lit, Data, args=["test", *QUIET, "--ckpt_path=trained.ckpt", *named])
    assert isinstance(run.model.net[0], Part) and run.model.act is torch.tanh
    sources = ["--checkpoints.a=trained.ckpt", "--checkpoints.b=trained.ckpt", "--backbone=net", "--refine=null"]
    ZipItCLI(Lit, Data, args=["merge", *QUIET, *sources, *named, "--output=again.ckpt"])
    loaded = MultiHeadModule.load_from_checkpoint("again.ckpt", trust=["helpers.strangers.Part", "torch.tanh"])
    assert loaded.sources["b"].act is torch.tanh


def test_hyperparameters_that_are_one_argument_together_are_looked_at():
    """Of a class that takes them all as one dict, which it may hand to a function that makes what they name."""
    trust = Trust.of(None)
    for key in ("_target_", "class_path"):
        (request,) = find_requests({key: "os.mkdir", "path": "marker"}, None, trust, parsed=False)
        assert request.name == "os.mkdir" and not request.allowed
