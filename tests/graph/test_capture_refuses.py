"""What a capture cannot follow for all inputs is refused, with the line and a way out, or reported."""

import pytest
import torch
import torch.nn.functional as F
from helpers.capturing import captured, module, tensor
from torch import nn

from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import UnknownContainerError, flatten
from lightning_zipit.errors import CalibrationError, TraceError
from lightning_zipit.graph.capture import capture


class Cache:
    def __init__(self, keys):
        self.keys = keys


def test_a_cache_in_the_output_is_refused_with_the_way_out():
    network = module(lambda self, x: {"logits": self.fc(x), "cache": Cache(self.fc(x))}, fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"returns a Cache \(output\['cache'\]\)[\s\S]*use_cache"):
        captured(network, tensor(4))
    with pytest.raises(UnknownContainerError):
        flatten(object())


def test_sizes_that_the_forward_decides_by_are_refused():
    network = module(lambda self, x: self.fc(x).relu() if x.shape[1] > 4 else self.fc(x), fc=nn.Linear(3, 3)).eval()
    found = captured(network, tensor(6, 3))
    long, short = torch.randn(2, 9, 3), torch.randn(2, 4, 3)
    assert torch.equal(found.run(network, long), network(long))
    with pytest.raises(TraceError, match="condition"):
        found.run(network, short)
    with pytest.raises(TraceError, match="condition"):
        found.check(network, Call.of(short))


def test_a_fixed_size_is_refused_by_name():
    network = module(lambda self, x: F.max_pool1d(self.fc(x), x.size(1)), fc=nn.Linear(8, 8)).eval()
    with pytest.raises(TraceError, match=r"fixed|shape \(2, 5, 8\)"):
        captured(network, tensor(4, 8)).run(network, torch.randn(2, 5, 8))


def test_other_arguments_are_refused():
    network, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    found = captured(network, tensor(4))
    assert torch.equal(found.run(network, input=x), network(x))  # the same call
    with pytest.raises(TraceError, match="other arguments"):
        found.run(network, [x])


def decides_by_data(self, x):
    return self.fc(x) if (x.abs() < 100).all() else self.fc(x) * 2


def test_a_decision_on_data_is_reported_with_its_line():
    (decision,) = captured(module(decides_by_data, fc=nn.Linear(4, 3)), tensor(4)).decisions
    assert decision.value is True and decision.line.startswith(f"{__file__}:")


def test_a_decision_that_changes_with_the_batch_is_refused():
    network = module(lambda self, x: self.fc(x) * (2 if x.sum() > 8.5 else 1), fc=nn.Linear(2, 3))
    with pytest.raises(TraceError, match=r"decides by its data: .*test_capture_refuses\.py:\d+"):
        capture(network, torch.ones(2, 2))


def test_a_number_read_from_data_is_refused_with_its_line():
    network = module(lambda self, x: self.fc(x)[:, : int(x.argmax()) % 2 + 1], fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"that depend on the input: .*test_capture_refuses\.py:\d+"):
        capture(network, torch.eye(4)[:1])


def test_what_cannot_be_followed_is_refused_with_module_line_and_way_out():
    def forward(self, x):
        if torch.compiler.is_exporting():
            raise NotImplementedError("not for export")
        return x

    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(module(forward)), nn.Linear(4, 2))
    with pytest.raises(TraceError, match=r"`1\.0` \(Module\) at .*test_capture_refuses\.py:\d+, in forward") as error:
        capture(network, torch.rand(2, 4))
    assert "such as `0` or `2`" in str(error.value)


def test_a_size_that_data_decides_is_refused_with_its_line_and_without_noise(capfd):
    network = module(lambda self, x: self.fc(x)[: len(x[x > 0]) % 2 + 1], fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match=r"test_capture_refuses\.py:\d+"):
        capture(network, torch.eye(4)[:1])
    assert capfd.readouterr() == ("", "")


def test_a_loop_over_samples_is_refused():
    network = module(lambda self, x: torch.stack([self.fc(row) for row in x]), fc=nn.Linear(4, 3))
    with pytest.raises(TraceError, match="loop over samples"):
        capture(network, torch.rand(2, 4))


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(CalibrationError, match=r"Linear cannot take an input of shape \(3, 7\)"):
        capture(nn.Linear(4, 3), torch.randn(2, 7))


def test_a_forward_that_counts_its_calls_is_refused():
    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls

    network = module(forward, fc=nn.Linear(4, 3))
    network.calls = 0
    with pytest.raises(TraceError, match="from one call to the next"):
        captured(network, tensor(4))
    assert network.calls == 0
