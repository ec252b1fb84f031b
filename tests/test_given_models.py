"""Source modules that a merged file does not describe are given on the command line, as its errors say."""

import sys

import pytest
import torch
from helpers.cli_user import Data, LitNet, TestedData, UnrecordedNet
from helpers.nets import trainer

from lightning_zipit import MultiHeadModule, ZipIt, ZipItCLI
from lightning_zipit._lightning.commands import export, inspect
from lightning_zipit.errors import CheckpointError, ConfigurationError

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
GIVEN = "{class_path: helpers.cli_user.UnrecordedNet, init_args: {width: 5}}"


@pytest.fixture(scope="module")
def merged_file(tmp_path_factory):
    torch.manual_seed(0)
    run, path = trainer(), tmp_path_factory.mktemp("given") / "merged.ckpt"
    ZipIt(run).merge({"cats": UnrecordedNet(5), "dogs": UnrecordedNet(5)}, Data().train_dataloader(), backbone="net")
    run.save_checkpoint(path)
    return str(path)


def command(*args):
    sys_argv, sys.argv = sys.argv, ["main.py"]
    try:
        words = [args[0], *QUIET, "--trainer.logger=false", *args[1:]]
        return ZipItCLI(LitNet, TestedData, args=words, save_config_callback=None)
    finally:
        sys.argv = sys_argv


def test_the_error_of_a_command_names_the_flag_that_helps(merged_file, capsys):
    with pytest.raises(SystemExit) as failure:
        command("test", "--ckpt_path", merged_file)
    assert "models={'cats'" in failure.value.code and "--models.cats=" in failure.value.code
    done = command("test", "--ckpt_path", merged_file, f"--models.cats={GIVEN}", f"--models.dogs={GIVEN}")
    assert {"cats/test_loss", "dogs/test_loss"} <= set(done.trainer.callback_metrics)
    with pytest.raises(SystemExit) as failure:
        command("test", "--ckpt_path", merged_file, "--models.cats=helpers.cli_user.Nothing")
    assert "'helpers.cli_user.Nothing' cannot be imported" in failure.value.code
    models = {"cats": {"class_path": "helpers.cli_user.UnrecordedNet", "init_args": {"width": 5}}}
    capsys.readouterr()
    inspect(ckpt_path=merged_file, models=models | {"dogs": models["cats"]})
    assert "stem.0" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"--models.cats: .*UnrecordedNet cannot be made with \{'size': 1\}"):
        export(merged_file, "x.onnx", models={"cats": {**models["cats"], "init_args": {"size": 1}}})


def test_the_error_in_python_names_the_argument(merged_file):
    with pytest.raises(CheckpointError, match=r"models=\{'cats'.*--models.cats="):
        MultiHeadModule.load_from_checkpoint(merged_file)
