"""Residual branches: the operators between a layer and the sum that adds its outputs to a residual stream."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lightning_zipit.graph.registry import Trait, traits_of


@dataclass(frozen=True)
class Branch:
    """A chain of operators that only move entries and scale features, so that it can be inverted.

    Examples are layer scale (a product with a parameter), and a change between channels-last and channels-first.

    Attributes:
        start: the node whose value is the input.
        shape: the shape of the input, for a small batch.
        nodes: the operators in order, each of which reads the previous one.
        moves: the operators that move entries.
        products: the operators that multiply by a constant.
    """

    start: fx.Node
    shape: tuple[int, ...]
    nodes: tuple[fx.Node, ...] = ()
    moves: frozenset[fx.Node] = frozenset()
    products: frozenset[fx.Node] = frozenset()

    @property
    def end(self) -> fx.Node:
        """The node whose value is the output."""
        return self.nodes[-1] if self.nodes else self.start

    def extended(self, node: fx.Node, module: nn.Module, within: Container[fx.Node]) -> Branch | None:
        """Append an operator; return ``None`` if it may do more than move entries or scale features.

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
        """Map each entry of the input to its position in the output.

        Args:
            network: the network.
            shape: the shape of the input.
            device: the device of the indices.

        Returns:
            Indices into the flattened output, of shape ``shape``, with -1 for dropped entries; and the shape of the
            output.
        """
        numbers = torch.arange(math.prod(shape), device=device)
        moved = self._run(network, numbers.view(*shape), self.moves)
        places = torch.full_like(numbers, -1)
        places[moved.flatten()] = torch.arange(moved.numel(), device=device)
        return places.view(*shape), moved.shape

    def scales(self, network: nn.Module, shape: Sequence[int]) -> Tensor:
        """Return the factor of each entry of the input, of shape ``shape``."""
        parameter = next(network.parameters())
        ones = torch.ones(*shape, dtype=parameter.dtype, device=parameter.device)
        places, _ = self.places(network, shape, ones.device)
        return self._run(network, ones, self.moves | self.products).flatten()[places]

    def _run(self, network: nn.Module, value: Tensor, active: frozenset[fx.Node]) -> Tensor:
        """Run the active operators on a value, and skip the others."""
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
    """Whether a product contains ``factor`` exactly once, and otherwise only parameters, buffers and numbers."""
    waiting = [source for source in product.all_input_nodes if source is not factor]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in within or node.op in ("placeholder", "call_module"):
            return False
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.add(node)
    return sum(source is factor for source in product.args) == 1
