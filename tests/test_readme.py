"""The snippets of the README and of docs/, run as they are written."""

import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.nets import Lit, LitSplit, images, trainer
from lightning.pytorch import LightningDataModule

import lightning_zipit
from lightning_zipit.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {page.relative_to(ROOT): page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
SNIPPET = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
MARK = re.compile(r"test: (?P<test>\w+)(?:, file: (?P<file>[\w.]+))?|not run: .+")
SNIPPETS = [found.groupdict() for page in PAGES.values() for found in SNIPPET.finditer(page)]


class Data(LightningDataModule):
    def train_dataloader(self):
        return images()

    def val_dataloader(self):
        return [images(16, seed=2), images(16, seed=3)]

    test_dataloader = val_dataloader


def run(name, tmp_path, monkeypatch):
    """Run all snippets of a name in one scope and folder: Python, files to write, and commands."""
    monkeypatch.chdir(tmp_path)
    scope = {
        "animals": Lit(5),
        "vehicles": Lit(5),
        "plants": Lit(4),
        "pretrained": Lit(9),
        "animal_images": images(),
        "vehicle_images": images(seed=1),
        "plant_images": images(seed=2),
        "animal_validation": images(16, seed=2),
        "vehicle_validation": images(16, seed=3),
        "data": Data(),
        "images": torch.randn(2, 3, 16, 16),
        "photos": LitSplit(3),
        "scans": LitSplit(1),
        "photo_images": images(classes=4),
        "scan_images": images(classes=4, seed=1, channels=1),
        "pixels": torch.randn(2, 3, 16, 16),
        "gray_pixels": torch.randn(2, 1, 16, 16),
        "torch": torch,
        "trainer": trainer(),
    }
    own = [snippet for snippet in SNIPPETS if (MARK.match(snippet["mark"] or "") or {"test": None})["test"] == name]
    assert own, f"no snippet is marked with {name}"
    for snippet in own:
        if file := MARK.match(snippet["mark"])["file"]:
            Path(file).write_text(snippet["code"])
        elif snippet["language"] == "python":
            exec(snippet["code"], scope)
        else:
            for words in map(split, snippet["code"].replace("\\\n", " ").splitlines()):
                call(words, monkeypatch)
    return scope


def split(command):
    return shlex.split(command, comments=True)


def call(words, monkeypatch):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "python" else words)
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert words[0] == "lightning-zipit"
        main()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project of someone who has trained two models: ``my_project``, and their checkpoints in the folder."""
    module = types.ModuleType("my_project")
    module.LitClassifier, module.MyDataModule = Lit, Data
    monkeypatch.setitem(sys.modules, "my_project", module)
    for name in "ab":
        trained = trainer(max_epochs=0)
        trained.strategy.connect(Lit())
        trained.save_checkpoint(tmp_path / f"{name}.ckpt")


def test_every_snippet_runs_or_says_why_not():
    unmarked = [
        f"{page}: {found['code'].splitlines()[0]}"
        for page, text in PAGES.items()
        for found in SNIPPET.finditer(text)
        if not MARK.fullmatch(found["mark"] or "")
    ]
    assert not unmarked


def test_every_snippet_that_is_to_run_has_a_test():
    names = {found["test"] for snippet in SNIPPETS if (found := MARK.match(snippet["mark"] or "")) and found["test"]}
    assert names <= set(re.findall(r"\"(\w+)\"", Path(__file__).read_text()))


def test_the_driver(tmp_path, monkeypatch):
    scope = run("driver", tmp_path, monkeypatch)
    assert scope["outputs"]["vehicles"].shape == (2, 5) and (tmp_path / "merged.ckpt").exists()


def test_the_callback(tmp_path, monkeypatch):
    assert run("callback", tmp_path, monkeypatch)["zipit"].merged.tasks == ["animals", "vehicles"]


def test_statistics_of_two_sites(tmp_path, monkeypatch):
    assert run("statistics", tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


def test_a_matcher_of_ones_own(tmp_path, monkeypatch):
    scope = run("matcher", tmp_path, monkeypatch)
    for space in scope["merged"].report.spaces:
        assert space.across == space.size and space.within == 0


def test_a_matcher_of_matrices(tmp_path, monkeypatch):
    scope = run("dense", tmp_path, monkeypatch)
    assert scope["merged"].report.notes == ()
    for space in scope["merged"].report.spaces:
        assert space.across == space.size and space.lowest > 0


def test_the_line_between_two_models(tmp_path, monkeypatch):
    assert len(run("interpolate", tmp_path, monkeypatch)["losses"]) == 5


def test_merging_again(tmp_path, monkeypatch):
    assert run("again", tmp_path, monkeypatch)["everything"].tasks == ["animals", "plants", "vehicles"]


def test_stems(tmp_path, monkeypatch):
    scope = run("stems", tmp_path, monkeypatch)
    assert scope["logits"].shape == scope["outputs"]["photos"].shape == (2, 4)


def test_batch_norm_per_task(tmp_path, monkeypatch):
    assert run("per_task", tmp_path, monkeypatch)["logits"].shape == (2, 5)


def test_changes_to_a_base(tmp_path, monkeypatch):
    assert run("base", tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


def test_a_sweep(tmp_path, monkeypatch):
    scope = run("sweep", tmp_path, monkeypatch)
    assert len(scope["result"].rows) == 8 and scope["merged"].tasks == ["animals", "vehicles"]


def test_the_joint_accuracy(tmp_path, monkeypatch):
    scope = run("joint", tmp_path, monkeypatch)
    assert list(scope["metric"].compute()) == ["joint", "animals", "vehicles", "mean"]
    assert scope["metric"].temperatures == scope["temperatures"] != {"animals": 1, "vehicles": 1}


def test_a_search(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    scope = run("search", tmp_path, monkeypatch)
    assert len(scope["result"].rows) == 8 and scope["result"].best.metrics


def test_the_home_page(tmp_path, monkeypatch, capsys):
    run("home", tmp_path, monkeypatch)
    assert "vehicles/test_acc" in capsys.readouterr().out


def test_a_first_merge(tmp_path, monkeypatch, capsys):
    scope = run("first_merge", tmp_path, monkeypatch)
    accuracy = {name: float(joint) for name, joint in re.findall(r"(\w+) {'joint': ([\d.]+)", capsys.readouterr().out)}
    assert accuracy["both"] > accuracy["merged"] > 0.85 and 0.6 < scope["metric"].compute()["joint"] < accuracy["both"]
    models = {task: type(model)() for task, model in scope["models"].items()}
    assert lightning_zipit.MultiHeadModule.load_from_checkpoint("digits.ckpt", models=models).tasks == ["low", "high"]


def test_the_drawing_of_feature_spaces_is_that_of_its_snippet(tmp_path, monkeypatch):
    assert [space.size for space in run("spaces", tmp_path, monkeypatch)["graph"].spaces.values()] == [8, 16]
    assert (tmp_path / "spaces.svg").read_text() == (ROOT / "docs/images/spaces.svg").read_text()


def test_several_data_sets(tmp_path, monkeypatch):
    scope = run("datasets", tmp_path, monkeypatch)
    assert scope["merged"].tasks == ["animals", "vehicles"] and 0 <= scope["metric"].compute()["joint"] <= 1


def test_calibrating_once(tmp_path, monkeypatch):
    assert run("devices", tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


def test_serving(tmp_path, monkeypatch):
    scope = run("serving", tmp_path, monkeypatch)
    assert scope["names"] == ["animals", "vehicles"] and scope["outputs"]["vehicles"].shape == (5, 5)
    torch.testing.assert_close(scope["logits"], scope["merged"](scope["images"], task="animals"))


def test_the_method(tmp_path, monkeypatch):
    assert run("method", tmp_path, monkeypatch)["merged"].shape == (8, 6)


@pytest.mark.parametrize("name", ["width", "auto", "fold"])
def test_widths(name, tmp_path, monkeypatch):
    report = run(name, tmp_path, monkeypatch)["merged"].report
    assert any(space.width != space.size for space in report.spaces)


def test_plots(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    plt.close("all")
    assert run("plots", tmp_path, monkeypatch)["ax"].get_ylabel() == "joint accuracy in %"
    assert (tmp_path / "clusters.png").exists() and len(plt.get_fignums()) == 5
    plt.close("all")


def test_a_diagnosis(tmp_path, monkeypatch):
    assert run("diagnosis", tmp_path, monkeypatch)["finding"].message


def test_the_table(tmp_path, monkeypatch):
    assert "layer2.0.conv2" in run("trace", tmp_path, monkeypatch)["graph"].spaces


@pytest.mark.parametrize("name", ["rule", "gain", "block"])
def test_rules(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)


def test_a_sweep_in_short(tmp_path, monkeypatch):
    assert len(run("sweep_in_short", tmp_path, monkeypatch)["result"].rows) == 4


def test_vouching_for_a_module(tmp_path, monkeypatch, project):
    run("driver", tmp_path, monkeypatch)
    assert run("trust", tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


def test_the_command_line(tmp_path, monkeypatch, project, capsys):
    run("cli", tmp_path, monkeypatch)
    assert lightning_zipit.MultiHeadModule.load_from_checkpoint("merged.ckpt").tasks == ["animals", "vehicles"]
    assert "animals/test_acc" in capsys.readouterr().out
    assert {"net.svg", "merged.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_a_sweep_on_the_command_line(tmp_path, monkeypatch, project):
    run("sweep_cli", tmp_path, monkeypatch)
    assert {"sweep.csv", "sweep.png", "merged.ckpt"} <= {path.name for path in tmp_path.iterdir()}
