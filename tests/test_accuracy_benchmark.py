"""The accuracy benchmark from images on disk to its page, on noise."""

import csv
import gzip
import re

import numpy as np
import pytest
import torch
from accuracy import merging, networks
from accuracy.__main__ import main
from accuracy.data import Images, Split, read_idx, save, shifted
from accuracy.experiments import make_groups
from accuracy.page import as_pages
from accuracy.results import Row, average, choose
from PIL import Image
from torch import nn

from lightning_zipit.matchers import GreedyZip

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A few noisy images of one colour for each class."""
    folder = tmp_path_factory.mktemp("cifar10")
    random = np.random.RandomState(0)
    for part, count in (("train", 6), ("test", 2)):
        for number, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 100, (32, 32, 3)) + 15 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.jpg")
    return folder


def row(pair="seed 0", setting="", held=50.0, joint=60.0, **other):
    values = {"group": "resnet20x1-ce", "sources": "", "stage": "20/20", "matcher": "zip", "refine": "batch_norm"}
    numbers = {"held_mean": 0.0, "mean": 70.0, "tasks": "A=1 B=2", "flops": 10, "parameters": 5, "seconds": 1.0}
    return Row(**values | numbers | {"pair": pair, "setting": setting, "held_joint": held, "joint": joint} | other)


@pytest.fixture
def tiny(monkeypatch):
    """A network of two layers in place of ResNet-20, and two settings of zip."""

    def make(_, outputs):
        layers = [
            nn.Conv2d(3, 6, 3, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))

    monkeypatch.setitem(networks.ARCHITECTURES, "resnet20", make)
    monkeypatch.setitem(merging.MATCHERS, "zip", [GreedyZip(), GreedyZip(0.5, 0.5)])


def command(images, tmp_path, **options):
    """Run the benchmark; returns its pages by name."""
    counts = {
        "calibration-images": 20,
        "held-out-images": 20,
        "test-images": 20,
        "epochs": 1,
        "stages": "20/20",
        "threads": 1,
    }
    paths = {"data": images, "cache": tmp_path / "cache", "write": tmp_path / "pages"}
    words = [f"--{name} {value}" for name, value in (paths | counts | options).items()]
    main(" ".join(words).split())
    return {path.stem: path.read_text() for path in paths["write"].glob("*.md")}


def results(tmp_path):
    (path,) = tmp_path.rglob("results-*.csv")
    return path


def test_a_second_run_does_nothing_new(images, tmp_path, tiny):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "resnet20x1-ce.md").write_text("Before\n<!-- measured -->\nold\n<!-- end -->\nAfter\n")
    options = {
        "groups": "resnet20x1-ce",
        "seeds": "0 1",
        "refine": "batch_norm least_squares",
        "matchers": "permute zip",
    }
    pages = command(images, tmp_path, **options)
    page = pages["resnet20x1-ce"]
    text = results(tmp_path).read_text()
    networks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("resnet20*.pt")}
    rows = list(csv.DictReader(text.splitlines()))
    assert len(networks) == 4 and len(rows) == 2 * (1 + 2 * 3)  # the ensemble, permute, and zip in two settings
    assert {row["matcher"] for row in rows} == {"ensemble", "permute", "zip"}
    with (tmp_path / "pages" / "means.csv").open() as file:
        means = list(csv.DictReader(file))
    assert len(means) == 5
    for row in means:
        assert f"{float(row['joint']):.1f} ± {float(row['joint_std']):.1f} / {float(row['mean']):.1f}" in page
    assert page.startswith("Before\n<!-- measured -->\n# CIFAR-10 5+5") and page.endswith("<!-- end -->\nAfter\n")
    assert "*45.4 / 80.4*" in page  # the paper's
    plots = {path.stem for path in (tmp_path / "pages").glob("*.png")}
    assert pages.keys() == plots == {"resnet20x1-ce", "least-squares"}

    assert command(images, tmp_path, **options) == pages
    assert results(tmp_path).read_text() == text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("resnet20*.pt")} == networks


def test_matchers_that_look_at_other_activations_have_statistics_of_their_own(images, tmp_path, tiny):
    options = {"groups": "resnet20x1-ce", "seeds": 0, "refine": "least_squares", "settings": 1}
    command(images, tmp_path, **options, matchers="permute cca")
    found = [row["matcher"] for row in csv.DictReader(results(tmp_path).read_text().splitlines())]
    assert found == ["ensemble", "permute", "cca"]


def test_a_run_that_was_killed_goes_on(images, tmp_path, tiny):
    options = {"groups": "resnet20x1-ce", "seeds": 0, "refine": "none"}
    command(images, tmp_path, **options, matchers="permute")
    lines = results(tmp_path).read_text().splitlines(keepends=True)
    results(tmp_path).write_text("".join(lines[:-1]) + lines[-1][:40])
    command(images, tmp_path, **options, matchers="permute average")
    found = [row["matcher"] for row in csv.DictReader(results(tmp_path).read_text().splitlines())]
    assert found[:1] + found[-2:] == ["ensemble", "permute", "average"]


def test_training_goes_on_with_the_last_whole_epoch(images, tmp_path, tiny, monkeypatch):
    epochs, step = [], networks.Classifier.training_step

    def watched(self, batch, index):
        epochs.append(self.current_epoch)
        if epochs == [0, 1]:
            raise RuntimeError("killed")
        return step(self, batch, index)

    monkeypatch.setattr(networks.Classifier, "training_step", watched)
    options = {"groups": "resnet20x1-ce", "seeds": 0, "refine": "none", "matchers": "average"} | {"epochs": 3}
    with pytest.raises(RuntimeError, match="killed"):
        command(images, tmp_path, **options)
    command(images, tmp_path, **options)
    assert epochs == [0, 1, 1, 2, 0, 1, 2] and not list(tmp_path.rglob("*unfinished*"))


def test_heads_may_be_embeddings_of_names(images, tmp_path, tiny):
    save(torch.eye(10), tmp_path / "cache" / "cifar10-text.pt")  # in place of those of a language model
    pages = command(images, tmp_path, groups="resnet20x1-text four-tasks", seeds=0, refine="batch_norm", matchers="zip")
    (path, *_) = sorted(tmp_path.rglob("resnet20x1-text*.pt"))
    assert torch.load(path, weights_only=True)["state_dict"]["net.8.weight"].shape == (10, 8)
    assert "text-embedding heads" in pages["resnet20x1-text"] and "D=" in pages["four-tasks"]


def test_settings_are_chosen_on_held_out_images():
    pairs = ("seed 0", "seed 1")
    good = [row(pair, "good", held=60.0, joint=joint) for pair, joint in zip(pairs, (50.0, 54.0), strict=True)]
    bad = [row(pair, "bad", held=55.0, joint=90.0) for pair in pairs]
    unfinished = [row("seed 0", "unfinished", held=99.0)]
    (chosen,) = choose([*bad, *good, *unfinished])
    assert chosen == good
    assert average(chosen).joint == 52.0 and average(chosen).joint_std == pytest.approx(8**0.5)


def test_the_page_counts_where_least_squares_are_better():
    rows = [row(matcher="ensemble", stage="", refine="")]
    for matcher, fitted in (("zip", 66.0), ("permute", 58.0)):
        rows += [row(matcher=matcher), row(matcher=matcher, refine="least_squares", joint=fitted)]
    text = as_pages(rows, make_groups([0]))["least-squares"]
    assert re.search(r"\| 20/20 \| 2 \| \+2.0 / \+0.0 \| -2.0 / \+0.0 \| \+6.0 / \+0.0 \| 1 / 0 \|", text)


def test_no_image_is_used_twice():
    train, test = (Images(torch.arange(n).reshape(n, 1, 1, 1), torch.zeros(n).long()) for n in (50, 20))
    split = Split.of("a", train, test, (10, 15, 5))
    held, trained = (set(part.pixels.flatten().tolist()) for part in (split.held_out, split.train))
    calibrated = set(split.calibration.pixels.flatten().tolist())
    assert len(held) == 15 and len(split.test) == 5
    assert calibrated < trained and not held & trained and held | trained == set(range(50))


def test_classes_of_every_pair_are_dealt_out():
    for group in make_groups([0, 1, 2]).values():
        if group.name != "two-data-sets":
            for pair in group.pairs:
                assert sorted(label for task in pair.tasks.values() for label in task.classes) == list(range(10))
        assert len({task.seed for pair in group.pairs for task in pair.tasks.values()}) > len(group.pairs)


def test_idx_files(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + sizes + values.tobytes()))
    assert (read_idx(path) == values).all()


def test_shifted_images_are_parts_of_the_padded_ones():
    pixels = torch.zeros(64, 3, 9, 9, dtype=torch.uint8)
    pixels[:, :, 4, 4] = 7
    places = {tuple(place) for place in torch.nonzero(shifted(pixels, 2)[:, 0]).tolist()}
    assert {number for number, *_ in places} == set(range(64))
    assert {row for _, row, _ in places} == {2, 3, 4, 5, 6}
