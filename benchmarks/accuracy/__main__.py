"""Accuracy of merged networks: train the sources, merge them in every way, and write ``docs/results/accuracy/``.

    python -m benchmarks.accuracy --data DIR
    python -m benchmarks.accuracy --data DIR --groups resnet20x1-ce --seeds 0 1 2 --matchers permute zip

DIR holds CIFAR-10 as ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. ``--cache`` keeps trained networks, statistics
and one row for each finished merge. An interrupted run resumes. A run with more groups, seeds, matchers, refinements
or stages adds the missing rows. The tables show all rows in the cache.

Settings of a matcher are chosen on held-out training images. Nothing is chosen on test images.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from marks import write_between_marks

from .data import FASHION_CLASSES, Split, load_fashion, load_folder
from .experiments import Group, make_groups, ready_group
from .merging import MATCHERS, REFINEMENTS, Bench, Ways
from .networks import STAGES
from .page import as_pages, draw
from .results import Results, average, choose, write_means
from .text import embed
from .training import Sources, Training

log = logging.getLogger("accuracy")
PAGES = Path(__file__).parents[2] / "docs" / "results" / "accuracy"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = [stage for known in STAGES.values() for stage in known]
    folder = Path("/usr/share/datasets/fashion-mnist")
    cache = Path("~/.cache/lightning-zipit-accuracy").expanduser()
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    add("--fashion", type=Path, default=folder, help="the idx files of Fashion-MNIST (Debian: dataset-fashion-mnist)")
    add("--cache", type=Path, default=cache, help="folder for trained networks, statistics and results")
    add("--groups", nargs="*", choices=list(make_groups([0])), default=list(make_groups([0])), help="networks to merge")
    add("--ready", type=Path, nargs="+", help="two or more checkpoints of trained ResNet-20s to merge, too")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each group has one pair for each seed")
    add("--epochs", type=int, default=3, help="training epochs of each network")
    add("--matchers", nargs="*", choices=list(MATCHERS), default=list(MATCHERS))
    add("--settings", type=int, help="number of settings of each matcher to choose from (default: all)")
    add("--refine", nargs="*", choices=list(REFINEMENTS), default=list(REFINEMENTS))
    add("--stages", nargs="*", choices=stages, default=stages, help="depths to merge up to, as the paper names them")
    add("--calibration-images", type=int, default=1000, help="images of each data set for calibration")
    add("--held-out-images", type=int, default=2000, help="training images to choose settings on")
    add("--test-images", type=int, default=5000)
    add("--threads", type=int, help="threads of torch")
    add("--train-only", action="store_true", help="train the networks and stop")
    add("--write", type=Path, default=PAGES, help="folder for the pages, their plots and means.csv")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    known = make_groups(arguments.seeds)
    groups = [known[name] for name in arguments.groups]
    if arguments.ready:
        known["ready"] = ready_group(arguments.ready)
        groups.append(known["ready"])
    counts = (arguments.calibration_images, arguments.held_out_images, arguments.test_images)
    folder = arguments.cache / f"{arguments.epochs}epochs-{counts[0]}calibration-{counts[1]}held-out"
    splits = load_splits(arguments, groups, counts)
    embeddings = {}
    if any(group.text for group in groups):
        embeddings = {name: embed(split.classes, arguments.cache / f"{name}-text.pt") for name, split in splits.items()}
    sources = Sources(splits, folder, Training(arguments.epochs), embeddings)
    results = Results(folder / f"results-{counts[2]}test.csv")
    ways = Ways(arguments.matchers, arguments.refine, arguments.stages, arguments.settings)
    for group in groups:
        for pair in group.pairs:
            models = {task: sources.get(group, each) for task, each in pair.tasks.items()}
            if arguments.train_only:
                continue
            for row in Bench(group, pair, models, splits, folder / "statistics").run(ways, results):
                results.add(row)
                name = ", ".join(filter(None, row.key))
                log.info("%s: joint %.1f, mean %.1f (%.0f s)", name, row.joint, row.mean, row.seconds)
    write(results, known, arguments.write)


def load_splits(
    arguments: argparse.Namespace, groups: Sequence[Group], counts: tuple[int, int, int]
) -> dict[str, Split]:
    """Load the data sets of the groups."""
    needed = {task.data for group in groups for pair in group.pairs for task in pair.tasks.values()}
    splits = {}
    if "cifar10" in needed:
        classes, train = load_folder(arguments.data / "train", arguments.cache)
        _, test = load_folder(arguments.data / "test", arguments.cache)
        splits["cifar10"] = Split.of(classes, train, test, counts)
    if "fashion" in needed:
        train, test = load_fashion(arguments.fashion, "train"), load_fashion(arguments.fashion, "t10k")
        splits["fashion"] = Split.of(FASHION_CLASSES, train, test, counts)
    return splits


def write(results: Results, groups: dict[str, Group], folder: Path) -> None:
    """Write the pages, the means and the plots from all rows."""
    rows = [row for row in results.rows.values() if row.group in groups]
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in as_pages(rows, groups).items():
        write_between_marks(folder / f"{name}.md", text)
    write_means([average(rows) for rows in choose(rows)], folder / "means.csv")
    for path in draw(rows, groups, folder):
        log.info("wrote %s", path)


if __name__ == "__main__":
    main()
