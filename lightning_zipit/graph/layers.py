"""Layers and batch norms that a refinement can fit, and their targets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_zipit.graph.branch import Branch
from lightning_zipit.graph.registry import Trait, traits_of
from lightning_zipit.graph.spaces import MergeGraph

Fitted: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)

OTHER_KIND = "neither a linear layer nor a convolution of one or two dimensions"
COMPUTED = "computed weights, or hooks"
USED_AGAIN = "parameters that are used more than once"
NOT_MATCHED = "outputs that are not matched features, such as positions"
UNBATCHED = "outputs without a batch axis"
NOT_AFFINE = "no scale and shift to absorb new statistics"
TOO_MANY_INPUTS = "too many inputs"


@dataclass(frozen=True)
class Stop:
    """A node at which a refinement adapts weights.

    Attributes:
        node: the call of the module.
    """

    node: fx.Node

    @property
    def name(self) -> str:
        """The full name of the module."""
        return str(self.node.target)

    @property
    def input(self) -> fx.Node:
        """The node whose value is the module's input."""
        return self.node.all_input_nodes[0]


@dataclass(frozen=True)
class Layer(Stop):
    """A layer with weights and its target.

    Attributes:
        node: the call of the layer.
        norm: the call of the batch norm right after the layer; both are fitted together.
        branch: the operators between the layer, or its norm, and the target.
        target: the node whose value in the sources is the target: the layer, its norm, or the sum at the end of the
            branch.
        beside: the other summand if the target is a sum; it may broadcast.
    """

    norm: fx.Node | None
    branch: Branch
    target: fx.Node
    beside: fx.Node | None = None


@dataclass(frozen=True)
class Norm(Stop):
    """A batch norm without a layer right before it: its statistics become those of its input."""


class Stops(NamedTuple):
    """The layers and norms of a part of a network.

    Attributes:
        stops: layers and norms that can be fitted, in the order of the graph.
        left: all other layers and norms, and other modules with matrices, by name; the values are the reasons.
    """

    stops: list[Layer | Norm]
    left: dict[str, str]


def layer_of(network: nn.Module, stop: Layer) -> tuple[Fitted, _BatchNorm | None]:
    """Return the module of a layer, and the module of its norm."""
    layer = network.get_submodule(stop.name)
    norm = network.get_submodule(str(stop.norm.target)) if stop.norm is not None else None
    assert isinstance(layer, LAYERS) and (norm is None or isinstance(norm, _BatchNorm))
    return layer, norm


def groups_of(layer: Fitted) -> int:
    """Return the number of groups of a layer; 1 for linear layers."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def outputs_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's output tensor that holds its features."""
    return -1 if isinstance(layer, nn.Linear) else 1


def find_stops(graph: MergeGraph, module: nn.Module, nodes: Sequence[fx.Node], known: Sequence[fx.Node] = ()) -> Stops:
    """Find the layers and norms among some nodes of a graph.

    A layer is fitted once, along the axis of its features. Three kinds of layers are therefore not fitted: layers whose
    parameters are used a second time, under any name; layers of the trunk whose outputs are not the features of their
    weight in the table of axes; layers of a head that mix positions of features that are still merged.

    Args:
        graph: the merge graph.
        module: the network, or the part of it that has these nodes.
        nodes: the nodes to search.
        known: nodes that run before these nodes.
    """
    return _Search(graph, module, nodes, known).run()


class _Search:
    def __init__(
        self, graph: MergeGraph, module: nn.Module, nodes: Sequence[fx.Node], known: Sequence[fx.Node]
    ) -> None:
        self.graph, self.module, self.nodes = graph, module, nodes
        self.own = set(nodes)
        self.order = {node: position for position, node in enumerate((*known, *nodes))}
        self.uses = self._count_uses()
        self.merged = self._find_merged()

    def run(self) -> Stops:
        left: dict[str, str] = {}
        layers: list[fx.Node] = []
        norms: list[fx.Node] = []
        for node in (node for node in self.nodes if node.op == "call_module"):
            is_layer = type(self.module.get_submodule(str(node.target))) in LAYERS
            if not is_layer and not self._is_norm(node):
                continue
            if why := self._obstacle(node) if is_layer else self._obstacle_of_norm(node):
                left[str(node.target)] = why
            else:
                (layers if is_layer else norms).append(node)
        stops: list[Layer | Norm] = []
        for number, node in enumerate(layers):
            end = self.order[layers[number + 1]] if number + 1 < len(layers) else len(self.order)
            stops.append(self._describe(node, end))
        folded = {stop.norm for stop in stops if isinstance(stop, Layer)}
        stops += [Norm(node) for node in norms if node not in folded]
        fitted = {stop.name for stop in stops}
        for name in self._owners_of_matrices():
            if name not in fitted:
                left.setdefault(name, OTHER_KIND)
        return Stops(sorted(stops, key=lambda stop: self.order[stop.node]), left)

    def _owners_of_matrices(self) -> list[str]:
        """Return the called modules that own matrices, and the names of matrices that no called module owns."""
        called = {str(node.target) for node in self.nodes if node.op == "call_module"}
        owners = []
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            steps = name.split(".")
            around = (".".join(steps[:count]) for count in range(len(steps) - 1, 0, -1))
            if parameter.ndim > 1:
                owners.append(next((each for each in around if each in called), name))
        return list(dict.fromkeys(owners))

    def _traits(self, node: fx.Node) -> Trait:
        return traits_of(node, self.graph.module)  # `self.module` may lack modules that use its values

    def _obstacle(self, node: fx.Node) -> str:
        """Return the reason why a layer cannot be fitted; empty if it can."""
        layer = self.module.get_submodule(str(node.target))
        weight, rank = layer._parameters.get("weight"), len(self.graph.shapes.get(node.name, ()))
        if weight is None or layer._forward_hooks or layer._forward_pre_hooks:
            return COMPUTED
        if self._is_used_again(layer):
            return USED_AGAIN
        if rank < 2 or (rank != weight.ndim and not isinstance(layer, nn.Linear)):
            return UNBATCHED
        in_trunk = node.name in self.graph.trunk_nodes
        if node in self.merged or (in_trunk and not self._gives_features(node)):
            return NOT_MATCHED
        return ""

    def _find_merged(self) -> set[fx.Node]:
        """Return the nodes of a head that still hold merged features: those before the layers that absorb these."""
        absorbed = {crossing.node for crossing in self.graph.crossings if crossing.absorbed}
        found = {node for node in self.order if node.name in absorbed}.difference(self.own)
        for node in self.nodes:
            if found.isdisjoint(node.all_input_nodes) or self._returns_size(node):
                continue
            weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
            if node.op == "call_module":
                called = self.module.get_submodule(str(node.target))
                weights += [f"{node.target}.{name}" for name, _ in called.named_parameters()]
            if not any(any(self.graph.axes.get(name, ())) for name in weights):
                found.add(node)
        return found

    def _returns_size(self, node: fx.Node) -> bool:
        """Whether a node returns a size or a type. Nodes that return a tensor have a shape."""
        return Trait.SHAPE in self._traits(node) and node.name not in self.graph.shapes

    def _gives_features(self, node: fx.Node) -> bool:
        """Whether the outputs of a layer are the features of the first axis of its weight in the table of axes."""
        ref, *_ = self.graph.axes.get(f"{node.target}.weight", (None,))
        return ref is not None and set(ref.spaces) == set(self.graph.held.get(node.name, ()))

    def _count_uses(self) -> Counter[int]:
        """Count the uses of tensors by ``id``, because they may have several names. A call uses a module's tensors."""
        uses: Counter[int] = Counter()
        for node in self.nodes:
            if node.op == "call_module":
                called = self.module.get_submodule(str(node.target))
                uses.update({id(tensor) for tensor in (*called.parameters(), *called.buffers())})
            elif node.op == "get_attr":
                tensor = attrgetter(str(node.target))(self.module)
                uses[id(tensor)] += sum(not self._returns_size(user) for user in node.users)
        return uses

    def _is_used_again(self, module: nn.Module) -> bool:
        return any(self.uses[id(tensor)] > 1 for tensor in (*module.parameters(), *module.buffers()))

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch norm with running statistics."""
        if node.op != "call_module" or Trait.NORM not in self._traits(node):
            return False
        norm = self.module.get_submodule(str(node.target))
        return isinstance(norm, _BatchNorm) and norm.track_running_stats

    def _obstacle_of_norm(self, node: fx.Node) -> str:
        """Return the reason why a batch norm must keep its statistics; empty if they can be replaced."""
        norm = self.module.get_submodule(str(node.target))
        if norm._parameters.get("weight") is None or norm._parameters.get("bias") is None:
            return NOT_AFFINE
        return USED_AGAIN if self._is_used_again(norm) else ""

    def _describe(self, node: fx.Node, end: int) -> Layer:
        """Follow the only use of a layer's output through its norm to a sum, at most up to the next layer."""
        norm, last = None, node
        following = self._only_user(node, end)
        while following is not None and Trait.IDENTITY in self._traits(following):
            following = self._only_user(following, end)
        if following is not None and self._is_folded(node, following):
            norm = last = following
        branch = direct = Branch(last, self.graph.shapes[last.name])
        following = self._only_user(last, end)
        while following is not None and (longer := branch.extended(following, self.graph.module, self.own)):
            branch, following = longer, self._only_user(following, end)
        beside = None if following is None else self._other_summand(node, branch, following)
        if following is None or beside is None or not self._is_lossless(branch, node):
            return Layer(node, norm, direct, last)
        return Layer(node, norm, branch, following, beside)

    def _only_user(self, node: fx.Node, end: int) -> fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and self.order.get(user, end) < end else None

    def _is_folded(self, node: fx.Node, following: fx.Node) -> bool:
        """Whether a node is a batch norm whose channels are the outputs of a layer."""
        if not self._is_norm(following) or self._obstacle_of_norm(following):
            return False
        layer, shape = self.module.get_submodule(str(node.target)), self.graph.shapes.get(node.name, ())
        return range(len(shape))[outputs_axis(layer)] == 1  # otherwise its channels are positions

    def _other_summand(self, node: fx.Node, branch: Branch, following: fx.Node) -> fx.Node | None:
        """Return the other summand; ``None`` if the sum has another shape, or the summand is not known in time."""
        shapes, inputs = self.graph.shapes, following.all_input_nodes
        if following.name not in shapes or shapes[following.name] != shapes.get(branch.end.name):
            return None
        if Trait.SUM not in self._traits(following) or len(inputs) != 2:
            return None
        if len(following.args) > 2 or "alpha" in following.kwargs:  # `alpha` scales one summand
            return None
        before = [source for source in inputs if self.order.get(source, len(self.order)) < self.order[node]]
        return before[0] if len(before) == 1 and before[0].name in shapes else None

    def _is_lossless(self, branch: Branch, node: fx.Node) -> bool:
        """Whether a branch keeps every entry of its input, and scales each feature of the layer uniformly."""
        if not branch.moves and not branch.products:
            return True
        network, shape = self.graph.module, branch.shape
        if math.prod(shape) != math.prod(self.graph.shapes[branch.end.name]):
            return False
        if (branch.places(network, shape)[0] < 0).any():
            return False
        axis = outputs_axis(network.get_submodule(str(node.target)))
        scales = branch.scales(network, shape).movedim(axis, -1).flatten(0, -2)
        return bool((scales == scales[0]).all())
