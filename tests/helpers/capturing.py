"""Small networks and inputs for tests of the capture."""

import copy

import torch
from torch import nn

from lightning_zipit._common.structure import flatten
from lightning_zipit.graph.capture import capture

UNSEEN = 7


def call(example, samples):
    """Positional and keyword arguments of an example of another number of samples, with new numbers."""
    torch.manual_seed(samples)
    args, kwargs = example(samples)
    return args, kwargs


def captured(network, example):
    args, kwargs = call(example, 2)
    return capture(network, kwargs if kwargs else args)


def check_replay(network, example, samples=UNSEEN):
    """Capture a network and compare the graph with it on a batch of another size."""
    torch.manual_seed(0)
    found = captured(network, example)
    args, kwargs = call(example, samples)
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        want = network(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        torch.manual_seed(0)
        got = found.run(network, *args, **kwargs)
    (one, structure), (two, expected) = flatten(got), flatten(want)
    assert structure == expected and type(got) is type(want)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    return found


def tensor(*shape):
    return lambda n: ((torch.randn(n, *shape),), {})


def tokens(n, length=6):
    return (torch.randint(0, 20, (n, length)),), {}


def module(forward, **parts):
    """A module of some parts with a forward."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Module.forward = forward
    return Module()
