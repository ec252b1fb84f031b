"""Batch norm computed with the convolution in front of it: the same values, and only where nobody could tell."""

import pytest
import torch
from torch import fx, nn

from lightning_zipit._calibration.folding import Folds, fold


def settled(norm):
    """Statistics and weights that do something."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return norm


def network(conv=None, norm=None):
    return nn.Sequential(conv or nn.Conv2d(3, 4, 3, bias=False), settled(norm or nn.BatchNorm2d(4)), nn.ReLU()).eval()


def run(model, x, observed=(), autocast=False):
    """The values of all nodes, and the names of the convolutions that were computed with their norm."""
    graph = fx.Tracer().trace(model)
    interpreter = fx.Interpreter(model, graph=graph, garbage_collect_values=False)
    folds, folded = Folds([model], list(graph.nodes), observed), []
    interpreter.args_iter = iter([x])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for node in graph.nodes:
            if not folds.run(interpreter, node):
                interpreter.env[node] = interpreter.run_node(node)
            elif node in folds.norms:
                folded.append(node.target)
        return {node.name: value for node, value in interpreter.env.items()}, folded, model(x)


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3, bias=True), nn.BatchNorm1d(4), (2, 3, 50)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=2, dilation=2, bias=False), nn.BatchNorm2d(4), (2, 4, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, (3, 1), stride=(2, 1)), nn.BatchNorm2d(4, affine=False), (2, 3, 9, 8)),
        (nn.Conv3d(3, 4, 2, padding=1), nn.BatchNorm3d(4, eps=0.1), (2, 3, 5, 5, 5)),
        (nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double(), (2, 3, 9, 8)),
    ],
)
def test_folded_convolution_equals_convolution_and_norm(conv, norm, shape):
    x = torch.randn(shape, dtype=conv.weight.dtype)
    settled(norm).eval()
    for given in (x, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x):
        value, expected = fold(conv, norm, given), norm(conv(given))
        torch.testing.assert_close(value, expected)
        assert value.stride() == expected.stride()


def test_folding_does_not_change_the_network_output():
    values, folded, expected = run(network(), torch.randn(2, 3, 9, 9))
    assert folded == ["0"]
    torch.testing.assert_close(values["output"], expected)


def test_observed_or_reused_convolution_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4))

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    model, x = network(), torch.randn(2, 3, 9, 9)
    values, folded, _ = run(model, x, observed=["_0"])
    assert not folded and torch.equal(values["_0"], model[0](x))
    values, folded, expected = run(Twice().eval(), x)
    assert not folded and torch.equal(values["output"], expected)


def test_convolutions_with_hooks_are_not_folded():
    for index in (0, 1):
        model, seen = network(), []
        model[index].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        assert not run(model, torch.randn(2, 3, 9, 9))[1]
        assert len(seen) == 2  # by the interpreter, and by the network


@pytest.mark.parametrize(
    ("norm", "training"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.InstanceNorm2d(4), False),
        (nn.BatchNorm2d(4), True),
    ],
)
def test_norm_with_batch_statistics_is_not_folded(norm, training):
    model = network(norm=norm)
    norm.train(training)
    values, folded, expected = run(model, torch.randn(2, 3, 9, 9))
    assert not folded and torch.equal(values["output"], expected)


@pytest.mark.parametrize(
    "conv",
    [nn.ConvTranspose2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))],
)
def test_other_convolutions_are_not_folded(conv):
    values, folded, expected = run(network(conv), torch.randn(2, 3, 9, 9))
    assert not folded and torch.equal(values["output"], expected)


def test_nothing_is_folded_under_autocast():
    values, folded, expected = run(network(), torch.randn(2, 3, 9, 9), autocast=True)
    assert not folded and expected.dtype == torch.bfloat16 and torch.equal(values["output"], expected)


def test_convolution_with_few_positions_is_not_folded():
    model = network(nn.Conv2d(64, 4, 3, bias=False))
    assert not run(model, torch.randn(2, 64, 9, 9))[1]
    assert run(model, torch.randn(16, 64, 9, 9))[1]
