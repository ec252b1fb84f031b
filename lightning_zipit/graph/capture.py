"""Runs a network once and writes down what it computes: a graph of ATen operators over its own parameters."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from lightning_zipit._common.arguments import Arguments, names_of
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import Structure, UnknownContainerError, flatten
from lightning_zipit.errors import TraceError
from lightning_zipit.graph.decisions import Answer, Read
from lightning_zipit.graph.dtypes import NoteTypes, note_followers
from lightning_zipit.graph.explain_capture import cannot_capture, unknown_container
from lightning_zipit.graph.observe import Observed, observe, observing
from lightning_zipit.graph.program import to_graph
from lightning_zipit.graph.recurrent import KeepRecurrent
from lightning_zipit.graph.replay import CAPTURE_TOLERANCE, agree, working_copy
from lightning_zipit.graph.shapes import note_shapes
from lightning_zipit.graph.sizes import ShortExpressions, Sizes, sizes_of
from lightning_zipit.graph.training import NoteModes, note_training
from lightning_zipit.graph.two_batches import DifferentGraphsError, join
from lightning_zipit.graph.whole_modules import NoteCalls

BATCHES = (3, 5)
"""Samples of the captured batch and of the one that the graph is compared on: numbers that are seldom other sizes."""


@dataclass(frozen=True)
class Captured:
    """What a network computes in eval mode.

    Attributes:
        graph: placeholders for the tensors of the input, ``get_attr`` of parameters and buffers by their names in the
            network, and calls of ATen operators, none of which writes in place; returns the tensors of the output.
            Nodes know their modules (``meta["nn_module_stack"]``), their line (``meta["stack_trace"]``), and the
            shape and type of their result for the captured batch (``meta["shape"]``, ``meta["dtype"]``).
        inputs: the structure of positional and keyword arguments.
        outputs: the structure of what is returned.
        sizes: the sizes of inputs that the graph holds for.
        decisions: what the forward read from tensors that depend on the inputs, and decided by: the graph is what it
            computes where it decides the same.
        training_alone: what the forward calls in training mode alone, so that the graph does not have it.
        arguments: the arguments of the forward.
        calls: what modules of several arguments are called with; see
            :class:`~lightning_zipit.graph.whole_modules.NoteCalls`.
    """

    graph: fx.Graph = field(repr=False)
    inputs: Structure
    outputs: Structure
    sizes: Sizes
    decisions: tuple[Read, ...] = ()
    training_alone: tuple[str, ...] = ()
    arguments: Arguments = field(default_factory=Arguments)
    calls: Mapping[str, Structure] = field(default_factory=dict, repr=False)

    def tensors(self, call: Call) -> tuple[Tensor, ...]:
        """The tensors of an input, in the order of the graph's placeholders.

        Raises:
            TraceError: if the input has another structure than the captured one.
        """
        call = self.arguments.bind(call)
        if call.structure != self.inputs:
            raise TraceError(
                f"The network was captured for other arguments. Captured: {self.inputs}. Given: {call.structure}. Give "
                "an `example_input` of the same arguments as the data."
            )
        return call.tensors

    def is_of(self, call: Call) -> bool:
        """Whether an input has the structure and the sizes of the captured one, except for the number of samples."""
        call = self.arguments.bind(call)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        return call.structure == self.inputs and all(
            node.meta["shape"][1:] == tuple(tensor.shape[1:])
            for node, tensor in zip(placeholders, call.tensors, strict=True)
        )

    def run(self, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the graph computes.

        Args:
            network: the network, or another of the same architecture.
            args: the positional arguments of its forward.
            kwargs: its keyword arguments.

        Raises:
            TraceError: if the graph does not hold for inputs of this structure or these sizes.
        """
        tensors = self.tensors(Call.of_arguments(args, kwargs))
        self.sizes.check(tensors)
        with torch.no_grad():
            return self.outputs.unflatten(list(fx.Interpreter(network, graph=self.graph).run(*tensors)))

    def check(self, network: nn.Module, call: Call) -> None:
        """Refuse an input for which the graph does not compute what the network does.

        Inputs whose sizes meet the conditions of the capture are run only if the forward decides by its data. Others
        are compared, as some of the conditions matter to torch.export alone.

        Args:
            network: the network; it is left as it is.
            call: the input.

        Raises:
            TraceError: if it does not.
        """
        tensors = list(self.tensors(call))
        try:
            self.sizes.check(tensors)
        except TraceError:
            if not self._agrees(network, tensors):
                raise
        else:
            if self.decisions and not self._agrees(network, tensors):
                raise TraceError(
                    f"{type(network).__name__} decides by its data, and otherwise for this input than for the captured "
                    f"one: {self.decisions[0]}. No one graph computes what it does. Name a submodule without that line "
                    "as `backbone`."
                )

    def gives(self, expected: list[Tensor], network: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the graph computes the tensors that a network returned.

        Args:
            expected: the tensors that the network returned.
            network: the network.
            tensors: the tensors of its input.
        """
        try:
            return _agrees(self, network, tensors, expected)
        except Exception:  # whatever an operator raises for sizes that do not fit
            return False

    def _agrees(self, network: nn.Module, tensors: list[Tensor]) -> bool:
        return self.gives(observe(network, self.inputs, tensors, type(network).__name__).tensors, network, tensors)


def capture(network: nn.Module, example: Any) -> Captured:
    """Capture what a network computes in eval mode; the network is left as it was.

    The network is run twice, on a batch of 3 samples and on one of 5, with the samples of the example; torch.export
    writes down the operators; and the graph is compared with the network on both batches.

    Args:
        network: any module. Its forward may take any number of arguments; tensors can be nested in tuples, lists,
            dicts and dataclasses.
        example: an input: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a
            :class:`~lightning_zipit._common.calls.Call`.

    Raises:
        CalibrationError: if the network cannot take the input.
        TraceError: if the network cannot be captured, or the graph does not compute what the network does.
    """
    who = type(network).__name__
    try:
        call = Arguments.of(network).bind(Call.of(example)).each(Tensor.detach)
    except UnknownContainerError as error:
        raise unknown_container(who, error, "takes") from error
    inputs, batches = call.structure, [_batch(call, samples) for samples in BATCHES]
    runs = [observe(network, inputs, batch, who) for batch in batches]
    first, second = runs
    _check_decisions(who, first.reads, second.reads)
    if first.structure != second.structure:
        raise TraceError(
            f"What {who} returns depends on the number of samples in more than the sizes of tensors: "
            f"{first.structure} for {BATCHES[0]} samples, {second.structure} for {BATCHES[1]}. Return tensors."
        )
    captured = _follow(network, inputs, batches, runs, who)
    for batch, run in zip(batches, runs, strict=True):
        if not _agrees(captured, network, batch, run.tensors):
            raise TraceError(
                f"The graph that was captured of {who} does not compute what its forward does for {len(batch[0])} "
                "samples: the forward decides something by more than its inputs, or keeps something from one call to "
                "the next. Name a submodule that does not as `backbone`."
            )
    _check_random(captured, network, batches[0], first, who)
    return _with_single(captured, network, _batch(call, 1), who)


def holds_for(captured: Captured, network: nn.Module, example: Any) -> bool:
    """Whether the graph of a capture computes what another network computes, for two numbers of samples.

    Args:
        captured: the capture.
        network: a network of the same modules; it is not changed.
        example: an input; see :func:`capture`.

    Raises:
        CalibrationError: if the network cannot take the input.
        TraceError: if the network returns a value that may hold tensors and does not say where.
    """
    call = Arguments.of(network).bind(Call.of(example)).each(Tensor.detach)
    structure = call.structure
    if structure != captured.inputs:
        return False
    working = working_copy(network)
    for samples in BATCHES:
        batch = _batch(call, samples)
        run = observe(network, structure, batch, type(network).__name__, working=working)
        if run.structure != captured.outputs or not captured.gives(run.tensors, network, batch):
            return False
    return True


def at_other_sizes(captured: Captured, network: nn.Module, example: Any) -> Captured | None:
    """A capture for inputs of other sizes, with their shapes; ``None`` if its graph may not hold for them.

    Args:
        captured: the capture.
        network: a network of the same modules; it is not changed.
        example: an input of other sizes; see :func:`capture`.

    Raises:
        CalibrationError: if the network cannot take the input.
        TraceError: if the network returns a value that may hold tensors and does not say where, or a second call of it
            returns something else.
    """
    call = Arguments.of(network).bind(Call.of(example)).each(Tensor.detach)
    batch = _batch(call, BATCHES[0])
    try:
        captured.sizes.check(captured.tensors(call.repeated(BATCHES[0])))
    except TraceError:
        return None
    if captured.decisions or not holds_for(captured, network, call):
        return None
    graph = copy.deepcopy(captured.graph)
    with observing():
        note_shapes(working_copy(network), graph, batch)
    found = replace(captured, graph=graph, sizes=replace(captured.sizes, single=False))
    return _with_single(found, network, _batch(call, 1), type(network).__name__)


def _check_random(captured: Captured, network: nn.Module, batch: list[Tensor], run: Observed, who: str) -> None:
    """Refuse a network that draws random numbers that matter."""
    drawing = (torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in captured.graph.nodes)
    if any(drawing):
        again = observe(network, captured.inputs, batch, who, seed=1).tensors
        if not all(map(_close, run.tensors, again)):
            raise TraceError(
                f"The forward of {who} is random in eval mode: two runs on the same input give different results. A "
                "merge of it cannot be checked. Make the forward deterministic in eval mode."
            )


def _with_single(captured: Captured, network: nn.Module, sample: list[Tensor], who: str) -> Captured:
    """The capture, which says whether it holds for a batch of one sample, too.

    Raises:
        TraceError: if a second call of the network returns something else.
    """
    working = working_copy(network)
    try:
        expected, again = (observe(network, captured.inputs, sample, who, working=working).tensors for _ in range(2))
        same = _agrees(captured, network, sample, expected)
    except Exception:  # whatever the network or an operator raises for one sample
        return captured
    if not all(map(_close, expected, again)):
        raise TraceError(
            f"The forward of {who} keeps something from one call to the next: two calls with the same input return "
            "different results. No one graph computes what it does. Name a submodule that does not as `backbone`."
        )
    return replace(captured, sizes=replace(captured.sizes, single=same))


def _batch(call: Call, samples: int) -> list[Tensor]:
    """The tensors of an input with another number of samples."""
    return [tensor.clone() for tensor in call.repeated(samples).tensors]


class _Flat(nn.Module):
    """A network from tensors to tensors, as torch.export wants it."""

    def __init__(self, network: nn.Module, inputs: Structure, reads: Sequence[Read]) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs
        self.answer, self.types, self.modes = Answer(reads), NoteTypes(), NoteModes()
        self.calls = NoteCalls(network)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self.inputs.unflatten(tensors)
        self.answer.start(tensors)
        self.types.start()
        self.modes.start()
        self.calls.start()
        with KeepRecurrent(), ShortExpressions(), self.answer, self.types, self.modes:
            returned = self.network(*args, **kwargs)
        return flatten(returned, "output")[0]

    def export(self, tensors: Sequence[Tensor], free: Sequence[Iterable[int]]) -> ExportedProgram:
        """Export it, where some axes of the inputs can have any size; those that the forward fixes cannot."""
        shapes = tuple({axis: Dim.AUTO for axis in axes} for axes in free)
        quiet = redirect_stderr(io.StringIO())  # torch.export prints the graph of what it cannot follow
        with torch.inference_mode(False), torch.no_grad(), quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(self, tuple(tensors), dynamic_shapes=(shapes,), strict=False)


def _follow(
    network: nn.Module, inputs: Structure, batches: Sequence[list[Tensor]], runs: Sequence[Observed], who: str
) -> Captured:
    flat = _Flat(_untied(working_copy(network)), inputs, runs[0].reads).eval()
    try:
        graph, sizes = _export(flat, batches[0], network, who)
        if isinstance(sizes.batch, int):
            again = _Flat(_untied(working_copy(network)), inputs, runs[1].reads).eval()
            other, _ = _export(again, batches[1], network, who)
            join(graph, other, BATCHES)
            sizes = sizes.with_free_batch(batches)
    except DifferentGraphsError as error:
        raise TraceError(
            f"{who} computes something else for another number of samples: {error}. Name a submodule that does not as "
            "`backbone`."
        ) from error
    except Exception as error:  # whatever a forward or torch.export raises
        raise cannot_capture(flat.network, who, error) from error
    note_followers(graph, network, inputs, batches[0])
    lost = note_training(graph, flat.modes.calls, network, inputs, batches[0])
    return Captured(
        graph,
        inputs,
        runs[0].structure,
        sizes,
        tuple(flat.answer.decisions),
        lost,
        Arguments.of(network),
        dict(flat.calls.calls),
    )


def _untied(network: nn.Module) -> nn.Module:
    """A working copy in which a tied parameter is another tensor under each name, so that reads keep the name."""
    seen: set[int] = set()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = parameter = nn.Parameter(parameter.detach(), requires_grad=False)
            seen.add(id(parameter))
    return network


def _export(flat: _Flat, tensors: Sequence[Tensor], network: nn.Module, who: str) -> tuple[fx.Graph, Sizes]:
    try:
        program = flat.export(tensors, [range(tensor.ndim) for tensor in tensors])
    except Exception:  # such as TooManyOperationsError, or numbers that are computed from sizes by tensors
        program = flat.export(tensors, [range(tensor.ndim)[:1] for tensor in tensors])
    numbers = [read for read in flat.answer.decisions if not read.is_yes_or_no]
    if numbers:
        raise TraceError(
            f"{who} computes with numbers that it reads from tensors that depend on the input: {numbers[0]}. They "
            "would be the same for all data. Compute with the tensor, or name a submodule without that line as "
            "`backbone`."
        )
    placeholders = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    names = names_of(flat.inputs, network)
    graph = to_graph(program, network, who)
    for node, name in zip((each for each in graph.nodes if each.op == "placeholder"), names, strict=True):
        node.target = re.sub(r"\W+", "_", name).strip("_")
    return graph, sizes_of(placeholders, names)


def _check_decisions(who: str, reads: Sequence[Read], again: Sequence[Read]) -> None:
    pairs = zip(reads, again, strict=False)
    different = next(((one, two) for one, two in pairs if str(one) != str(two)), None)
    if different is not None:
        raise TraceError(
            f"{who} decides by its data: {different[0]} for {BATCHES[0]} samples, and {different[1]} for {BATCHES[1]}. "
            "No one graph computes what it does. Name a submodule without that line as `backbone`."
        )


def _agrees(captured: Captured, network: nn.Module, tensors: list[Tensor], expected: list[Tensor]) -> bool:
    calls_modules = any(node.op == "call_module" for node in captured.graph.nodes)  # which may have hooks
    with observing():
        running = working_copy(network) if calls_modules else network
        found = list(fx.Interpreter(running, graph=captured.graph).run(*tensors))
    return len(found) == len(expected) and all(map(_close, expected, found))


def _close(expected: Tensor, found: Tensor) -> bool:
    return agree(expected, found, CAPTURE_TOLERANCE)
