"""Construction of stems, trunk and heads of a merged network as plain modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_zipit._common.copying import copy_module
from lightning_zipit._matching.maps import Maps, of_one_model, shares_along, unmerge_along
from lightning_zipit._merging.dense import fold_norms
from lightning_zipit._merging.parameters import merge_into, unmerge_into
from lightning_zipit.graph import MergeGraph
from lightning_zipit.graph.joined import UNMERGE, Joined
from lightning_zipit.graph.part import Added, Part, make_part, name_of_added
from lightning_zipit.graph.registry import Trait, traits_of, writes_in_place
from lightning_zipit.graph.returned import return_as
from lightning_zipit.graph.table import Table, bind, named_tensors, untie

MERGE = "merge"
"""Usual name of the submodule of a stem that holds its merges; see ``name_of_added``."""


class Unmerge(nn.Module):
    """U_i as a layer: from merged features to the features of one source model.

    Args:
        size: the number of output entries along the axis.
        axis: the axis of the features.

    Attributes:
        index: the merged entry of each output entry.
        matrix: U_i, if merged features are linear combinations; otherwise ``None``. :meth:`set` creates this buffer,
            or loading a state dict that contains it.
    """

    index: Tensor
    matrix: Tensor | None

    def __init__(self, size: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", torch.arange(size))
        self.register_buffer("matrix", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with ``size`` entries along the axis."""
        if self.matrix is None:
            return x.index_select(self.axis, self.index)
        return (x.movedim(self.axis, -1) @ self.matrix.mT).movedim(-1, self.axis)

    def set(self, found: Tensor, dtype: torch.dtype) -> None:
        """Set an index ``(size,)``, or a matrix ``(size, merged size)`` of a given dtype."""
        if found.is_floating_point():
            self.matrix = found.to(self.index.device, dtype)
        else:
            self.index.copy_(found)

    def composed_with(self, found: Tensor) -> Tensor:
        """Compose this unmerge with another one that runs before it, as one index or matrix."""
        if self.matrix is None:
            return found[self.index.cpu()]
        own = self.matrix.cpu().double()
        if found.is_floating_point():
            return own @ found
        return own @ torch.nn.functional.one_hot(found).double()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.matrix is None and (saved := state_dict.get(f"{prefix}matrix")) is not None:
            self.matrix = torch.zeros_like(saved, device=self.index.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{len(self.index)}, axis={self.axis}"


class Merge(nn.Module):
    """M_i as a layer: every merged feature is the mean of one source model's features in its cluster.

    A merged feature whose cluster has no feature of this model is 0. A one-to-one matching has no such cluster.

    Args:
        inputs: the number of entries along the axis in the source.
        outputs: the number of entries along the axis in the merged network.
        axis: the axis of the features.
    """

    index: Tensor
    shares: Tensor

    def __init__(self, inputs: int, outputs: int, axis: int) -> None:
        super().__init__()
        self.outputs, self.axis = outputs, axis
        self.register_buffer("index", torch.arange(inputs) % outputs)
        self.register_buffer("shares", torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with ``outputs`` entries along the axis."""
        shares = self.shares.to(x.dtype).reshape(-1, *[1] * (x.ndim - self.axis - 1))
        shape = [*x.shape[: self.axis], self.outputs, *x.shape[self.axis + 1 :]]
        return x.new_zeros(shape).index_add(self.axis, self.index, x * shares)

    def extra_repr(self) -> str:
        return f"{len(self.index)}, {self.outputs}, axis={self.axis}"


def build_merged(
    graphs: Sequence[MergeGraph],
    networks: Sequence[nn.Module],
    maps: Maps,
    weights: Sequence[float] | None = None,
    models: Sequence[int] | None = None,
) -> tuple[Part, list[Part]]:
    """Merge networks: build the trunk and the heads, and fill in their weights.

    Args:
        graphs: the merge graph of each source network.
        networks: the source networks.
        maps: the map of each space.
        weights: the weight of each model in parameters without features; equal weights by default.
        models: the model index of each network, if several networks are paths of one merged model.

    Returns:
        The trunk, and the head of each network, in eval mode.
    """
    models = range(len(networks)) if models is None else models
    widths = {name: space_map.width for name, space_map in maps.items()}
    trunk = build_trunk(graphs[0], widths).eval()
    leads = [networks[models.index(model)] for model in sorted(set(models))]
    merge_into(trunk, leads, graphs[0].axes, maps, weights)
    fold_norms(trunk, leads, graphs[0], maps)
    heads = []
    for graph, network, source in zip(graphs, networks, models, strict=True):
        head = build_head(graph, widths).eval()
        unmerge_into(head, network, graph.head_axes, maps, source)
        set_unmerges(head, graph, network, maps, source)
        heads.append(head)
    return trunk, heads


def build_stems(graphs: Sequence[MergeGraph], maps: Maps) -> list[Part]:
    """Build the stems of a merge: the part of each network before the trunk, and the merge of its features.

    Args:
        graphs: the merge graph of each source network.
        maps: the map of each space.

    Returns:
        The stems in eval mode, or an empty list if the trunk starts at the input.
    """
    widths = {name: space_map.width for name, space_map in maps.items()}
    stems = [build_stem(graph, widths).eval() for graph in graphs if graph.stem_nodes]
    for source, (stem, graph) in enumerate(zip(stems, graphs, strict=False)):
        set_merges(stem, graph, maps, source)
    return stems


def build_stem(graph: MergeGraph, widths: Mapping[str, int] | None = None) -> Part:
    """Build the stem of one task: the part of its network before the trunk, with copies of its weights.

    Args:
        graph: the merge graph of the task's network.
        widths: the number of features of each space of the trunk whose width differs from the source's.

    Returns:
        A module that maps the input to a tuple: the inputs of the trunk, whose features a :class:`Merge` has merged,
        and the values that bypass the trunk and go directly to the head.
    """
    name = name_of_added(graph.module, MERGE)
    root, merges = _with_submodule(graph.module, name)
    stem = fx.Graph()
    built: dict[str, fx.Node] = {}
    for node in graph.stem_graph():
        built[node.name] = stem.node_copy(node, lambda source: built[source.name])
    passed = _passed(graph)
    entering = []
    for entry in graph.entries:
        value = built[entry.node]
        if entry.ref is not None and entry.axis is not None:
            merges[entry.node] = Merge(entry.ref.size, entry.ref.resized(widths or {}).size, entry.axis)
            value = stem.call_module(f"{name}.{entry.node}", (value,))
        elif entry.node in passed and entry.shape:
            value = stem.call_method("clone", (value,))  # the trunk may change it in place
        entering.append(value)
    stem.output((*entering, *(built[name] for name in passed)))
    dtype = next((each.dtype for each in root.parameters() if each.is_floating_point()), None)
    merges.to(dtype)
    return _module(root, stem, "Stem", {}, None)


def _passed(graph: MergeGraph) -> list[str]:
    """List the values that a stem passes directly to the head."""
    return [crossing.node for crossing in graph.crossings if crossing.node in graph.stem_nodes]


def _with_submodule(module: nn.Module, name: str) -> tuple[nn.Module, Added]:
    """Return a shallow copy of a module with an additional empty submodule, and this submodule."""
    root = copy.copy(module)
    root._modules = dict(module._modules)
    added = root._modules[name] = Added()
    return root, added


def set_merges(stem: nn.Module, graph: MergeGraph, maps: Maps, source: int) -> None:
    """Set the merges of a stem: the merged feature of each source feature, and the contribution of the source feature.

    Args:
        stem: a stem that :func:`build_stem` made from ``graph``.
        graph: the merge graph of the source model.
        maps: the map of each space.
        source: the index of the source model.
    """
    own_maps, name = of_one_model(maps, source), name_of_added(graph.module, MERGE)
    for entry in graph.entries:
        if entry.ref is not None:
            merge = stem.get_submodule(f"{name}.{entry.node}")
            merge.get_buffer("index").copy_(unmerge_along(entry.ref, maps, source))
            merge.get_buffer("shares").copy_(shares_along(entry.ref, own_maps, source))


def build_trunk(graph: MergeGraph, widths: Mapping[str, int] | None = None) -> Part:
    """Build the trunk: the part of the network that all tasks share, with copies of the traced network's weights.

    Args:
        graph: the merge graph of the network.
        widths: the number of features of each space whose width differs from the source's. Resized parameters are
            zeros.

    Returns:
        A module that maps the input, or the output of a stem, to a tuple of the inputs of the heads.
    """
    trunk = fx.Graph()
    built = {entry.node: trunk.placeholder(entry.node) for entry in graph.entries}
    passed = {name: trunk.placeholder(f"{name}_passed") for name in _passed(graph)}
    for node in graph.trunk_graph():
        built[node.name] = trunk.node_copy(node, lambda source: built[source.name])
    built |= passed
    trunk.output(tuple(built[crossing.node] for crossing in graph.crossings))
    return _module(graph.module, trunk, "Trunk", graph.axes, widths)


def build_head(graph: MergeGraph, widths: Mapping[str, int] | None = None) -> Part:
    """Build the head of one task: the part of its network after the trunk, with copies of its weights.

    Args:
        graph: the merge graph of the task's network.
        widths: the number of features of each space of the trunk whose width differs from the source's. Resized
            parameters are zeros.

    Returns:
        A module that maps the outputs of the trunk to the output of the network. If all readers of a value are layers,
        U_i is absorbed into their weights. All other values first go through an :class:`Unmerge`.
    """
    name = name_of_added(graph.module, UNMERGE)
    root, unmerges = _with_submodule(graph.module, name)
    head = fx.Graph()
    built: dict[fx.Node, fx.Node] = {}
    by_name = {node.name: node for node in graph.fx_graph.nodes}
    inputs = {crossing.node: head.placeholder(crossing.node) for crossing in graph.crossings}
    for crossing in graph.crossings:
        value = inputs[crossing.node]
        if crossing.ref is not None and crossing.axis is not None and not crossing.absorbed:
            unmerges[crossing.node] = Unmerge(crossing.ref.size, crossing.axis)
            value = head.call_module(f"{name}.{crossing.node}", (value,))
        elif _changed_in_place(by_name[crossing.node], graph):
            value = head.call_method("clone", (value,))  # the other heads also read it
        built[by_name[crossing.node]] = value
    for node in graph.head_graph():
        if node.op == "output":
            structure = graph.captured.outputs if graph.captured is not None else None
            returned: Any = node.args[0]
            return_as(structure, root, head, [built[source] for source in returned])
        elif node.op != "placeholder":  # an unused input
            built[node] = head.node_copy(node, built.__getitem__)
    return _module(root, head, "Head", graph.head_axes, widths)


def _changed_in_place(node: fx.Node, graph: MergeGraph) -> bool:
    """Whether the head changes a value of the trunk in place."""
    for user in node.users:
        if user.name in graph.trunk_nodes | graph.stem_nodes or user.op == "output":
            continue
        views = Trait.VIEW in traits_of(user, graph.module)
        if writes_in_place(user, graph.module) or (views and _changed_in_place(user, graph)):
            return True
    return False


def set_unmerges(head: nn.Module, graph: MergeGraph, network: nn.Module, maps: Maps, source: int) -> None:
    """Set the explicit unmerges of a head: the merged feature of each source feature.

    If the source is itself a merged model, its unmerges are composed with the new ones.

    Args:
        head: a head made by :func:`build_head` from ``graph``.
        graph: the merge graph of that source.
        network: that source.
        maps: the matching of each space.
        source: the number of the source model.
    """
    for crossing in graph.crossings:
        if crossing.ref is not None and not crossing.absorbed:
            name = f"{name_of_added(graph.module, UNMERGE)}.{crossing.node}"
            unmerge, found = head.get_submodule(name), unmerge_along(crossing.ref, maps, source)
            if isinstance(network, Joined):
                found = network.get_submodule(name).composed_with(found)  # type: ignore[operator]
            unmerge.set(found, next(network.parameters()).dtype)  # type: ignore[operator]


def _module(
    root: nn.Module,
    graph: fx.Graph,
    name: str,
    table: Table,
    widths: Mapping[str, int] | None,
) -> Part:
    graph.lint()
    module = copy_module(make_part(root, graph, name))  # copies the weights: the traced network stays unchanged
    untie(module, table)
    if widths:
        _resize(module, table, widths)
    return module


def _resize(module: nn.Module, table: Table, widths: Mapping[str, int]) -> None:
    """Resize parameters and buffers to given widths, and update the size attributes of their modules."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module).items():
        names.setdefault(id(tensor), []).append(name)
    holders: dict[nn.Module, None] = {}
    for _, tensor, row in list(bind(table, module)):
        # A grouped axis is shorter than the axis of its spaces, and is never resized.
        shape = [
            size if ref is None or ref.groups > 1 else ref.resized(widths).size
            for ref, size in zip(row, tensor.shape, strict=True)
        ]
        if torch.Size(shape) == tensor.shape:
            continue
        zeros = tensor.new_zeros(shape)
        resized = nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
        for name in names[id(tensor)]:  # tied weights stay tied
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, resized)
            holders[module.get_submodule(owner)] = None
    for holder in holders:
        _update_sizes(holder)


def _update_sizes(module: nn.Module) -> None:
    """Set the size attributes of a module from its parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        depthwise = module.groups > 1 and module.weight.shape[1] == 1  # other grouped convolutions are never resized
        module.groups = len(module.weight) if depthwise else module.groups
        sizes = [len(module.weight), module.weight.shape[1] * module.groups]
        module.in_channels, module.out_channels = sizes if isinstance(module, _ConvTransposeNd) else sizes[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = len(weight if weight is not None else module.get_buffer("running_mean"))
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)  # type: ignore[union-attr]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
