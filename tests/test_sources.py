"""What is written down of a source model, and what another process makes of it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.cli_user import LitNet
from torch import nn

from lightning_zipit._lightning.files.descriptions import describe_source, make_sources
from lightning_zipit._lightning.files.names import find_class, find_object
from lightning_zipit._lightning.files.trust import Trust
from lightning_zipit.errors import CheckpointError, ConfigurationError


class ScriptNet(LitNet):
    """Stands for a class of the script that was run."""


def read(description):
    return make_sources({"cats": description}, Trust(), "merged.ckpt")["cats"]


@pytest.fixture
def run_as(monkeypatch):
    """Make believe that another script is running, which defines ``ScriptNet``."""

    def pretend(file=None, spec=None, name="__main__"):
        main = ModuleType("__main__")
        main.ScriptNet = ScriptNet
        main.__spec__ = spec and ModuleSpec(spec, None)
        if file:
            main.__file__ = file
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.setattr(ScriptNet, "__module__", name)
        return describe_source(ScriptNet())["class_path"]

    return pretend


@pytest.mark.parametrize(
    ("file", "spec", "module"),
    [
        ("/home/user/project/main.py", None, "main"),  # python main.py
        ("project/train.py", "project.train", "project.train"),  # python -m project.train
        ("project/__main__.py", "project.__main__", "project.__main__"),  # python -m project
    ],
)
def test_a_class_of_the_running_script_has_the_name_by_which_others_import_it(run_as, file, spec, module):
    assert run_as(file, spec) == f"{module}:ScriptNet"
    assert run_as(file, spec, name="__mp_main__") == f"{module}:ScriptNet"
    assert find_class(f"{module}:ScriptNet") is ScriptNet  # the running script is not imported again


def test_arguments_of_the_running_script_are_named_as_its_classes_are(run_as):
    run_as("/home/user/project/main.py")
    model = LitNet()
    model.hparams.update(net={"class_path": "__main__.Net", "init_args": {"act": "__main__.act"}}, text="__main__")
    described = describe_source(model)["hyperparameters"]
    assert described["net"] == {"class_path": "main.Net", "init_args": {"act": "main.act"}}
    assert described["text"] == "__main__"


@pytest.mark.parametrize(
    ("file", "spec"),
    [(None, None), ("/home/user/main.v2.py", None), ("project/__main__.py", "__main__")],
    ids=["notebook", "dotted", "folder"],
)
def test_a_class_that_nobody_can_import_has_no_name(run_as, file, spec):
    assert run_as(file, spec) is None


def test_a_class_is_found_by_its_path():
    assert find_class("helpers.cli_user.LitNet") is find_class("helpers.cli_user:LitNet") is LitNet
    assert find_object("torch.nn.Linear") is nn.Linear
    for path in ("helpers.cli_user.NoNet", "no_such_module.Net", "Net"):
        with pytest.raises(ConfigurationError, match=path):
            find_class(path)
    with pytest.raises(ConfigurationError, match="not a LightningModule"):
        find_class("torch.nn.Linear")


def test_a_source_is_made_again_from_its_description():
    description = describe_source(LitNet(7))
    assert description["hyperparameters"] == {"width": 7}
    assert read(description).net.stem[0].out_channels == 7


def test_a_value_that_no_file_can_hold_is_named(recwarn):
    model = LitNet(7)
    weights = torch.ones(3)
    model.hparams.update(weights=weights, rate=np.float64(0.5), sizes=(1, 2), made={"by": object()})
    description = describe_source(model)
    assert description["left_out"] == ["made"] and description["hyperparameters"]["sizes"] == (1, 2)
    assert type(description["hyperparameters"]["rate"]) is float
    assert torch.equal(description["hyperparameters"]["weights"], weights)
    read(description)
    assert any("'made'" in str(warning.message) for warning in recwarn)
    with pytest.raises(CheckpointError, match="does not hold 'made'"):
        read({**description, "hyperparameters": {"width": "wide"}})


def test_a_source_that_cannot_be_made_again_says_what_to_do():
    for broken in ({"class_path": None}, {"class_path": "gone:Net"}, {"hyperparameters": {"width": "wide"}}):
        with pytest.raises(CheckpointError, match=r"models=\{'cats'"):
            read({**describe_source(LitNet(7)), **broken})
