"""Batch-norm folding: compute a convolution and its batch norm in one pass over the activations."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Folds:
    """Convolutions whose output is read only by one batch norm with fixed statistics.

    Args:
        networks: networks of one architecture, in eval mode.
        nodes: the nodes of their graph that are run.
        observed: the names of the nodes whose values are observed. They are not folded.
    """

    def __init__(self, networks: Sequence[nn.Module], nodes: Sequence[fx.Node], observed: Collection[str]) -> None:
        known = set(nodes)
        self.norms: dict[fx.Node, fx.Node] = {}  # convolution → its batch norm
        for node in nodes:
            users = [user for user in node.users if user in known]
            single_user = len(node.users) == len(users) == 1 and node.name not in observed
            if single_user and all(can_fold(network, node, users[0]) for network in networks):
                self.norms[node] = users[0]

    def run(self, interpreter: fx.Interpreter, node: fx.Node) -> bool:
        """Compute a convolution together with its batch norm, if this is faster.

        It is faster if scaling the weights costs less than a pass over the output. Under autocast nothing is folded,
        because autocast may run the two layers in different dtypes.

        Returns:
            Whether the node's value was computed. A folded convolution gets the value of its batch norm.
        """
        if node in interpreter.env:
            return True
        if node not in self.norms:
            return False
        x = interpreter.env[node.all_input_nodes[0]]
        conv, norm = (interpreter.fetch_attr(str(each.target)) for each in (node, self.norms[node]))
        positions = x.numel() // (conv.in_channels * math.prod(conv.stride))
        if positions < conv.weight[0].numel() or torch.is_autocast_enabled(x.device.type):
            return False
        interpreter.env[node] = interpreter.env[self.norms[node]] = fold(conv, norm, x)
        return True


def can_fold(network: nn.Module, node: fx.Node, user: fx.Node) -> bool:
    """Whether a node is a plain convolution and its user a batch norm in eval mode with running statistics."""
    if not all(each.op == "call_module" and len(each.args) == 1 and not each.kwargs for each in (node, user)):
        return False
    conv, norm = (network.get_submodule(str(each.target)) for each in (node, user))
    return (
        type(conv) in CONVOLUTIONS
        and type(norm) in NORMS
        and not norm.training
        and norm.running_var is not None
        and not any(each._forward_hooks or each._forward_pre_hooks for each in (conv, norm))
    )


def fold(conv: _ConvNd, norm: _BatchNorm, x: Tensor) -> Tensor:
    """Compute ``norm(conv(x))`` in one pass: γ/√(σ² + ε) scales the weights, the rest becomes the bias."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    return conv._conv_forward(x, weight, bias)
