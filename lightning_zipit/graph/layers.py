"""Which layers of a network can be fitted anew, and to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit.graph.registry import Trait, traits_of

Fitted: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Stop:
    """A place on the way through the layers.

    Attributes:
        node: the call of its module.
    """

    node: fx.Node

    @property
    def name(self) -> str:
        """The full name of the module."""
        return str(self.node.target)

    @property
    def input(self) -> fx.Node:
        """The node whose value the module is given."""
        return self.node.all_input_nodes[0]


@dataclass(frozen=True)
class Layer(Stop):
    """A layer with weights, and what its fit is compared with.

    Attributes:
        node: the call of the layer.
        norm: the call of the batch norm right behind it, which is fitted with it.
        target: the node whose value in the sources is the target: the layer's, its norm's, or the sum that it ends.
        beside: the other summand, where the target is a sum.
    """

    norm: fx.Node | None
    target: fx.Node
    beside: fx.Node | None = None


@dataclass(frozen=True)
class Norm(Stop):
    """A batch norm that stands by itself: its statistics are those of what reaches it."""


def layer_of(network: nn.Module, stop: Layer) -> tuple[Fitted, _BatchNorm | None]:
    """The module of a layer, and that of the norm behind it."""
    layer = network.get_submodule(stop.name)
    norm = network.get_submodule(str(stop.norm.target)) if stop.norm is not None else None
    assert isinstance(layer, LAYERS) and (norm is None or isinstance(norm, _BatchNorm))
    return layer, norm


def groups_of(layer: Fitted) -> int:
    """The number of groups whose weights are apart."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def find_stops(module: nn.Module, nodes: Sequence[fx.Node], known: Sequence[fx.Node]) -> list[Layer | Norm]:
    """The layers and norms among some nodes of a graph, in its order.

    A layer whose weights have a second use is left out.

    Args:
        module: the network.
        nodes: the nodes to look through.
        known: nodes that were run before those.
    """
    order = {node: position for position, node in enumerate((*known, *nodes))}
    calls = Counter(str(node.target) for node in order if node.op in ("call_module", "get_attr"))
    layers = [node for node in nodes if _is_layer(module, node) and calls[str(node.target)] == 1]
    stops: list[Layer | Norm] = []
    folded: set[fx.Node] = set()
    for number, node in enumerate(layers):
        end = order[layers[number + 1]] if number + 1 < len(layers) else len(order)
        layer = _describe(module, node, order, end)
        stops.append(layer)
        if layer.norm is not None:
            folded.add(layer.norm)
    stops += [Norm(node) for node in nodes if _is_norm(module, node) and node not in folded]
    return sorted(stops, key=lambda stop: order[stop.node])


def _describe(module: nn.Module, node: fx.Node, order: dict[fx.Node, int], end: int) -> Layer:
    """Follow the only use of a layer's value through its norm into a sum, as far as the next layer."""
    norm, last = None, node
    following = _only_user(module, node)
    if following is not None and _is_norm(module, following) and order.get(following, end) < end:
        norm = last = following
        following = _only_user(module, following)
    if following is not None and Trait.SUM in traits_of(following, module) and order.get(following, end) < end:
        others = [source for source in following.all_input_nodes if order.get(source, end) < order[node]]
        if len(following.all_input_nodes) == 2 and len(others) == 1 and not following.kwargs:
            return Layer(node, norm, following, others[0])
    return Layer(node, norm, last)


def _only_user(module: nn.Module, node: fx.Node) -> fx.Node | None:
    while len(node.users) == 1:
        (user,) = node.users
        if Trait.IDENTITY not in traits_of(user, module):
            return user
        node = user
    return None


def _is_layer(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and type(module.get_submodule(str(node.target))) in LAYERS


def _is_norm(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    norm = module.get_submodule(str(node.target))
    return isinstance(norm, _BatchNorm) and norm.track_running_stats and norm.affine
