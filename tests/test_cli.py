from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.cli_user import Data, LitNet, UnrecordedNet
from lightning.pytorch import Trainer

from lightning_zipit import MultiHeadModule, ZipIt, ZipItCLI, ZipItTrainer
from lightning_zipit.cli import main
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.matchers import GreedyZip

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SOURCES = ["--checkpoints.cats", "a.ckpt", "--checkpoints.dogs", "b.ckpt", "--backbone", "net"]
BY_PATH = ["--model=helpers.cli_user.LitNet", "--data=helpers.cli_user.Data"]


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])


def cli(*args, model=LitNet):
    return ZipItCLI(model, Data, args=[*args[:1], *QUIET, "--seed_everything=1", *args[1:]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two checkpoints of width 5."""
    folder = tmp_path_factory.mktemp("trained")
    args = ["fit", *QUIET, "--trainer.logger=false", "--trainer.max_steps=2", "--model.width=5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py"])
        for seed, name in enumerate(("a", "b")):
            root = f"--trainer.default_root_dir={folder / 'runs' / name}"
            fitted = ZipItCLI(LitNet, Data, args=[*args, root, f"--seed_everything={seed}"])
            fitted.trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """The working folder of a test, with copies of the two checkpoints and nothing else."""
    for name in ("a.ckpt", "b.ckpt"):
        shutil.copy(trained / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def message_of(*args, model=LitNet):
    """What a command that fails prints."""
    with pytest.raises(SystemExit) as failure:
        cli(*args, model=model)
    return failure.value.code


def test_merge_is_a_subcommand_whose_help_explains_its_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        cli("merge", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for argument in ("checkpoints", "backbone", "stop_at", "matcher", "refine", "merge_heads", "output"):
        assert f"--{argument} " in shown
    assert "task name → checkpoint file" in shown and "lightning_zipit.matchers.Permute" in shown


def test_a_merge_writes_one_file_that_loads_without_the_command_line(folder, capsys):
    cli("merge", *SOURCES, "--stop_at=stem", "--output=ab.ckpt")
    assert names(folder) == ["a.ckpt", "ab.ckpt", "b.ckpt"]
    merged = MultiHeadModule.load_from_checkpoint("ab.ckpt")
    outputs = merged(torch.randn(2, 1, 8, 8))
    assert {task: output.shape for task, output in outputs.items()} == {"cats": (2, 3), "dogs": (2, 3)}
    shown = capsys.readouterr().out
    assert "similarity" in shown and "ab.ckpt" in shown


def test_flags_and_yaml_and_the_driver_give_the_same_weights(folder):
    cli(
        "merge",
        *SOURCES,
        "--stop_at",
        "body",
        "--matcher",
        "GreedyZip",
        "--matcher.alpha",
        "0.7",
        "--output=flags.ckpt",
    )
    (folder / "merge.yaml").write_text(
        "checkpoints: {cats: a.ckpt, dogs: b.ckpt}\nbackbone: net\nstop_at: body\noutput: yaml.ckpt\n"
        "matcher: {class_path: GreedyZip, init_args: {alpha: 0.7}}\n"
    )
    cli("merge", "--config", "merge.yaml")
    sources = {task: LitNet.load_from_checkpoint(path) for task, path in (("cats", "a.ckpt"), ("dogs", "b.ckpt"))}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    driven = ZipIt(trainer).merge(
        sources, datamodule=Data(), backbone="net", stop_at="body", matcher=GreedyZip(alpha=0.7)
    )
    for path in ("flags.ckpt", "yaml.ckpt"):
        assert same_weights(MultiHeadModule.load_from_checkpoint(path), driven)


@pytest.mark.parametrize(
    ("flags", "name", "arguments"),
    [
        ([], "GreedyZip", {"alpha": 0.1, "beta": 1.0}),
        (["--matcher.alpha=0.7"], "GreedyZip", {"alpha": 0.7, "beta": 1.0}),
        (["--matcher=Permute"], "Permute", {}),
        (["--matcher=lightning_zipit.matchers.Average"], "Average", {}),
    ],
)
def test_a_matcher_is_named_by_its_class_or_class_path(capsys, flags, name, arguments):
    with pytest.raises(SystemExit):
        cli("merge", *SOURCES, *flags, "--print_config")
    matcher = yaml.safe_load(capsys.readouterr().out)["matcher"]
    assert matcher["class_path"] == f"lightning_zipit.matchers.{name}"
    assert matcher.get("init_args", {}) == arguments


def test_the_hyperparameters_of_a_checkpoint_count_before_those_given(folder):
    cli("merge", *SOURCES, "--model.width=7")
    assert MultiHeadModule.load_from_checkpoint("merged.ckpt").sources["cats"].hparams["width"] == 5


def forget_hyperparameters(folder):
    for path in folder.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["hyper_parameters"]
        torch.save(checkpoint, path)


def test_a_checkpoint_without_hyperparameters_is_loaded_into_the_model_given(folder):
    recorded = cli("merge", *SOURCES).trainer.lightning_module
    (folder / "merged.ckpt").unlink()
    forget_hyperparameters(folder)
    unrecorded = cli("merge", *SOURCES, "--model.width=5", model=UnrecordedNet).trainer.lightning_module
    assert same_weights(recorded, unrecorded)


def test_a_checkpoint_that_does_not_fit_the_model_is_named_with_its_task(folder):
    forget_hyperparameters(folder)
    message = message_of("merge", *SOURCES, "--model.width=6", model=UnrecordedNet)
    assert "'cats'" in message and "a.ckpt" in message and "size mismatch" in message
    assert names(folder) == ["a.ckpt", "b.ckpt"]


def test_all_problems_are_told_at_once_and_nothing_is_written(folder):
    message = message_of("merge", "--checkpoints.cats=sub/nothere.ckpt", "--output=no/folder/m.ckpt")
    assert "at least two" in message and "sub/nothere.ckpt" in message and "no/folder" in message
    assert names(folder) == ["a.ckpt", "b.ckpt"]


def test_an_output_that_is_a_folder_or_one_of_the_sources_is_refused(folder):
    (folder / "results").mkdir()
    assert "folder" in message_of("merge", *SOURCES, "--output=results")
    before = (folder / "b.ckpt").read_bytes()
    assert "'dogs'" in message_of("merge", *SOURCES, "--output=./b.ckpt")
    assert (folder / "b.ckpt").read_bytes() == before


def test_a_damaged_checkpoint_is_named(folder):
    (folder / "b.ckpt").write_bytes(b"not a checkpoint")
    assert "b.ckpt" in message_of("merge", *SOURCES)
    assert names(folder) == ["a.ckpt", "b.ckpt"]


def test_a_problem_of_the_models_ends_the_command_with_its_message(folder):
    assert "stop_at='bdy'" in message_of("merge", *SOURCES, "--stop_at=bdy")


def test_a_merge_without_a_data_module_is_refused(folder):
    with pytest.raises(SystemExit) as failure:
        main(["merge", *QUIET, *SOURCES, "--model=helpers.cli_user.LitNet"])
    assert "calibration data" in failure.value.code


def test_a_strategy_that_loses_the_merged_module_is_refused_before_it_spawns(folder):
    assert "spawns" in message_of("merge", *SOURCES, "--trainer.strategy=ddp_spawn", "--trainer.devices=2")


def test_a_failure_while_saving_keeps_the_old_file_and_no_half_of_the_new_one(folder, monkeypatch):
    def fill_the_disk(trainer, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    (folder / "merged.ckpt").write_text("old")
    monkeypatch.setattr(ZipItTrainer, "save_checkpoint", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        cli("merge", *SOURCES)
    assert names(folder) == ["a.ckpt", "b.ckpt", "merged.ckpt"]
    assert (folder / "merged.ckpt").read_text() == "old"


def test_fit_saves_its_configuration_and_merge_leaves_it_alone(trained, folder):
    config = trained / "runs" / "a" / "config.yaml"
    assert "width: 5" in config.read_text()
    written = config.stat().st_mtime_ns
    cli("merge", *SOURCES, f"--trainer.default_root_dir={config.parent}")
    assert config.stat().st_mtime_ns == written


def test_a_logger_that_was_asked_for_is_used(folder):
    merging = cli("merge", *SOURCES, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")
    assert type(merging.trainer.logger).__name__ == "CSVLogger"


def test_a_trainer_that_cannot_merge_is_refused():
    with pytest.raises(ConfigurationError, match="ZipItTrainer"):
        ZipItCLI(LitNet, Data, trainer_class=Trainer, args=["merge"])


def test_the_installed_command_merges_classes_of_the_working_folder(folder):
    (folder / "own_classes.py").write_text("from helpers.cli_user import LitNet\n\nclass OwnNet(LitNet): pass\n")
    main(["merge", *QUIET, *SOURCES, "--model=own_classes.OwnNet", "--data=helpers.cli_user.Data", "--output=own.ckpt"])
    assert type(MultiHeadModule.load_from_checkpoint("own.ckpt").sources["dogs"]).__name__ == "OwnNet"


def test_the_trainer_merges_without_the_command_line_and_raises(folder):
    trainer = ZipItTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    merged = trainer.merge(LitNet(), Data(), checkpoints={"cats": "a.ckpt", "dogs": "b.ckpt"}, backbone="net")
    assert trainer.lightning_module is merged
    assert same_weights(MultiHeadModule.load_from_checkpoint("merged.ckpt"), merged)
    (folder / "b.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"b\.ckpt"):
        trainer.merge(LitNet(), Data(), checkpoints={"cats": "a.ckpt", "dogs": "b.ckpt"}, backbone="net")


def test_an_error_on_the_command_line_has_exit_code_1_and_no_traceback(folder):
    command = [sys.executable, "-m", "lightning_zipit", "merge", *QUIET, *BY_PATH, *SOURCES]
    search_path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, "--checkpoints.birds=nothere.ckpt"],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: There is no checkpoint file nothere.ckpt (task 'birds')" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(folder) == ["a.ckpt", "b.ckpt"]
