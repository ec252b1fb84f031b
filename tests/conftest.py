import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_repeatable(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MPLBACKEND", "agg")
    warnings.filterwarnings("ignore", module="lightning")
