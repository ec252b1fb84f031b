"""Every classification model of torchvision, and the most used of timm, merged with itself and with a permuted copy."""

import architectures
import pytest


def check(row):
    assert row.spaces > 1 and row.zipped > 0.9
    assert max(row.own_error, row.permuted_error) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.by_size())
def test_torchvision(name):
    check(architectures.examine(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.TIMM)
def test_timm(name):
    pytest.importorskip("timm", reason="needs timm, which the dev extra installs")
    check(architectures.examine(name, architectures.timm_model))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_convnext"])
def test_small_models_of_timm(name):
    pytest.importorskip("timm", reason="needs timm, which the dev extra installs")
    check(architectures.examine(name, architectures.timm_model))
