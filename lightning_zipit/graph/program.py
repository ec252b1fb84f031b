"""From a program of torch.export to a graph over a network's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lightning_zipit.errors import TraceError
from lightning_zipit.graph import dtypes, training, whole_modules
from lightning_zipit.graph.functional_form import make_functional
from lightning_zipit.graph.naming import location
from lightning_zipit.graph.recurrent import ORIGINALS
from lightning_zipit.graph.regions import write_out_regions
from lightning_zipit.graph.run import IN_PLACE
from lightning_zipit.graph.sizes import hint

aten = torch.ops.aten

SAME = {**ORIGINALS, aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
"""Operators that are another, so that there is one for each thing: a copied tensor may have other strides."""

WRAPPER = "network"
"""Name of the network in the module that is exported."""
KEPT = ("stack_trace", IN_PLACE, dtypes.CALL, dtypes.FOLLOWS, training.CALL, whole_modules.GIVEN)
CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Operators that check something and return nothing."""
COPIES = frozenset({aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default})
"""Operators that matter to gradients alone."""


def to_graph(program: ExportedProgram, network: nn.Module, who: str) -> fx.Graph:
    """The graph of a network from the tensors of its input to those of its output.

    Args:
        program: what torch.export returned for a module that holds the network under the name :data:`WRAPPER`.
        network: the network.
        who: what errors call it.

    Raises:
        TraceError: if an operator writes in place, in a way that cannot be undone.
    """
    write_out_regions(program.graph_module)
    graph = _converted(program, network)
    if make_functional(graph):
        graph = _converted(program.run_decompositions({}), network)
        if left := make_functional(graph):
            raise TraceError(
                f"{who} writes in place by `{left[0].target}` in `{location(left[0])}`, where the capture cannot "
                "follow. Write `x = …` with a new tensor."
            )
    graph.eliminate_dead_code()
    first = _first_names(network)
    for node in graph.nodes:
        _keep_meta(node, first)
    _read_first(graph)
    graph.lint()
    return graph


def _converted(program: ExportedProgram, network: nn.Module) -> fx.Graph:
    """A program as a graph that reads parameters where it needs them, without checks, on any device."""
    graph, built = fx.Graph(), {}
    sources = _sources(program, network)
    device = _device(program)
    anchor: fx.Node | None = None

    def convert(node: fx.Node) -> fx.Node:
        if node not in built:  # a parameter that was not read before
            built[node] = _read(graph, sources[node.name])
            built[node].meta = dict(node.meta)
        return built[node]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in sources:
                built[node] = graph.node_copy(node)
                anchor = anchor or built[node]
        elif node.op == "output":
            wanted = set(program.graph_signature.user_outputs)
            graph.output(tuple(convert(each) for each in node.args[0] if each.name in wanted))
        elif node.target in COPIES:
            built[node] = convert(node.args[0])
            _keep_notes(node, built[node])
        elif node.target not in CHECKS:
            built[node] = copied = graph.node_copy(node, convert)
            copied.target = SAME.get(node.target, node.target)
            copied.kwargs = {name: value for name, value in copied.kwargs.items() if name != "pin_memory"}
            _write_out_dtype(copied)
            _follow_device(graph, copied, device, anchor)
    return graph


def _keep_notes(copy: fx.Node, original: fx.Node) -> None:
    """Keep what is noted of the result of an operator that is left out."""
    if dtypes.CALL in copy.meta:
        original.meta[dtypes.CALL] = copy.meta[dtypes.CALL]
    if whole_modules.GIVEN in copy.meta:
        original.meta[whole_modules.GIVEN] = [
            *original.meta.get(whole_modules.GIVEN, ()),
            *copy.meta[whole_modules.GIVEN],
        ]


def _sources(program: ExportedProgram, network: nn.Module) -> dict[str, str | Tensor]:
    """Per placeholder that is no input, the name of the tensor in the network, or the tensor that the forward made."""
    found: dict[str, str | Tensor] = {}
    first = _first_names(network)
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        owner, _, attribute = str(spec.target).removeprefix(f"{WRAPPER}.").rpartition(".")
        name = f"{first.get(owner, owner)}.{attribute}".removeprefix(".")
        try:
            known = attrgetter(name)(network)
        except AttributeError:
            known = None
        found[spec.arg.name] = name if isinstance(known, Tensor) else program.constants[str(spec.target)]
    return found


def _read(graph: fx.Graph, source: str | Tensor) -> fx.Node:
    """Read a tensor of the network, or write one out that the forward made."""
    if isinstance(source, str):
        return graph.get_attr(source)
    return graph.call_function(torch.tensor, (source.tolist(),), {"dtype": source.dtype})


def _device(program: ExportedProgram) -> torch.device | None:
    """The device of the first input."""
    inputs = set(program.graph_signature.user_inputs)
    tensors = (node.meta.get("val") for node in program.graph.nodes if node.name in inputs)
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)


def _follow_device(graph: fx.Graph, node: fx.Node, device: torch.device | None, anchor: fx.Node | None) -> None:
    """Let an operator that makes or moves a tensor take the device of the input, where it took that of the example."""
    values = [*node.args, *node.kwargs.values()]
    if anchor is None or not any(isinstance(value, torch.device) and value == device for value in values):
        return
    with graph.inserting_before(node):
        follow = graph.call_function(getattr, (anchor, "device"))
    node.args = tuple(follow if _is(value, device) else value for value in node.args)
    node.kwargs = {name: follow if _is(value, device) else value for name, value in node.kwargs.items()}


def _write_out_dtype(node: fx.Node) -> None:
    """Let an operator that makes a tensor from numbers alone say its type, which is otherwise the default of torch."""
    made, operator = node.meta.get("val"), node.target
    if not isinstance(made, Tensor) or not isinstance(operator, OpOverload) or "dtype" in node.kwargs:
        return
    given = any(isinstance(each.meta.get("val"), Tensor) for each in node.all_input_nodes)
    if not given and any(argument.name == "dtype" and argument.kwarg_only for argument in operator._schema.arguments):
        node.kwargs = {**node.kwargs, "dtype": made.dtype}
        if made.dtype is torch.get_default_dtype():
            node.meta[dtypes.FOLLOWS] = dtypes.DEFAULT


def _is(value: Any, device: torch.device | None) -> bool:
    return isinstance(value, torch.device) and value == device


def _keep_meta(node: fx.Node, first: Mapping[str, str]) -> None:
    """Keep what is plain data: the modules around a node, its line, and shape and type of its result."""
    meta: dict[str, Any] = {"nn_module_stack": dict(_calls(node.meta.get("nn_module_stack") or {}, first))}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        meta |= {"shape": tuple(map(hint, value.shape)), "dtype": value.dtype}
    elif isinstance(value, (tuple, list)) and all(isinstance(part, Tensor) for part in value):
        meta |= {"shape": tuple(tuple(map(hint, part.shape)) for part in value)}
    elif isinstance(value, (int, torch.SymInt)):
        meta |= {"value": hint(value)}
    meta |= {key: node.meta[key] for key in KEPT if key in node.meta}
    node.meta = meta


def _calls(stack: Mapping[str, Any], first: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """The calls of modules around a node: full name and number of the call, full name and type of the module."""
    for call, (path, kind) in stack.items():
        if str(path).startswith(WRAPPER):
            name = str(path).removeprefix(WRAPPER).removeprefix(".").partition("@")[0]
            number = call.rpartition("@")[2] if "@" in call else ""
            if first.get(name, name) != name:  # a call by another of its names
                name, number = first[name], f"{name}{number}"
            yield (f"{name}@{number}" if number else name), (name, kind)


def _first_names(network: nn.Module) -> dict[str, str]:
    """The first name of each module, by each of its names."""
    first: dict[int, str] = {}
    named = network.named_modules(remove_duplicate=False)
    return {name: first.setdefault(id(module), name) for name, module in named}


def _read_first(graph: fx.Graph) -> None:
    """Move the reads of parameters before all operators."""
    start = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    for node in list(graph.nodes):
        if node.op == "get_attr" and start is not None:
            start.prepend(node)
