"""What becomes of a layer's outputs before they are added to a residual stream."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.registry import Trait, traits_of


@dataclass(frozen=True)
class Branch:
    """Operators in a row that move entries and scale features, so that what goes in follows from what comes out.

    Layer scale is one (a product with a parameter), and so is the change between channels-last and channels-first.

    Attributes:
        start: the node whose value goes in.
        shape: the sizes of that, for a batch of a few samples.
        nodes: the operators in order, each of which reads the one before it.
        moves: those of them that move entries.
        products: those of them that multiply by a constant.
    """

    start: fx.Node
    shape: tuple[int, ...]
    nodes: tuple[fx.Node, ...] = ()
    moves: frozenset[fx.Node] = frozenset()
    products: frozenset[fx.Node] = frozenset()

    @property
    def end(self) -> fx.Node:
        """The node whose value comes out."""
        return self.nodes[-1] if self.nodes else self.start

    def extended(self, node: fx.Node, module: nn.Module, within: Container[fx.Node]) -> Branch | None:
        """The branch with one more operator; ``None`` where that may do anything else.

        Args:
            node: the only node that reads the end of the branch.
            module: the network.
            within: the nodes that constants may come from.
        """
        traits, moves, products = traits_of(node, module), self.moves, self.products
        if Trait.PRODUCT in traits and _times_constant(node, self.end, within):
            products = products | {node}
        elif Trait.REARRANGE in traits and node.all_input_nodes == [self.end]:
            moves = moves | {node}
        elif Trait.IDENTITY not in traits:
            return None
        return Branch(self.start, self.shape, (*self.nodes, node), moves, products)

    def places(
        self, network: nn.Module, shape: Sequence[int], device: torch.device | None = None
    ) -> tuple[Tensor, torch.Size]:
        """Where each entry of what goes in comes out.

        Args:
            network: the network.
            shape: that of what goes in.
            device: where to put the indices.

        Returns:
            Indices into the flattened outcome, of that shape, -1 for an entry that is lost; and the shape of the
            outcome.
        """
        numbers = torch.arange(math.prod(shape), device=device)
        moved = self._run(network, numbers.view(*shape), self.moves)
        places = torch.full_like(numbers, -1)
        places[moved.flatten()] = torch.arange(moved.numel(), device=device)
        return places.view(*shape), moved.shape

    def scales(self, network: nn.Module, shape: Sequence[int]) -> Tensor:
        """What each entry is multiplied by, of the shape of what goes in."""
        parameter = next(network.parameters())
        ones = torch.ones(*shape, dtype=parameter.dtype, device=parameter.device)
        places, _ = self.places(network, shape, ones.device)
        return self._run(network, ones, self.moves | self.products).flatten()[places]

    def _run(self, network: nn.Module, value: Tensor, active: frozenset[fx.Node]) -> Tensor:
        """Run some of the operators on a value, and leave the others out."""
        interpreter = fx.Interpreter(network, graph=self.start.graph)
        interpreter.env = {self.start: value}
        before = self.start
        for node in self.nodes:
            if node in active:
                _compute_inputs(node, interpreter)
            interpreter.env[node] = interpreter.run_node(node) if node in active else interpreter.env[before]
            before = node
        found: Tensor = interpreter.env[before]
        return found


def _compute_inputs(node: fx.Node, interpreter: fx.Interpreter) -> None:
    for source in node.all_input_nodes:
        if source not in interpreter.env:
            _compute_inputs(source, interpreter)
            interpreter.env[source] = interpreter.run_node(source)


def _times_constant(product: fx.Node, factor: fx.Node, within: Container[fx.Node]) -> bool:
    """Whether a product has a factor once, and is otherwise of parameters, buffers and numbers alone."""
    waiting = [source for source in product.all_input_nodes if source is not factor]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in within or node.op in ("placeholder", "call_module"):
            return False
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.add(node)
    return sum(source is factor for source in product.args) == 1
