"""ZipIt! (arXiv 2305.03053) as the paper writes it, with merge and unmerge matrices M_i and U_i that are matrices.

Nothing of the package is used: no graph, no rules. What is tied to what is said by hand, a line per layer:

    {"conv1": "image -> a", "bn1": "a", "conv2": "a -> b", "fc": "b*4 -> c", "last": "c -> classes"}

``conv1`` writes the feature space ``a`` and ``conv2`` reads it; ``b*4`` is a flattened map of 2 × 2 positions, and
``"a b -> c"`` reads a concatenation. Names without a size (the input, the classes) are not merged. The lines are in the
order of execution. Networks are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from helpers.plain_zip import plain_greedy_zip

Matrices = Mapping[str, Sequence[Tensor]]  # of every space, one of each source


@dataclass(frozen=True)
class Cut:
    """Where the trunk ends.

    Attributes:
        module: the last module of the trunk, or the first of the heads.
        crosses: the spaces of the value that crosses.
        last: the last line of the trunk.
        before: whether ``module`` is the first of the heads.
    """

    module: str
    crosses: str
    last: str
    before: bool = False


@dataclass(frozen=True)
class Case:
    """A small network whose feature spaces are named by hand.

    Attributes:
        make: the network, of random weights.
        example: random inputs.
        sizes: of the spaces.
        layers: what each layer, norm or parameter reads and writes.
        cut: a place in the middle for ``stop_at``.
        pooling: the module that averages over all positions in front of the last layer, if any. Features are measured
            in front of it there: every position is a sample.
        units: of spaces whose features belong to groups or heads, how many of those there are.
    """

    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    sizes: Mapping[str, int]
    layers: Mapping[str, str]
    cut: Cut
    pooling: str | None = None
    units: Mapping[str, int] = field(default_factory=dict)

    @property
    def end(self) -> Cut:
        """In front of the last layer."""
        *_, last, head = self.layers
        return Cut(head, reads(self.layers[head]), last, before=True)

    def trunk(self, cut: Cut) -> dict[str, str]:
        """The lines of the trunk."""
        names = list(self.layers)
        return {name: self.layers[name] for name in names[: names.index(cut.last) + 1]}

    def spaces(self, cut: Cut) -> list[str]:
        """The spaces that the trunk writes."""
        return list(dict.fromkeys(space for line in self.trunk(cut).values() for space, _ in words(writes(line))))


def reads(line: str) -> str:
    return line.partition(" -> ")[0]


def writes(line: str) -> str:
    return line.rpartition(" -> ")[2]


def is_layer(line: str) -> bool:
    """Not a norm, nor a parameter that is added."""
    return " -> " in line


def words(axis: str) -> list[tuple[str, int]]:
    """The spaces along an axis, and how many neighbouring entries each of their features has."""
    return [(word.partition("*")[0], int(word.partition("*")[2] or 1)) for word in axis.split()]


# --- matching ---------------------------------------------------------------------------------------------------------


def zip_labels(
    case: Case, cut: Cut, sources: Sequence[nn.Module], x: Tensor, alpha: float, beta: float, width: float = 1.0
) -> dict[str, Tensor]:
    """Match every space by the correlation of its activations; what belongs to groups or heads, by its number."""
    activations = [record(case, cut, source, x) for source in sources]
    labels = {}
    for space in case.spaces(cut):
        if space in case.units:
            labels[space] = torch.arange(case.sizes[space]).repeat(len(sources))
            continue
        features = torch.cat([own[space] for own in activations])  # (N·C, samples)
        left = round(width * case.sizes[space])
        labels[space] = plain_greedy_zip(torch.corrcoef(features), len(sources), left, alpha, beta)
    return labels


@torch.no_grad()
def record(case: Case, cut: Cut, source: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every space its features ``(C, samples)``, at the cut or else at the input of its last reader in the trunk."""
    taps: dict[str, tuple[str, bool, str]] = {}  # of a space: a module, whether in front of it, and what it holds there
    for name, line in case.trunk(cut).items():
        if is_layer(line):
            taps |= {space: (name, True, reads(line)) for space, _ in words(reads(line))}
    at_cut = (case.pooling, True) if cut.before and case.pooling else (cut.module, cut.before)
    taps |= {space: (*at_cut, cut.crosses) for space, _ in words(cut.crosses)}
    values: dict[tuple[str, bool], Tensor] = {}
    handles = []
    for name, before, _ in taps.values():
        module = source.get_submodule(name)
        if before:
            handles.append(
                module.register_forward_pre_hook(lambda _, args, key=(name, before): values.update({key: args[0]}))
            )
        else:
            handles.append(
                module.register_forward_hook(lambda _, args, out, key=(name, before): values.update({key: out}))
            )
    source(x)
    for handle in handles:
        handle.remove()
    return {
        space: part(case, taps[space][2], space, values[taps[space][:2]]).reshape(case.sizes[space], -1)
        for space in case.spaces(cut)
        if space in taps  # queries and keys are read by no layer
    }


def part(case: Case, axis: str, space: str, value: Tensor) -> Tensor:
    """The entries of one space in a value: ``(entries, samples)``."""
    entries = value.movedim(feature_axis(value), 0).flatten(1)
    sizes = [case.sizes[name] * repeat for name, repeat in words(axis)]
    names = [name for name, _ in words(axis)]
    return entries.split(sizes)[names.index(space)]


def feature_axis(value: Tensor) -> int:
    """Axis 1 of maps, the last of vectors and tokens."""
    return 1 if value.ndim == 4 else -1


# --- merging ----------------------------------------------------------------------------------------------------------


def matrices(labels: Tensor, num_models: int) -> tuple[list[Tensor], list[Tensor]]:
    """M_i ``(W, C)``, which average the features of each cluster, and U_i ``(C, W)``, which copy them back."""
    size, width = len(labels) // num_models, int(labels.max()) + 1
    merge = [torch.zeros(width, size, dtype=torch.float64) for _ in range(num_models)]
    unmerge = [torch.zeros(size, width, dtype=torch.float64) for _ in range(num_models)]
    for number, label in enumerate(labels.tolist()):
        model, feature = divmod(number, size)
        merge[model][label, feature] = 1 / (labels == label).sum()
        unmerge[model][feature, label] = 1
    return merge, unmerge


def along(axis: str, source: int, of_spaces: Matrices) -> Tensor | None:
    """M_i or U_i over a whole axis; ``None`` for one that is not merged."""
    parts = [
        torch.kron(of_spaces[space][source], torch.eye(repeat, dtype=torch.float64))
        for space, repeat in words(axis)
        if space in of_spaces
    ]
    return torch.block_diag(*parts) if parts else None


@torch.no_grad()
def merge_dense(case: Case, cut: Cut, sources: Sequence[nn.Module], labels: Mapping[str, Tensor]) -> list[nn.Module]:
    """The merged network of each task: its own but for the trunk, whose output goes through U_i."""
    both = {space: matrices(own, len(sources)) for space, own in labels.items()}
    merge, unmerge = ({space: found[side] for space, found in both.items()} for side in (0, 1))
    tasks = [deepcopy(source) for source in sources]
    for name, line in case.trunk(cut).items():
        ms = [along(writes(line), source, merge) for source in range(len(sources))]
        us = [along(reads(line), source, unmerge) for source in range(len(sources))]
        for tensor in own_tensors(sources[0], name):
            copies = [as_operator(source, tensor) for source in sources]
            if is_layer(line) and tensor.endswith("weight"):
                merged = sum(product(m, w, u) for m, w, u in zip(ms, copies, us, strict=True))  # W* = Σ_i M_i W_i U_i
            else:
                merged = sum(m @ b for m, b in zip(ms, copies, strict=True))  # b* = Σ_i M_i b_i
            for task in tasks:
                set_operator(task, tensor, merged)
    for source, task in enumerate(tasks):
        unmerge_at(task.get_submodule(cut.module), along(cut.crosses, source, unmerge), cut.before)
    return tasks


def product(m: Tensor, weight: Tensor, u: Tensor | None) -> Tensor:
    """M W U, at every place of a kernel."""
    weight = torch.einsum("wo,oi...->wi...", m, weight)
    return weight if u is None else torch.einsum("wi...,iv->wv...", weight, u)


def unmerge_at(module: nn.Module, matrix: Tensor, before: bool) -> None:
    """Apply U_i where the trunk ends."""

    def unmerge(value):
        axis = feature_axis(value)
        return torch.tensordot(value, matrix, ([axis], [1])).movedim(-1, axis)

    if before:
        module.register_forward_pre_hook(lambda module, args: (unmerge(args[0]),))
    else:
        module.register_forward_hook(lambda module, args, output: unmerge(output))


# --- weights as linear operators --------------------------------------------------------------------------------------


def own_tensors(network: nn.Module, name: str) -> list[str]:
    """The names of a layer's parameters and running statistics, or of the parameter itself."""
    return [
        key
        for key, value in network.state_dict().items()
        if (key == name or key.rpartition(".")[0] == name) and value.ndim
    ]


def as_operator(network: nn.Module, name: str) -> Tensor:
    """A weight as ``(outputs, inputs, …)``, a convolution in groups with zeros between them; vectors as they are."""
    tensor, layer = network.state_dict()[name], network.get_submodule(name.rpartition(".")[0])
    if tensor.ndim == 3:  # a parameter that is added to all samples: (1, tokens, features)
        return tensor[0].T
    if tensor.ndim == 1:
        return tensor
    if isinstance(layer, (nn.Embedding, nn.ConvTranspose2d)):
        return tensor.transpose(0, 1)
    groups = getattr(layer, "groups", 1)
    full = tensor.new_zeros(len(tensor), tensor.shape[1] * groups, *tensor.shape[2:])
    for rows, columns, block in blocks(full, groups, tensor):
        full[rows, columns] = block
    return full


def blocks(full: Tensor, groups: int, tensor: Tensor):
    """Of every group its rows and columns in the whole weight, and its weight."""
    for group, (rows, columns) in enumerate(
        zip(torch.arange(len(full)).chunk(groups), torch.arange(full.shape[1]).chunk(groups), strict=True)
    ):
        yield slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1), tensor.chunk(groups)[group]


def set_operator(network: nn.Module, name: str, value: Tensor) -> None:
    """The reverse of :func:`as_operator`; a convolution in groups becomes a whole one, which computes the same."""
    owner, _, attribute = name.rpartition(".")
    layer = network.get_submodule(owner)
    if network.state_dict()[name].ndim == 3:
        value = value.T[None]
    elif value.ndim > 1 and isinstance(layer, (nn.Embedding, nn.ConvTranspose2d)):
        value = value.transpose(0, 1)
    elif value.ndim > 1 and isinstance(layer, nn.Conv2d):
        layer.groups = 1
    value = value.clone()
    setattr(layer, attribute, nn.Parameter(value) if attribute in layer._parameters else value)
