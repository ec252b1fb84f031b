"""FLOPs and parameters of networks, measured and predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_zipit._common.calls import Call
from lightning_zipit._common.views import Inputs, any_view, each_view
from lightning_zipit.graph import AxisRef, MergeGraph
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.table import Row, Table, bind, named_tensors

FlopCounts: TypeAlias = Mapping[tuple[str, str], float]
"""FLOPs by the name of the node and the name of its weight (``""`` for a node without a weight)."""


@dataclass(frozen=True)
class Cost:
    """FLOPs and parameters of a network.

    Attributes:
        flops: floating-point operations of the forward of one sample (a multiply-add counts as two).
        parameters: the number of parameters.
    """

    flops: int
    parameters: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


def measure_cost(module: nn.Module, x: Any) -> Cost:
    """Count the FLOPs of one forward and the parameters of a network.

    Args:
        module: a network. A copy of it runs in eval mode.
        x: an input of one sample on the network's device, or one input per task.

    Returns:
        FLOPs (by :class:`torch.utils.flop_counter.FlopCounterMode`) and parameters.
    """
    working = working_copy(module)

    def count(x: Inputs) -> Counter[str]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x.run(working) if isinstance(x, Call) else working(x)
        return Counter({"": counter.get_total_flops()})

    inputs = x if isinstance(x, Mapping) else Call.of(x)
    return Cost(_of_one_sample(working, inputs, count)[""], sum(parameter.numel() for parameter in module.parameters()))


def _of_one_sample(network: nn.Module, x: Inputs, count: Callable[[Inputs], Counter[Any]]) -> Counter[Any]:
    """Count FLOPs for one sample.

    Batch norm without running statistics fails on one sample. The count is then extrapolated from two and three
    samples.
    """

    def count_of(samples: int) -> Counter[Any]:
        return count(each_view(x, lambda one: one.repeated(samples)))

    if all(child.running_mean is not None for child in network.modules() if isinstance(child, _BatchNorm)):
        return count_of(1)
    of_two, of_three = count_of(2), count_of(3)
    return Counter({key: 2 * of_two[key] - of_three[key] for key in of_two})


def count_flops(network: nn.Module, graph: MergeGraph, x: Call) -> FlopCounts:
    """Count the FLOPs of one forward by node and weight.

    Args:
        network: a source network. A copy of it runs in eval mode.
        graph: the merge graph of the network. The position of its cut does not matter.
        x: an input of one sample, on the network's device.

    Returns:
        The counts. Their sum is the FLOPs of the network. A tied weight is counted under the first of its names.
    """
    working = working_copy(network)

    def count(x: Inputs) -> Counter[tuple[str, str]]:
        counting = _FlopInterpreter(working, graph.fx_graph)
        mapping = {operator: counting.attributed(known) for operator, known in flop_registry.items()}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping):
            counting.run(*any_view(x).tensors)
        return counting.counts

    return _of_one_sample(working, x, count)


class _FlopInterpreter(fx.Interpreter):
    """Run a graph, and attribute the FLOPs of each product to its node and weight."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        super().__init__(network, graph=graph)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.node = ""
        self.only_weight = ""
        self.weights: dict[int, str] = {}  # address of the storage → name: views share their storage
        for name, tensor in named_tensors(network).items():
            if tensor.ndim > 1:
                self.weights.setdefault(_address(tensor), name)
        # Weights that are computed from others. They are kept alive, so that no address is reused.
        self.computed: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node, self.only_weight = n.name, self._weight_inside(n)
        value = super().run_node(n)
        constants = [source.op == "get_attr" or source in self.computed for source in n.all_input_nodes]
        if isinstance(value, Tensor) and constants and all(constants):
            origins = [self._weight_in(self.env[source]) for source in n.all_input_nodes]
            if any(origins):
                self.computed[n] = value
                self.weights[_address(value)] = next(filter(None, origins))
        return value

    def _weight_inside(self, node: fx.Node) -> str:
        """Return the weight's name if a module has only one, because the module may use a tensor computed from it."""
        if node.op != "call_module":
            return ""
        inside = self.module.get_submodule(str(node.target)).parameters()
        names = {self._weight_in(parameter) for parameter in inside} - {""}
        return names.pop() if len(names) == 1 else ""

    def _weight_in(self, *values: Any) -> str:
        """Return the name of the first weight among values, or an empty string."""
        tensors = (each for each in pytree.tree_leaves(values) if isinstance(each, Tensor))
        return next((self.weights[address] for each in tensors if (address := _address(each)) in self.weights), "")

    def attributed(self, known: Callable[..., int]) -> Callable[..., int]:
        """Wrap the FLOP formula of an operator to also attribute its FLOPs to the node and the weight."""

        def count(*args: Any, **kwargs: Any) -> int:
            flops = known(*args, **kwargs)
            self.counts[self.node, self._weight_in(args, kwargs) or self.only_weight] += flops
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then passes tensors instead of shapes
        return count


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class FlopsModel:
    """The FLOPs of the merged network for any widths of its spaces.

    Attributes:
        layers: for every product with a weight, its FLOPs in a source and the axes of the weight.
        rest: the FLOPs that do not depend on the spaces.
        source: the FLOPs of one source network.
    """

    layers: tuple[tuple[float, tuple[AxisRef, ...]], ...]
    rest: float
    source: float

    @classmethod
    def of(cls, graphs: Sequence[MergeGraph], counts: Sequence[FlopCounts]) -> FlopsModel:
        """Create the model from the first network and the heads of the others.

        If the networks have stems, all nodes of all networks count, because the trunk runs once for each task.

        Args:
            graphs: the merge graph of each network.
            counts: the FLOPs of each network; see :func:`count_flops`.
        """
        products = [
            (flops, tuple(ref for ref in row if ref is not None))
            for source, (graph, count) in enumerate(zip(graphs, counts, strict=True))
            for node, flops, row in _with_rows(graph, count)
            if source == 0 or graph.stem_nodes or node not in graph.trunk_nodes
        ]
        layers = tuple((flops, refs) for flops, refs in products if refs)
        rest = sum(flops for flops, refs in products if not refs)
        return cls(layers, rest, sum(counts[0].values()))

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Compute the FLOPs of the merged network with given widths. Missing spaces keep their source width."""
        return self.rest + sum(self.of_layer(index, widths) for index in range(len(self.layers)))

    def touched_by(self, space: str) -> list[int]:
        """Return the indices of the layers whose FLOPs depend on the width of a space."""
        return [
            index
            for index, (_, refs) in enumerate(self.layers)
            if any(ref.groups == 1 and space in ref.spaces for ref in refs)
        ]

    def of_layer(self, index: int, widths: Mapping[str, int]) -> float:
        """Compute the FLOPs of one layer with given widths."""
        flops, refs = self.layers[index]
        for ref in refs:
            if ref.groups == 1:
                flops *= ref.resized(widths).size / ref.size
        return flops


def _with_rows(graph: MergeGraph, counts: FlopCounts) -> Iterator[tuple[str, float, Row]]:
    """Yield node, FLOPs and the table row of the weight, from the table of the node's part (trunk, stem or head)."""
    in_trunk, in_head = _rows_by_first_name(graph, graph.axes), _rows_by_first_name(graph, graph.head_axes)
    for (node, weight), flops in counts.items():
        rows = in_trunk if node in graph.trunk_nodes else {} if node in graph.stem_nodes else in_head
        yield node, flops, rows.get(weight, ())


def _rows_by_first_name(graph: MergeGraph, table: Table) -> dict[str, Row]:
    """Return the table row of each tensor of a network, by the first name of the tensor."""
    first: dict[int, str] = {}
    for name, tensor in named_tensors(graph.module).items():
        first.setdefault(id(tensor), name)
    return {first[id(tensor)]: row for _, tensor, row in bind(table, graph.module)}
