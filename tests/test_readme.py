"""The snippets of the README and of docs/, run as they are written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.nets import Lit, images, trainer

import lightning_zipit

ROOT = Path(__file__).parent.parent
PAGES = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
SNIPPETS = re.findall(r"<!-- test: (\w+).*? -->\n```(\w+)\n(.*?)```", PAGES, re.DOTALL)


def run(name, tmp_path, monkeypatch):
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
        "images": torch.randn(2, 3, 16, 16),
        "torch": torch,
        "trainer": trainer(),
    }
    for code in [code for test, _, code in SNIPPETS if test == name]:
        exec(code, scope)
    return scope


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


@pytest.mark.parametrize("name", ["width", "fold"])
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


def test_the_command_line(tmp_path, monkeypatch):
    script, command = (code for test, _, code in SNIPPETS if test == "cli")
    (tmp_path / "main.py").write_text(script)
    (tmp_path / "my_project.py").write_text(
        "from helpers.nets import Lit as LitClassifier, images\n"
        "from lightning.pytorch import LightningDataModule\n"
        "class MyDataModule(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return images()\n"
    )
    from helpers.nets import trainer

    for name in "ab":
        run_trainer = trainer(max_epochs=0)
        run_trainer.strategy.connect(Lit())
        run_trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    words = command.replace("\\\n", " ").split()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    result = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lightning_zipit.MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
