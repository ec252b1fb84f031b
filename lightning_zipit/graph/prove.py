"""Proof of a merge graph: permuting any of its spaces must not change the network's outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.copying import copy_module
from lightning_zipit._common.randomness import seeded
from lightning_zipit.errors import ConfigurationError, VerificationError
from lightning_zipit.graph.replay import agree, in_dtype, swapped, tensors_in
from lightning_zipit.graph.run import Run, Values, enter_inputs
from lightning_zipit.graph.spaces import Crossing, MergeGraph, unit_members, units_around, units_first
from lightning_zipit.graph.table import AxisRef, Row, Table, bind, named_tensors, row_of

SAMPLES = 2
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Tolerance of outputs, relative to the largest output, by the least precise dtype of a run."""


@dataclass(frozen=True)
class Failure:
    """A space, parameter or buffer that cannot be merged.

    Attributes:
        space: the name of the space, parameter or buffer.
        barriers: the nodes that must become barriers, because they would be given wrongly merged features.
        why: the reason, for notes and errors.
    """

    space: str
    barriers: tuple[str, ...]
    why: str


def cycle(size: int, generator: torch.Generator | None = None, second: bool = False) -> Tensor:
    """Draw a random permutation without fixed points, ``(size,)``: one cycle c through all features.

    A network that is invariant under two permutations is invariant under all permutations that they generate. A cycle c
    and a transposition t of two neighbors in it generate every permutation. The second permutation is therefore c² t,
    which has no fixed point either.

    Args:
        size: the number of features.
        generator: generators in the same state give the two permutations of one pair.
        second: return the second permutation of the pair. For three features it is t, which has one fixed point. For
            two features it is c again.
    """
    order = torch.randperm(size, generator=generator)
    first = torch.empty_like(order)
    first[order] = order.roll(1)
    if not second or size < 3:
        return first
    swap = torch.arange(size)
    swap[order[:2]] = order[:2].flip(0)
    return swap if size == 3 else first[first[swap]]


def random_permutations(
    graph: MergeGraph,
    generator: torch.Generator | None = None,
    second: bool = False,
    moving: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Draw a permutation for every space of the trunk. Pinned spaces keep their order.

    All other spaces are permuted without fixed points, if they have more than one feature. In a space with units, whole
    units are permuted, and the features within each unit.

    Args:
        graph: the merge graph.
        generator: generators in the same state give the two permutations of one pair.
        second: return the second permutation of each pair; see :func:`cycle`.
        moving: the spaces to permute; all by default. Features of other spaces move only with their units.
    """
    permutations: dict[str, Tensor] = {}
    for name in units_first(graph):
        space = graph.spaces[name]
        still = space.pinned or (moving is not None and name not in moving)
        members = (
            unit_members(space) if space.units is not None else torch.arange(space.size)[None]
        )  # (units, features)
        inner = torch.stack([cycle(members.shape[1], generator, second) for _ in members])
        if still:
            inner = torch.arange(members.shape[1]).expand_as(inner)
        permutation = torch.empty(space.size, dtype=torch.int64)
        units = permutations[space.units] if space.units is not None else torch.zeros(1, dtype=torch.int64)
        permutation[members] = members[units].gather(1, inner)
        permutations[name] = permutation
    return permutations


def permute_spaces(module: nn.Module, graph: MergeGraph, permutations: Mapping[str, Tensor]) -> nn.Module:
    """Copy a network with permuted feature spaces. The copy computes the same function.

    The weights of the heads must absorb every crossing of the graph, as with ``stop_at=None``. Spaces that a stem
    writes must keep their order.

    Args:
        module: the traced network, or another network of the same architecture.
        graph: its merge graph.
        permutations: a permutation ``(features,)`` per space. Missing spaces keep their order.

    Returns:
        The permuted copy.

    Raises:
        ConfigurationError: if a tied parameter needs two different orders.
    """
    module = copy_module(module)
    with torch.no_grad():
        for name, tensor, row in list(bind(graph.axes, module)):
            permuted = _permute(tensor, row, graph, permutations)
            tied = {other for other, found in named_tensors(module).items() if found is tensor} & {*graph.head_axes}
            for other in tied:
                if not torch.equal(permuted, _permute(tensor, graph.head_axes[other], graph, permutations)):
                    raise ConfigurationError(
                        f"`{name}` is tied to `{other}`, which needs another order of features. A copy with one tensor "
                        "for both cannot be permuted. Permute fewer spaces, or untie the two parameters first."
                    )
            tensor.copy_(permuted)
    return module


def _permute(tensor: Tensor, row: Row, graph: MergeGraph, permutations: Mapping[str, Tensor]) -> Tensor:
    """Permute the features of a parameter along each axis."""
    for axis, ref in enumerate(row):
        if ref is not None:
            tensor = ref.gather(tensor, axis, _tables(ref, graph, permutations))
    return tensor


def _tables(ref: AxisRef, graph: MergeGraph, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {space: permutations.get(space, torch.arange(graph.spaces[space].size)) for space in ref.spaces}


def verify_graph(backbone: nn.Module, graph: MergeGraph, batch: Any) -> None:
    """Prove a merge graph: permute every space at random in a copy, and compare the network's outputs.

    Args:
        backbone: the traced network.
        graph: its merge graph.
        batch: an input; its first samples are used.

    Raises:
        VerificationError: if a permutation changes the outputs; the message names every failing space.
    """
    if failing := find_failing({"": backbone}, {"": graph}, {"": Arguments.of(backbone).bind(Call.of(batch))}):
        raise VerificationError(explain(graph, failing))


def explain(graph: MergeGraph, failing: Sequence[Failure]) -> str:
    """Build the error message for spaces, parameters or buffers that cannot be merged."""
    reasons = []
    for failure in failing:
        space = graph.spaces.get(failure.space)
        written = f" (written by {', '.join(name for name, _ in space.producers[:3])})" if space else ""
        reasons.append(f"{failure.space}{written}: {failure.why}")
    return (
        f"Merging would change what the networks compute: {'; '.join(reasons)}. Either the rule of an operator that "
        "reads these features is wrong, or the network uses the index of a feature. End the trunk before that operator "
        "with `stop_at`, start the trunk after it with `start_at`, or register another rule."
    )


def find_failing(
    networks: Mapping[str, nn.Module], graphs: Mapping[str, MergeGraph], inputs: Mapping[str, Call]
) -> list[Failure]:
    """Find the spaces whose random permutation changes the outputs of the networks.

    The trunk is permuted in the first network, which represents all. The heads of every network are permuted with it.
    If a head reads features through its weights, these weights are permuted. If a head unmerges features, the features
    are restored to their order.

    Args:
        networks: the networks by task; they are not changed.
        graphs: the merge graph of each network.
        inputs: an input of each network; its first samples are used.

    Returns:
        The spaces that fail; empty if the inputs give NaN or Inf, because these prove nothing.
    """
    failing: dict[str, Failure] = {}
    handed: list[Any] | None = None
    with torch.inference_mode(False), torch.no_grad():
        for task, network in networks.items():
            proof = _start(network, graphs[task], inputs[task].first(SAMPLES).each(Tensor.detach), handed)
            if proof is None:
                return []
            for failure in (*proof.find(second=False), *proof.find(second=True)):
                failing.setdefault(failure.space, failure)
            handed = list(proof.made.values())
    return list(failing.values())


def _start(network: nn.Module, graph: MergeGraph, x: Call, handed: Sequence[Any] | None) -> _Proof | None:
    """Return the proof in the most precise dtype that the network supports; ``None`` if values are not finite."""
    own = next(
        (tensor.dtype for tensor in named_tensors(network).values() if tensor.is_floating_point()), torch.float32
    )
    dtypes = [torch.float64] * (x.device.type != "mps") + [torch.float32]
    problem: Exception | None = None
    for dtype in dict.fromkeys((*dtypes, own)):
        try:
            proofs = (_Proof(network, graph, x, dtype, vary, handed) for vary in (True, False))
            return next((proof for proof in proofs if proof.finite), None)
        except Exception as error:  # operators raise various exceptions for unsupported dtypes
            problem = error
    assert problem is not None
    raise problem


class _Proof:
    """The proof for one network in one dtype: compares trunk and head with and without permutation.

    Args:
        network: the network.
        graph: its merge graph.
        x: an input.
        dtype: the dtype.
        vary: perturb parameters whose entries are all equal.
        handed: the trunk's values from another network. If given, they are the input of the heads, and the trunk is not
            run.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: MergeGraph,
        x: Call,
        dtype: torch.dtype,
        vary: bool,
        handed: Sequence[Any] | None,
    ) -> None:
        graph = replace(graph, fx_graph=in_dtype(graph.fx_graph, dtype))
        self.network, self.graph, self.with_trunk = network, graph, handed is None
        change = _varied if vary else lambda tensor: tensor
        self.tensors = {
            name: change(_cast(tensor, dtype)) if isinstance(tensor, nn.Parameter) else _cast(tensor, dtype)
            for name, tensor in named_tensors(network).items()
        }
        nodes = {node.name: node for node in graph.fx_graph.nodes}
        self.crossings = [nodes[crossing.node] for crossing in graph.crossings]
        self.entries = [nodes[entry.node] for entry in graph.entries]
        self.output = next(node for node in nodes.values() if node.op == "output")
        self.inputs = enter_inputs(nodes.values(), [_cast(tensor, dtype) for tensor in x.tensors])
        passing = [node for node in self.crossings if node.name in graph.stem_nodes]
        self.seen: set[torch.dtype] = set()
        made = [node for node in self.crossings if node not in passing]
        self.stem, self.trunk, self.head = (
            Run(network, graph.fx_graph, part, wanted, watch=self._note_type)
            for part, wanted in (
                (graph.stem_graph(), [*self.entries, *passing]),
                (graph.trunk_graph(), made),
                (graph.head_graph(), [self.output]),
            )
        )
        of_stem = self._run(self.stem, self.inputs, self.tensors)
        self.entering = {node: of_stem[node] for node in self.entries}
        self.passing = {node: of_stem[node] for node in passing}
        if handed is None:
            self.made = self._trunk(self.entering, self.tensors)
        else:
            self.made = {node: _cast(value, dtype) for node, value in zip(made, handed, strict=True)}
        self.crossing = {**self.made, **self.passing}
        self.returned = self._head(self.crossing, self.tensors)
        self.finite = all(value.isfinite().all() for value in tensors_in(list(self.crossing.values())))

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES.get(dtype, TOLERANCES[torch.float16]) for dtype in self.seen or {torch.float64})

    def find(self, second: bool) -> Iterator[Failure]:
        """Yield the spaces that fail. All are permuted at once first; only if that fails, one by one."""

        def broken(moving: Collection[str] | None = None) -> str | None:
            generator = torch.Generator().manual_seed(0)
            return self._broken(random_permutations(self.graph, generator, second, moving))

        together = broken()
        if together is None:
            return
        separately = {name: part for name in self.graph.spaces if (part := broken([name])) is not None}
        for name, part in (separately or dict.fromkeys(self.graph.spaces, together)).items():
            yield self._failure(name, in_head=part == "head")

    def _failure(self, space: str, in_head: bool) -> Failure:
        if not in_head:
            family = {space, *(name for name in self.graph.spaces if space in units_around(self.graph, name))}
            barrier = next(node for node, held in self.graph.held.items() if not family.isdisjoint(held))
            return Failure(space, (barrier,), f"permuting `{space}` would change what the trunk computes")
        reading = [
            user.name
            for node, crossing in zip(self.crossings, self.graph.crossings, strict=True)
            if crossing.absorbed and crossing.ref is not None and space in crossing.ref.spaces
            for user in node.users
            if user.name not in self.graph.trunk_nodes | self.graph.stem_nodes
        ]
        return Failure(space, tuple(reading), f"permuting `{space}` would change what a head that reads it computes")

    def _broken(self, permutations: Mapping[str, Tensor]) -> str | None:
        """Return the part whose outputs a permutation changes, ``"trunk"`` or ``"head"``; ``None`` if none."""
        crossing = {
            node: self._moved(self.crossing[node], known, permutations)
            for node, known in zip(self.crossings, self.graph.crossings, strict=True)
        }
        if self.with_trunk:
            entering = dict(self.entering)
            for node, entry in zip(self.entries, self.graph.entries, strict=True):
                entering[node] = self._moved(entering[node], entry, permutations)
            found = self._trunk(entering, self._permuted(self.graph.axes, permutations))
            if not self._agree({node: crossing[node] for node in found}, found):
                return "trunk"
        for node, known in zip(self.crossings, self.graph.crossings, strict=True):
            if not known.absorbed:
                crossing[node] = self.crossing[node]  # the head's unmerge restores the order
        returned = self._head(crossing, self._permuted(self.graph.head_axes, permutations))
        return None if self._agree(self.returned, returned) else "head"

    def _moved(self, value: Any, crossing: Crossing, permutations: Mapping[str, Tensor]) -> Any:
        """Permute the features of a value."""
        if crossing.ref is None or crossing.axis is None:
            return value
        return crossing.ref.gather(value, crossing.axis, _tables(crossing.ref, self.graph, permutations))

    def _permuted(self, table: Table, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _permute(tensor, row_of(table, name, tensor), self.graph, permutations)
            for name, tensor in self.tensors.items()
        }

    def _trunk(self, entering: Values, tensors: Mapping[str, Tensor]) -> Values:
        return self._run(self.trunk, entering if self.graph.stem_nodes else self.inputs, tensors)

    def _head(self, crossing: Values, tensors: Mapping[str, Tensor]) -> Values:
        return self._run(self.head, {**self.inputs, **crossing}, tensors)

    def _run(self, part: Run, known: Values, tensors: Mapping[str, Tensor]) -> Values:
        with swapped(self.network, tensors), seeded():  # a forward may draw random numbers that hardly matter
            return part.results(known)

    def _note_type(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            self.seen.add(value.dtype)

    def _agree(self, expected: Any, found: Any) -> bool:
        pairs = zip(tensors_in(list(expected.values())), tensors_in(list(found.values())), strict=True)
        return all(agree(value, other, self.tolerance) for value, other in pairs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype) if value.is_floating_point() else value.detach()


def _varied(tensor: Tensor) -> Tensor:
    """Perturb a tensor whose entries are all equal, such as the scale of a new norm: equal entries prove no order."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or not (tensor == tensor.flatten()[0]).all():
        return tensor
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())).to(tensor) * 0.1
    return torch.where(tensor == 0, noise, tensor * (1 + noise))
