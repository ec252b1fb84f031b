"""Check of a capture against the network's forward, which leaves the network unchanged."""

import copy

import pytest
import torch
from torch import nn

from lightning_zipit import MergeSettings, merge_backbones, trace
from lightning_zipit.errors import CalibrationError, TraceError
from lightning_zipit.graph.replay import agree, swapped, working_copy


class Branching(nn.Module):
    """Takes another branch while torch.fx traces it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.relu() if type(x) is torch.Tensor else x.tanh())


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x).relu()) + torch.rand(2)


def test_a_capture_that_took_another_branch_is_refused():
    with pytest.raises(TraceError, match="does not compute what its forward does"):
        trace(Branching(), verify=torch.randn(4, 5))
    with pytest.raises(TraceError, match="does not compute what its forward does"):
        nets = {"a": Branching(), "b": Branching()}
        merge_backbones(nets, [torch.randn(16, 5)], MergeSettings(refine=None, verify=False))


def test_forward_that_is_random_in_eval_mode_is_refused():
    with pytest.raises(TraceError, match="random in eval mode"):
        trace(Noisy(), verify=torch.randn(4, 5))


def test_error_names_the_shape_of_a_wrong_input():
    nets = {task: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)) for task in "ab"}
    with pytest.raises((CalibrationError, TraceError), match=r"\(\d, 7\)"):
        merge_backbones(nets, [torch.randn(16, 7)], MergeSettings(refine=None))


def test_swapped_tensors_are_restored_after_an_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net.add_module("again", net[0])  # one module under two names
    before = {name: tensor for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    others = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(RuntimeError), swapped(net, {**others, "again.weight": torch.ones(4, 3)}):
        assert not net[1].running_var.any()
        raise RuntimeError
    after = {name: tensor for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())


def test_a_working_copy_shares_memory_and_nothing_else():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    copied = working_copy(net)
    assert copied[0].weight.data_ptr() == net[0].weight.data_ptr() and not copied[0].weight.requires_grad
    copied[1].running_mean.add_(1)
    assert not net[1].running_mean.any() and net.training and not copied.training
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-7], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, float("inf")], [1.0, float("inf")], True),
        ([1.0, float("inf")], [1.0, -float("inf")], False),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([0.0, 0.0], [0.0, 1e-3], False),
    ],
)
def test_agreement_of_tensors(first, second, same):
    assert agree(torch.tensor(first), torch.tensor(second), 1e-6) == same


class Keeps(nn.Module):
    """Stores values of every forward."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2), how
        self.register_buffer("count", torch.zeros(1))
        self.cache, self.log = {}, []

    def forward(self, x):
        y = self.a(x).relu()
        if self.how == "attribute":
            self.kept = y
        elif self.how == "list":
            self.log.append(y)
        elif self.how == "dict":
            self.cache["y"] = y
        elif self.how == "buffer in place":
            self.count += 1
        elif self.how == "buffer":
            self.count = self.count + 1
        return self.c(self.b(y).relu())


@pytest.mark.parametrize("how", ["attribute", "list", "dict", "buffer in place", "buffer"])
def test_tracing_stores_nothing_in_the_users_network(how):
    nets = {task: Keeps(how).train() for task in "ab"}
    before = {task: copy.deepcopy(net) for task, net in nets.items()}
    x = torch.randn(16, 5)
    trace(nets["a"], example_input=x)
    trace(nets["a"], verify=x)
    merge_backbones(nets, [x])
    for task, net in nets.items():
        assert vars(net).keys() == vars(before[task]).keys() and net.training
        assert not net.cache and not net.log and not net.count.any()
        assert isinstance(net.count, torch.Tensor) and net.count is net._buffers["count"]
        assert isinstance(net(x), torch.Tensor)


class KeepsByHook(nn.Module):
    """Stores features of its last forward, with their autograd graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(5, 6), nn.Linear(6, 2), []
        self.a.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.kept.append(output)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_a_network_that_keeps_tensors_with_a_history_is_merged():
    nets, x = {task: KeepsByHook() for task in "ab"}, torch.randn(16, 5)
    for net in nets.values():
        net(x)
    merged = merge_backbones(nets, [x], MergeSettings(refine=None))
    assert merged.heads["a"](*merged.trunk(x)).shape == (16, 2)
    assert all(len(net.kept) == 1 and net.kept[0].grad_fn is not None for net in nets.values())
