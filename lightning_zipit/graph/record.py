"""Capture of a network's forward with torch.fx."""

from __future__ import annotations

import inspect
import traceback
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lightning_zipit.errors import TraceError
from lightning_zipit.graph.joined import Joined
from lightning_zipit.graph.naming import describe_node
from lightning_zipit.graph.registry import has_own_forward, operator_of_module
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.run import IN_PLACE


class _Value(fx.Proxy):
    def __iadd__(self, other: Any) -> Any:
        total = self + other
        total.node.meta[IN_PLACE] = True
        return total


class Tracer(fx.Tracer):
    """Tracer that records modules with a rule, and modules of torch.nn, as single nodes, and traces into all others."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (nn.Sequential, *FORWARDS)):
            return False
        known = operator_of_module(module) is not None
        return known or (super().is_leaf_module(module, qualified_name) and not has_own_forward(module, type(module)))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain = FORWARDS.get(type(m))
        return super().call_module(m, partial(plain, m) if plain else forward, args, kwargs)


def _encoder_layer(
    layer: nn.TransformerEncoderLayer, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, **_: Any
) -> Any:
    def attend(x: Any) -> Any:
        return layer.dropout1(
            layer.self_attn(x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False)[0]
        )

    def feed_forward(x: Any) -> Any:
        return layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))))

    if layer.norm_first:
        src = src + attend(layer.norm1(src))
        return src + feed_forward(layer.norm2(src))
    src = layer.norm1(src + attend(src))
    return layer.norm2(src + feed_forward(src))


def _encoder(
    encoder: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, **_: Any
) -> Any:
    for layer in encoder.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return encoder.norm(src) if encoder.norm is not None else src


FORWARDS: dict[type[nn.Module], Any] = {nn.TransformerEncoderLayer: _encoder_layer, nn.TransformerEncoder: _encoder}
"""Replacement forwards without the checks that torch.fx cannot trace. They are equivalent in eval mode."""


def record(backbone: nn.Module) -> fx.Graph:
    """Capture the graph of a network's forward in eval mode. The network is not changed.

    Raises:
        TraceError: if torch.fx cannot trace the forward, or the forward does not take one input.
    """
    if isinstance(backbone, Joined):
        return backbone.record()
    graph = _follow(backbone)
    _drop_unused(backbone, graph)
    inputs = [node.name for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        raise TraceError(
            f"{type(backbone).__name__}.forward takes {len(inputs)} inputs ({', '.join(inputs)}), but a backbone must "
            "take one. Choose a submodule with one input as `backbone`."
        )
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in inputs:
            graph.erase_node(node)
    return graph


def _follow(backbone: nn.Module) -> fx.Graph:
    """Trace a forward, with buffers as proxies first, and with their values if the forward branches on these.

    Each attempt traces a copy, because a forward that stores values in a module would store proxies.
    """
    failures: list[Exception] = []
    for proxies in (True, False):
        tracer, traced = Tracer(), working_copy(backbone)
        tracer.proxy_buffer_attributes = proxies
        try:
            graph = tracer.trace(traced, concrete_args=_defaults(traced))
            _write_out_constants(traced, graph)
            graph.lint()
            return graph
        except Exception as error:
            failures.append(error)
    raise TraceError(_cannot_follow(backbone, failures[-1])) from failures[-1]


def _defaults(backbone: nn.Module) -> dict[str, Any]:
    """Return the default arguments of a forward, such as unused masks, so that they are not traced as inputs."""
    arguments = list(inspect.signature(backbone.forward).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        argument.name: argument.default
        for argument in arguments[1:]
        if argument.kind in named and argument.default is not inspect.Parameter.empty
    }


def _write_out_constants(backbone: nn.Module, graph: fx.Graph) -> None:
    """Replace constants that the forward creates by ``torch.tensor`` calls, so that the graph is self-contained."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            value = getattr(backbone, str(node.target))
            with graph.inserting_before(node):
                written = graph.call_function(torch.tensor, (value.tolist(),), {"dtype": value.dtype})
            node.replace_all_uses_with(written)
            graph.erase_node(node)


def _drop_unused(backbone: nn.Module, graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("output", "placeholder"):
            continue
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        module = backbone.get_submodule(target) if node.op == "call_module" else None
        if node.op.startswith("call") and (target.endswith("_") or getattr(module, "inplace", False)):
            raise TraceError(
                f"{describe_node(node, backbone)} changes a tensor in place and its result is not used. The graph does "
                "not record later reads of the changed tensor. Assign the result in the forward: `x = …`."
            )
        graph.erase_node(node)


def _cannot_follow(backbone: nn.Module, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torch/fx" not in frame.filename]
    own = [frame for frame in frames if "torch/nn" not in frame.filename and not frame.filename.startswith("<")]
    line = f' at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: "{own[-1].line}"' if own else ""
    return (
        f"torch.fx cannot trace {type(backbone).__name__}.forward{line}: {error}\nChoose a submodule without that line "
        "as `backbone`, or register a rule for the block with `lightning_zipit.graph.register_rule`, so that it "
        "becomes a leaf module."
    )
