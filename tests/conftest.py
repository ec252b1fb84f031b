import warnings

import pytest
import torch
from helpers import untouched

untouched.install()


@pytest.fixture(autouse=True)
def _quiet_and_repeatable(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MPLBACKEND", "agg")
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _sources_stay_as_they_are(request):
    """Every call of a public function asserts it; a test that changes its sources itself says so by a marker."""
    if request.node.get_closest_marker("changes_sources"):
        with untouched.guard.suspended():
            yield
    else:
        yield
