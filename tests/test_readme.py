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
from lightning_zipit._lightning.cli import main

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
    own = [each for each in SNIPPETS if (MARK.match(each["mark"] or "") or {"test": None})["test"] == name]
    assert own, f"no snippet is marked with {name}"
    for each in own:
        if file := MARK.match(each["mark"])["file"]:
            Path(file).write_text(each["code"])
        elif each["language"] == "python":
            exec(each["code"], scope)
        else:
            for words in map(split, each["code"].replace("\\\n", " ").splitlines()):
                call(words, monkeypatch)
    return scope


WITH_A_TEST = set()


def snippet(*names):
    """Marks a test that runs all snippets of a name."""
    WITH_A_TEST.update(names)
    return pytest.mark.parametrize("name", names)


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
    names = {found["test"] for each in SNIPPETS if (found := MARK.match(each["mark"] or "")) and found["test"]}
    assert names == WITH_A_TEST


@snippet("driver")
def test_the_driver(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert scope["outputs"]["vehicles"].shape == (2, 5) and (tmp_path / "merged.ckpt").exists()


@snippet("callback")
def test_the_callback(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["zipit"].merged.tasks == ["animals", "vehicles"]


@snippet("statistics")
def test_statistics_of_two_sites(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


@snippet("matcher")
def test_a_matcher_of_ones_own(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    for space in scope["merged"].report.spaces:
        assert space.across == space.size and space.within == 0


@snippet("joint_matcher")
def test_a_joint_matcher_of_ones_own(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    for space in scope["merged"].report.spaces:
        assert space.across == space.size and space.samples == 0


@snippet("dense")
def test_a_matcher_of_matrices(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert scope["merged"].report.notes == ()
    for space in scope["merged"].report.spaces:
        assert space.across == space.size and space.lowest > 0


@snippet("interpolate")
def test_the_line_between_two_models(name, tmp_path, monkeypatch):
    assert len(run(name, tmp_path, monkeypatch)["losses"]) == 5


@snippet("again")
def test_merging_again(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["everything"].tasks == ["animals", "plants", "vehicles"]


@snippet("training")
def test_fine_tuning(name, tmp_path, monkeypatch):
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    monkeypatch.setattr(Lit, "training_step", training_step)
    scope = run(name, tmp_path, monkeypatch)
    assert scope["tuning"].global_step == scope["teaching"].global_step == 3
    found = scope["merged"].eval()(scope["images"])
    assert all(torch.equal(output, found[task]) for task, output in scope["distilled"](scope["images"]).items())
    assert not torch.equal(scope["tuned"](scope["images"])["animals"], found["animals"])


@snippet("stems")
def test_stems(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert scope["logits"].shape == scope["outputs"]["photos"].shape == (2, 4)


@snippet("per_task")
def test_batch_norm_per_task(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["logits"].shape == (2, 5)


@snippet("own_refinement")
def test_a_refinement_of_ones_own(name, tmp_path, monkeypatch):
    merged = run(name, tmp_path, monkeypatch)["merged"]
    assert "Mean outputs are those of the sources." in merged.report.notes


@snippet("base")
def test_changes_to_a_base(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


@snippet("sweep")
def test_a_sweep(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert len(scope["result"].rows) == 8 and scope["merged"].tasks == ["animals", "vehicles"]


@snippet("joint")
def test_the_joint_accuracy(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert list(scope["metric"].compute()) == ["joint", "animals", "vehicles", "mean"]
    assert scope["metric"].temperatures == scope["temperatures"] != {"animals": 1, "vehicles": 1}


@snippet("search")
def test_a_search(name, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    scope = run(name, tmp_path, monkeypatch)
    assert len(scope["result"].rows) == 8 and scope["result"].best.metrics


@snippet("first_merge")
def test_a_first_merge(name, tmp_path, monkeypatch, capsys):
    scope = run(name, tmp_path, monkeypatch)
    accuracy = {name: float(joint) for name, joint in re.findall(r"(\w+) {'joint': ([\d.]+)", capsys.readouterr().out)}
    assert accuracy["both"] > accuracy["merged"] > 0.85 and 0.6 < scope["metric"].compute()["joint"] < accuracy["both"]
    models = {task: type(model)() for task, model in scope["models"].items()}
    assert lightning_zipit.MultiHeadModule.load_from_checkpoint("digits.ckpt", models=models).tasks == ["low", "high"]


@snippet("spaces")
def test_the_drawing_of_feature_spaces_is_that_of_its_snippet(name, tmp_path, monkeypatch):
    assert [space.size for space in run(name, tmp_path, monkeypatch)["graph"].spaces.values()] == [8, 16]
    assert (tmp_path / "spaces.svg").read_text() == (ROOT / "docs/images/spaces.svg").read_text()


@snippet("datasets")
def test_several_data_sets(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    hits = []  # of the ensemble: the surest class of both heads
    for first, loader in ((0, scope["animal_images"]), (5, scope["vehicle_images"])):
        for x, y in loader:
            with torch.no_grad():
                surest = torch.cat([scope[task].net.eval()(x).softmax(-1) for task in ("animals", "vehicles")], -1)
            hits.append(surest.argmax(-1) == y + first)
    assert scope["merged"].tasks == ["animals", "vehicles"]
    assert scope["metric"].compute()["joint"] == pytest.approx(torch.cat(hits).float().mean().item())


@snippet("devices")
def test_calibrating_once(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


@snippet("serving")
def test_serving(name, tmp_path, monkeypatch):
    scope = run(name, tmp_path, monkeypatch)
    assert scope["names"] == ["animals", "vehicles"] and scope["outputs"]["vehicles"].shape == (5, 5)
    torch.testing.assert_close(scope["logits"], scope["merged"](scope["images"], task="animals"))


@snippet("method")
def test_the_method(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["merged"].shape == (8, 6)


@snippet("width", "auto", "fold")
def test_widths(name, tmp_path, monkeypatch):
    report = run(name, tmp_path, monkeypatch)["merged"].report
    assert any(space.width != space.size for space in report.spaces)


@snippet("plots")
def test_plots(name, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    plt.close("all")
    assert run(name, tmp_path, monkeypatch)["ax"].get_ylabel() == "joint accuracy in %"
    assert (tmp_path / "clusters.png").exists() and len(plt.get_fignums()) == 5
    plt.close("all")


@snippet("diagnosis")
def test_a_diagnosis(name, tmp_path, monkeypatch):
    assert run(name, tmp_path, monkeypatch)["finding"].message


@snippet("trace")
def test_the_table(name, tmp_path, monkeypatch):
    assert "layer2.0.conv2" in run(name, tmp_path, monkeypatch)["graph"].spaces


@snippet("gain", "block")
def test_rules(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)


@snippet("trust")
def test_vouching_for_a_module(name, tmp_path, monkeypatch, project):
    run("driver", tmp_path, monkeypatch)
    assert run(name, tmp_path, monkeypatch)["merged"].tasks == ["animals", "vehicles"]


@snippet("cli")
def test_the_command_line(name, tmp_path, monkeypatch, project, capsys):
    run(name, tmp_path, monkeypatch)
    assert lightning_zipit.MultiHeadModule.load_from_checkpoint("merged.ckpt").tasks == ["animals", "vehicles"]
    assert "animals/test_acc" in capsys.readouterr().out
    assert {"net.svg", "merged.onnx"} <= {path.name for path in tmp_path.iterdir()}


@snippet("sweep_cli")
def test_a_sweep_on_the_command_line(name, tmp_path, monkeypatch, project):
    run(name, tmp_path, monkeypatch)
    assert {"sweep.csv", "sweep.png", "merged.ckpt"} <= {path.name for path in tmp_path.iterdir()}
