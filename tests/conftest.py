import sys
import warnings

import pytest
import torch
from helpers import untouched
from helpers.nets import images, trainer
from helpers.strangers import Lit

from lightning_zipit import ZipIt
from lightning_zipit.graph import registry

untouched.install()

collect_ignore = ["helpers/ddp_script.py", "helpers/failing_script.py"]
"""Scripts that tests start as processes."""


@pytest.fixture(autouse=True)
def _quiet_and_repeatable(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MPLBACKEND", "agg")
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _rules_stay_as_they_are(monkeypatch):
    """A test that registers a rule registers it for itself only."""
    monkeypatch.setattr(registry, "OPERATORS", dict(registry.OPERATORS))


@pytest.fixture(autouse=True)
def _sources_stay_as_they_are(request):
    """Every call of a public function asserts it; a test that changes its sources itself says so by a marker."""
    if request.node.get_closest_marker("changes_sources"):
        with untouched.guard.suspended():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def handed_over(tmp_path_factory):
    """The content of a merged checkpoint, and of a trained one."""
    folder = tmp_path_factory.mktemp("trusted")
    run = trainer()
    sources = {"a": Lit(), "b": Lit()}
    ZipIt(run).merge(sources, images(count=16, size=8), backbone="net", refine=None, verify=False)
    run.save_checkpoint(folder / "merged.ckpt")
    run.strategy.connect(sources["a"])
    run.save_checkpoint(folder / "trained.ckpt")
    return {name: (folder / f"{name}.ckpt").read_bytes() for name in ("merged", "trained")}


@pytest.fixture
def inbox(handed_over, tmp_path, monkeypatch):
    """The working folder, with a checkpoint of each kind and a module that nobody has imported."""
    for name, content in handed_over.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    (tmp_path / "payload.py").write_text(
        "open('marker', 'w')\nfrom helpers.strangers import Lit\nclass Net(Lit): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["main.py"])
    yield tmp_path
    sys.modules.pop("payload", None)
