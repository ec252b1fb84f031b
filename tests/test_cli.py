from __future__ import annotations

import csv
import runpy
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from helpers.cli_user import Data, LitNet, OneLoader, SizedNet, TestedData, TrainedData, TypedNet, UnrecordedNet
from helpers.processes import run as run_processes
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from lightning_zipit import MultiHeadModule, Range, ZipIt, ZipItCLI, ZipItTrainer, trace
from lightning_zipit._lightning.cli import main
from lightning_zipit.errors import CheckpointError, ConfigurationError
from lightning_zipit.matchers import Average, GreedyZip, Permute
from lightning_zipit.refine import BatchNorm, LeastSquares, Repair
from lightning_zipit.task_vectors import Ties

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SOURCES = ["--checkpoints.cats", "a.ckpt", "--checkpoints.dogs", "b.ckpt", "--backbone", "net"]
BY_PATH = ["--model=helpers.cli_user.LitNet", "--data=helpers.cli_user.Data"]


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])


def cli(*args, model=LitNet, data=Data):
    return ZipItCLI(model, data, args=[*args[:1], *QUIET, "--seed_everything=1", *args[1:]])


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
    assert "the checkpoint file of each task" in shown and "lightning_zipit.matchers.Permute" in shown


def test_a_merge_writes_one_file_that_loads_without_the_command_line(folder, capsys):
    cli("merge", *SOURCES, "--stop_at=stem", "--output=ab.ckpt")
    assert names(folder) == ["a.ckpt", "ab.ckpt", "b.ckpt"]
    merged = MultiHeadModule.load_from_checkpoint("ab.ckpt")
    outputs = merged(torch.randn(2, 1, 8, 8))
    assert {task: output.shape for task, output in outputs.items()} == {"cats": (2, 3), "dogs": (2, 3)}
    shown = capsys.readouterr().out
    assert "similarity" in shown and "ab.ckpt" in shown


def test_a_merged_checkpoint_is_merged_with_another(folder):
    cli("merge", *SOURCES, "--stop_at=stem", "--output=ab.ckpt")
    again = ["--checkpoints.pets=ab.ckpt", "--checkpoints.birds=a.ckpt", "--backbone=net", "--weights.pets=3"]
    cli("merge", *again, "--weights.birds=1", "--stop_at=stem", "--output=abc.ckpt")
    assert MultiHeadModule.load_from_checkpoint("abc.ckpt").tasks == ["cats", "dogs", "birds"]


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
        (["--matcher=CCA", "--matcher.gamma=0.3"], "CCA", {"gamma": 0.3}),
        (["--matcher=lightning_zipit.matchers.Average"], "Average", {}),
    ],
)
def test_a_matcher_is_named_by_its_class_or_class_path(capsys, flags, name, arguments):
    with pytest.raises(SystemExit):
        cli("merge", *SOURCES, *flags, "--print_config")
    matcher = yaml.safe_load(capsys.readouterr().out)["matcher"]
    assert matcher["class_path"] == f"lightning_zipit.matchers.{name}"
    assert matcher.get("init_args", {}) == arguments


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--refine=null"], {"refine": None}),
        (["--refine=least_squares"], {"refine": "least_squares"}),
        (["--refine=LeastSquares", "--refine.positions=32"], {"refine": LeastSquares(positions=32)}),
        (["--refine=lightning_zipit.refine.Repair"], {"refine": Repair()}),
        (["--refine=BatchNorm", "--refine.per_task=true"], {"refine": BatchNorm(per_task=True)}),
        (["--weights.cats=2", "--weights.dogs=1"], {"weights": {"cats": 2.0, "dogs": 1.0}}),
        (["--width=1.5"], {"width": 1.5, "flops": None}),
        (["--width=auto", "--flops=1.2"], {"width": "auto", "flops": 1.2}),
        (["--width.stem=0.5", "--width.body=2"], {"width": {"stem": 0.5, "body": 2.0}}),
        (["--matcher=Average", "--combine=Ties", "--combine.density=0.3"], {"combine": Ties(density=0.3)}),
    ],
)
def test_settings_are_given_as_flags(folder, flags, expected, monkeypatch):
    seen = {}
    monkeypatch.setattr(ZipIt, "merge", lambda self, *_, **arguments: seen.update(arguments))
    with suppress(Exception):  # what comes after has nothing to work on
        cli("merge", *SOURCES, *flags)
    assert {name: seen[name] for name in expected} == expected


def test_a_sweep_is_a_subcommand_whose_settings_are_lists(folder, capsys):
    (folder / "sweep.yaml").write_text(
        "checkpoints: {cats: a.ckpt, dogs: b.ckpt}\nbackbone: net\nmetric: val_loss\nmode: min\n"
        "stop_at: [stem, null]\nrefine: [null, batch_norm]\noutput: best.ckpt\nplot: sweep.png\n"
        "matcher:\n- Permute\n- class_path: GreedyZip\n  init_args: {alpha: 0.3}\n"
    )
    cli("sweep", "--config", "sweep.yaml", data=TestedData)
    assert names(folder) == [
        "a.ckpt",
        "b.ckpt",
        "best.ckpt",
        "sweep.csv",
        "sweep.png",
        "sweep.safetensors",
        "sweep.yaml",
    ]
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["network"] for row in rows] == ["ensemble", *["merged"] * 8]
    best = min(rows[1:], key=lambda row: (float(row["val_loss"]), int(row["total_flops"])))
    merged = MultiHeadModule.load_from_checkpoint("best.ckpt")
    assert merged.report.merged.flops == int(best["total_flops"]) and "× one source" in capsys.readouterr().out


def test_settings_of_a_sweep_are_given_as_flags(folder, monkeypatch):
    seen = {}
    lists = (
        "--stop_at=[stem,null]",
        "--alpha=[0.1,0.5]",
        "--similarity=[cosine,absolute]",
        "--matcher=[Permute,Average]",
    )
    with monkeypatch.context() as patch:
        patch.setattr(ZipIt, "sweep", lambda self, *_, **arguments: seen.update(arguments))
        cli(
            *("sweep", *SOURCES, *lists, "--width=1.2", "--refine=null"),
            *("--labels.cats=[0,2,4]", "--labels.dogs=[1,3,5]"),
        )
    assert seen["stop_at"] == ["stem", None] and seen["alpha"] == [0.1, 0.5] and seen["beta"] is None
    assert seen["width"] == 1.2 and seen["refine"] is None and seen["similarity"] == ["cosine", "absolute"]
    assert seen["classes"] == {"cats": [0, 2, 4], "dogs": [1, 3, 5]} and seen["matcher"] == [Permute(), Average()]
    with monkeypatch.context() as patch:
        patch.setattr(ZipIt, "sweep", lambda self, *_, **arguments: seen.update(arguments))
        ranges = ("--alpha.low=0.1", "--alpha.high=0.5", "--width={low: 0.5, high: 1, log: true}")
        cli("sweep", *SOURCES, *ranges, "--trials=7", "--share=2/8")
    assert (seen["alpha"], seen["width"]) == (Range(0.1, 0.5), Range(0.5, 1, log=True))
    assert (seen["trials"], seen["share"]) == (7, "2/8")
    message = message_of("sweep", *SOURCES, "--stop_at=nothere", "--metric=val_loss")
    assert "'nothere'" in message and "`val_dataloader`" in message
    with pytest.raises(SystemExit):
        cli("sweep", *SOURCES, "--matcher=GreedyZip", "--matcher.alpha=3")
    assert names(folder) == ["a.ckpt", "b.ckpt"]


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


def python_m(*words):
    """What ``python -m lightning_zipit`` does."""
    sys.argv[1:] = words
    runpy.run_module("lightning_zipit", run_name="__main__")


def test_an_error_on_the_command_line_has_exit_code_1_and_no_traceback(folder):
    words = ["merge", *QUIET, *BY_PATH, *SOURCES, "--checkpoints.birds=nothere.ckpt"]
    (done,) = run_processes(python_m, [words], folder)
    assert done.code == 1
    assert "error: The checkpoint file nothere.ckpt of task 'birds' does not exist" in done.errors
    assert "Traceback" not in done.errors
    assert names(folder) == ["a.ckpt", "b.ckpt"]


def test_a_matcher_that_cannot_be_is_a_usage_error(folder, capsys):
    assert message_of("merge", *SOURCES, "--matcher.alpha=2") == 2
    shown = capsys.readouterr().err
    assert "--matcher GreedyZip: `alpha` must lie between 0 and 1, got 2.0" in shown and "usage:" in shown


def test_hooks_run_before_and_after_a_merge(folder):
    class WithHooks(ZipItCLI):
        def before_merge(self):
            assert not Path("merged.ckpt").exists()
            self.before = type(self.model)

        def after_merge(self):
            assert Path("merged.ckpt").exists()
            self.after = type(self.trainer.lightning_module)

    merging = WithHooks(LitNet, Data, args=["merge", *QUIET, *SOURCES])
    assert (merging.before, merging.after) == (LitNet, MultiHeadModule)


def test_a_merge_can_test_what_it_made(folder):
    tested = cli("merge", *SOURCES, "--test", data=TestedData).trainer.callback_metrics
    assert set(tested) == {"cats/test_loss", "dogs/test_loss"}
    assert "no `test_dataloader`" in message_of("merge", *SOURCES, "--test=true", "--output=other.ckpt")
    assert names(folder) == ["a.ckpt", "b.ckpt", "merged.ckpt"]


def test_options_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("PL_MERGE__BACKBONE", "net")
    monkeypatch.setenv("PL_MERGE__STOP_AT", "stem")
    ZipItCLI(LitNet, Data, args=["merge", *QUIET, *SOURCES[:4]], parser_kwargs={"default_env": True})
    monkeypatch.setenv("PL_MERGE__OUTPUT", "installed.ckpt")
    main(["merge", *QUIET, *BY_PATH, *SOURCES[:4]])
    for path in ("merged.ckpt", "installed.ckpt"):
        assert MultiHeadModule.load_from_checkpoint(path)._record["stop_at"] == "stem"


def test_required_arguments_of_the_model_are_those_of_the_checkpoints(folder, capsys):
    cli("merge", *SOURCES, model=SizedNet)
    tested = cli("test", "--ckpt_path=merged.ckpt", "--trainer.logger=false", model=SizedNet, data=TestedData)
    assert isinstance(tested.model.sources["dogs"], SizedNet)
    assert message_of("test", model=SizedNet) == 2
    assert "required: --model.width, unless --ckpt_path is a merged checkpoint" in capsys.readouterr().err
    (folder / "merged.ckpt").unlink()
    forget_hyperparameters(folder)
    assert "'width'" in message_of("merge", *SOURCES, model=SizedNet)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_merged_checkpoint_runs_in_place_of_the_model(folder, command, monkeypatch):
    monkeypatch.setattr(LitNet, "validation_step", LitNet.test_step, raising=False)
    monkeypatch.setattr(LitNet, "predict_step", lambda net, batch, index: net(batch[0]))
    merged = cli("merge", *SOURCES).trainer.lightning_module
    run = cli(command, "--ckpt_path=merged.ckpt", "--trainer.logger=false", data=TestedData)
    assert same_weights(run.trainer.lightning_module, merged)
    if command != "predict":
        assert set(run.trainer.callback_metrics) == {"cats/test_loss", "dogs/test_loss"}


def test_the_installed_command_tests_a_merged_checkpoint_without_a_model(folder, capsys):
    cli("merge", *SOURCES)
    quiet = [*QUIET, "--trainer.logger=false", "--data=helpers.cli_user.TestedData"]
    main(["test", *quiet, "--ckpt_path=merged.ckpt"])
    assert "dogs/test_loss" in capsys.readouterr().out
    (folder / "config.yaml").unlink()
    with pytest.raises(SystemExit) as one_loader:
        main(["test", *quiet[:-1], "--data=helpers.cli_user.OneLoader", "--ckpt_path=merged.ckpt"])
    assert "1 dataloader for 2 tasks" in one_loader.value.code
    with pytest.raises(SystemExit):
        main(["test", *quiet, "--ckpt_path=a.ckpt"])
    assert "--model, unless --ckpt_path is a merged checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["test"], ["fit", "--trainer.max_steps=3"]])
def test_a_trained_checkpoint_says_what_its_model_is(folder, command):
    run = cli(*command, "--ckpt_path=a.ckpt", "--trainer.logger=false", "--model.width=7", data=OneLoader)
    assert run.model.net.stem[0].out_channels == 5
    assert run.model.hparams_initial["width"] == 5 and "_instantiator" in run.model.hparams
    trained = torch.load("a.ckpt", weights_only=True)["state_dict"]["net.stem.0.weight"]
    assert torch.equal(run.model.net.stem[0].weight, trained) == (command == ["test"])
    assert run.trainer.global_step == (3 if command[0] == "fit" else 0)


def test_a_merge_reads_the_configuration_of_a_fit(trained, folder):
    config = trained / "runs" / "a" / "config.yaml"
    merging = ZipItCLI(LitNet, Data, args=["merge", "--config", str(config), *QUIET, *SOURCES])
    assert merging.model.hparams["width"] == 5 and names(folder) == ["a.ckpt", "b.ckpt", "merged.ckpt"]


def test_plain_weights_are_loaded_into_the_model_given(folder):
    recorded = cli("merge", *SOURCES).trainer.lightning_module
    for name in "ab":
        weights = torch.load(f"{name}.ckpt", weights_only=True)["state_dict"]
        torch.save(weights, f"{name}.pt")
        save_file(weights, f"{name}.safetensors")
    for kind in ("pt", "safetensors"):
        sources = [word.replace(".ckpt", f".{kind}") for word in SOURCES]
        assert same_weights(recorded, cli("merge", *sources, "--model.width=5").trainer.lightning_module)
    torch.save({"weights": weights}, "b.ckpt")
    assert "b.ckpt is neither a Lightning checkpoint" in message_of("merge", *SOURCES)


def test_a_merged_checkpoint_is_fine_tuned_and_training_goes_on(folder):
    merged = cli("merge", *SOURCES).trainer.lightning_module

    def fit(path, *args, epochs=1):
        root = f"--trainer.default_root_dir=run{len(names(folder))}"
        args = (f"--ckpt_path={path}", root, f"--trainer.max_epochs={epochs}", *args)
        return cli("fit", "--trainer.logger=false", *args, data=TrainedData).trainer

    first = fit("merged.ckpt")
    assert first.optimizers[0].param_groups[0]["lr"] == 0.1 and first.global_step == 3
    assert not same_weights(first.lightning_module, merged)
    first.save_checkpoint("tuned.ckpt")
    assert fit("tuned.ckpt", epochs=2).global_step == 6
    (chosen,) = fit("merged.ckpt", "--optimizer=Adam", "--optimizer.lr=0.01").optimizers
    assert isinstance(chosen, torch.optim.Adam)
    assert chosen.param_groups[0]["lr"] == 0.01


def test_a_damaged_checkpoint_to_test_is_named(folder):
    (folder / "b.ckpt").write_bytes((folder / "a.ckpt").read_bytes()[:2000])
    assert "b.ckpt cannot be read" in message_of("test", "--ckpt_path=b.ckpt")


def test_sources_may_be_of_different_classes(folder):
    other = "--classes.dogs=helpers.cli_user.ScoredNet"
    tested = cli("merge", *SOURCES, other, "--test", data=TestedData).trainer.callback_metrics
    assert set(tested) == {"cats/test_loss", "dogs/score"}
    wrong = ["--classes.birds=helpers.cli_user.ScoredNet", "--classes.dogs=helpers.cli_user.NoNet"]
    message = message_of("merge", *SOURCES, *wrong)
    assert "'birds'" in message and "NoNet" in message


def test_a_class_that_a_checkpoint_names_is_imported_only_if_the_user_says_so(folder):
    (folder / "not_yet_imported.py").write_text("from helpers.cli_user import LitNet\n\nclass OwnNet(LitNet): pass\n")
    checkpoint = torch.load("b.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "not_yet_imported.OwnNet"
    torch.save(checkpoint, "b.ckpt")
    allowed = "--classes.dogs=not_yet_imported.OwnNet"
    assert allowed in message_of("merge", *SOURCES) and "not_yet_imported" not in sys.modules
    main(["merge", *QUIET, *BY_PATH, *SOURCES, allowed])
    assert type(MultiHeadModule.load_from_checkpoint("merged.ckpt").sources["dogs"]).__name__ == "OwnNet"


def test_a_checkpoint_with_other_objects_is_read_only_if_the_user_says_so(folder):
    checkpoint = torch.load("b.ckpt", weights_only=True)
    torch.save({**checkpoint, "note": GreedyZip()}, "b.ckpt")
    message = message_of("merge", *SOURCES)
    assert "b.ckpt" in message and "GreedyZip" in message and "--weights_only=false" in message
    cli("merge", *SOURCES, "--weights_only=false")
    torch.load("merged.ckpt", weights_only=True)


def test_hyperparameters_that_are_objects_are_made_again(folder):
    fit = ["--trainer.logger=false", "--trainer.max_steps=1", "--model.activation=Hardtanh"]
    fitted = cli("fit", *fit, "--model.activation.max_val=0.5", model=TypedNet)
    for name in ("a", "b"):
        fitted.trainer.save_checkpoint(f"{name}.ckpt")
    merged = cli("merge", *SOURCES, model=TypedNet).trainer.lightning_module
    loaded = MultiHeadModule.load_from_checkpoint("merged.ckpt")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(x), merged(x), rtol=0, atol=0)
    assert any(getattr(module, "max_val", None) == 0.5 for module in loaded.trunk.modules())


def test_what_a_merge_would_tie_is_shown_without_data(folder, capsys):
    cli("merge", *SOURCES, "--stop_at=stem")
    capsys.readouterr()
    tables = []
    for args in (
        ["--model=helpers.cli_user.LitNet", "--arguments.width=5", "--backbone=net", "--stop_at=stem"],
        ["--model=helpers.cli_user.SizedNet", "--ckpt_path=a.ckpt", "--backbone=net", "--stop_at=stem"],
        ["--ckpt_path=merged.ckpt", "--svg=net.svg"],
    ):
        main(["inspect", *args])
        tables.append(capsys.readouterr().out)
    table = str(trace(LitNet(5).net, "stem"))
    assert "stem.0.weight" in table and all(shown.startswith(table) for shown in tables)
    assert (folder / "net.svg").read_text().startswith("<svg")


def test_tasks_keep_their_stems(folder, capsys):
    cli("merge", *SOURCES, "--start_at=body", "--output=ab.ckpt")
    merged = MultiHeadModule.load_from_checkpoint("ab.ckpt")
    assert list(merged.stems) == ["cats", "dogs"] and merged.report.spaces[0].name == "stem"
    capsys.readouterr()
    main(["inspect", "--ckpt_path=ab.ckpt"])
    main(["inspect", "--model=helpers.cli_user.LitNet", "--arguments.width=5", "--backbone=net", "--start_at=body"])
    assert capsys.readouterr().out == 2 * (str(trace(LitNet(5).net, start_at="body")) + "\n")
    cli("sweep", *SOURCES, "--start_at=[body, null]", "--metric=val_loss", "--mode=min", data=TestedData)
    with open("sweep.csv", newline="") as file:
        assert [row["start_at"] for row in csv.DictReader(file)][1:] == ["body", "none"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Give --model or --ckpt_path"),
        (["--model=helpers.cli_user.SizedNet"], "--arguments.NAME=VALUE"),
        (["--model=helpers.cli_user.NoNet"], "NoNet"),
        (["--model=helpers.cli_user.Data"], "not an nn.Module"),
        (["--model=helpers.cli_user.LitNet", "--backbone=nett"], "Its submodules are net"),
        (["--ckpt_path=a.ckpt", "--backbone=net"], "--model=CLASS_PATH"),
        (["--model=helpers.cli_user.LitNet", "--svg=no/folder/net.svg"], "`svg`"),
    ],
)
def test_what_cannot_be_shown_is_explained(folder, args, message):
    with pytest.raises(SystemExit) as failure:
        main(["inspect", *args])
    assert message in failure.value.code


def test_the_installed_command_exports(folder, capsys):
    cli("merge", *SOURCES)
    main(["export", "--ckpt_path=merged.ckpt", "--output=merged.pt2"])
    assert "outputs cats, dogs" in capsys.readouterr().out
    outputs = torch.export.load("merged.pt2").module()(torch.randn(3, 1, 8, 8))
    assert list(outputs) == ["cats", "dogs"]
    with pytest.raises(SystemExit) as failure:
        main(["export", "--ckpt_path=a.ckpt", "--output=a.pt2"])
    assert "a.ckpt is not a checkpoint of a merged module" in failure.value.code


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge", "--checkpoints.TASK FILE"),
        ("test", "If --ckpt_path is a merged checkpoint, omit the model"),
        ("inspect", "must be merged together"),
        ("export", "--batch_size"),
        (None, '"inspect" prints'),
    ],
)
def test_help_is_for_a_person(capsys, command, words):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"] if command else ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and words in " ".join(shown.split())
    assert shown.startswith("usage: lightning-zipit") and len(shown.partition("\n\n")[0].splitlines()) < 6
