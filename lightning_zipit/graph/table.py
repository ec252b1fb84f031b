"""The table of axes: the feature spaces along each axis of each parameter, and its binding to a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Role = Literal["producer", "consumer"]


@dataclass(frozen=True)
class Block:
    """The entries of an axis that belong to one feature space, in the order of its features.

    Attributes:
        space: name of the feature space.
        starts: the first entry of each feature; a ``range`` if they are evenly spaced.
        repeat: the number of adjacent entries per feature (H·W after a flatten, otherwise 1).
    """

    space: str
    starts: range | tuple[int, ...]
    repeat: int = 1

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.starts)

    @property
    def contiguous(self) -> bool:
        """Whether its entries are adjacent and in order."""
        return isinstance(self.starts, range) and (self.size == 1 or self.starts.step == self.repeat)

    def entries(self) -> Tensor:
        """Return the indices of its entries along the axis, ``(features, repeat)``."""
        return torch.as_tensor(self.starts, dtype=torch.int64)[:, None] + torch.arange(self.repeat)

    def __str__(self) -> str:
        if isinstance(self.starts, range) and self.starts.step == self.repeat:
            where = f"[{self.starts.start}:{self.starts.stop}]"
        elif isinstance(self.starts, range):
            where = f"[{self.starts.start}:{self.starts.stop}:{self.starts.step}]"
        else:
            where = "[permuted]"
        return f"{self.space}{where}" + (f"×{self.repeat}" if self.repeat > 1 else "")


@dataclass(frozen=True)
class AxisRef:
    """The feature spaces along one axis of a parameter or a measured tensor.

    Attributes:
        blocks: the spaces along the axis. Entries outside all blocks hold no merged feature.
        role: whether the axis writes the spaces or reads them.
        size: the number of entries, over all groups.
        groups: the number of groups of a grouped convolution. In the rows of a group, axis 1 holds only the entries of
            that group, so its length is ``size / groups``.
    """

    blocks: tuple[Block, ...]
    role: Role
    size: int
    groups: int = 1

    @property
    def whole(self) -> bool:
        """Whether the axis is one space, entry by entry in order."""
        return len(self.blocks) == 1 and self.blocks[0].starts == range(self.size) and self.blocks[0].repeat == 1

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.space for block in self.blocks))

    def resized(self, widths: Mapping[str, int]) -> AxisRef:
        """Return the same axis with other widths of its spaces: the same blocks in the same order.

        Args:
            widths: the number of features per space. Missing spaces keep their width. The blocks of a resized space
                must be contiguous.
        """
        growth = [(widths.get(block.space, block.size) - block.size) * block.repeat for block in self.blocks]
        if not any(growth):
            return self
        blocks = []
        for block, extra in zip(self.blocks, growth, strict=True):
            starts = self._after_growth(torch.as_tensor(block.starts), growth).numpy()
            if extra:
                starts = starts[0] + np.arange(widths[block.space]) * block.repeat
            blocks.append(replace(block, starts=as_starts(starts)))
        return replace(self, blocks=tuple(blocks), size=self.size + sum(growth))

    def _after_growth(self, entries: Tensor, growth: Sequence[int]) -> Tensor:
        """Return the positions of entries after the blocks have grown at their ends."""
        moved = entries.clone()
        for block, extra in zip(self.blocks, growth, strict=True):
            moved += extra * (entries > block.starts[0])
        return moved

    def index(self, tables: Mapping[str, Tensor], resized: AxisRef | None = None) -> Tensor:
        """Map each entry of the axis to another entry, by an index table per space.

        Args:
            tables: per space, an int64 vector ``(features,)`` of target features.
            resized: the target axis, if it has another size.

        Returns:
            int64 ``(size,)``, the target of each entry.
        """
        index, blocks = torch.arange(self.size), self.blocks
        if resized is not None and resized is not self:
            blocks = resized.blocks
            growth = [(new.size - old.size) * old.repeat for new, old in zip(blocks, self.blocks, strict=True)]
            index = self._after_growth(index, growth)
        for block, new in zip(self.blocks, blocks, strict=True):
            index[block.entries()] = new.entries()[tables[block.space]]
        return index

    def along(self, values: Tensor, weight: Tensor, axis: int) -> Tensor:
        """Reshape values per entry ``(size,)`` so that they broadcast with a weight along this axis."""
        if self.groups == 1:
            return values.reshape(-1, *[1] * (weight.ndim - axis - 1)).to(weight.device)
        rows = values.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        return rows.reshape(len(rows), -1, *[1] * (weight.ndim - 2)).to(weight.device)

    def gather(self, weight: Tensor, axis: int, tables: Mapping[str, Tensor]) -> Tensor:
        """Return the weight whose entry k along the axis is entry ``index(tables)[k]`` of the given weight."""
        index = self.index(tables).to(weight.device)
        if self.groups == 1:
            return weight.index_select(axis, index)
        within = self.along(index % (self.size // self.groups), weight, axis)
        return weight.gather(axis, within.expand_as(weight))

    def scatter_add(
        self, weight: Tensor, axis: int, tables: Mapping[str, Tensor], resized: AxisRef | None = None
    ) -> Tensor:
        """Return the weight that sums each entry k of the given weight into entry ``index(tables, resized)[k]``."""
        resized = resized or self
        index = self.index(tables, resized).to(weight.device)
        if self.groups == 1:
            shape = (*weight.shape[:axis], resized.size, *weight.shape[axis + 1 :])
            return weight.new_zeros(shape).index_add_(axis, index, weight)
        within = self.along(index % (self.size // self.groups), weight, axis)
        return torch.zeros_like(weight).scatter_add_(axis, within.expand_as(weight), weight)

    def __str__(self) -> str:
        arrow = "→" if self.role == "producer" else "←"
        names = self.blocks[0].space if self.whole else " + ".join(map(str, self.blocks))
        return f"{arrow} {names}" + (f" in {self.groups} groups" if self.groups > 1 else "")


Row: TypeAlias = tuple[AxisRef | None, ...]
"""The spaces along each axis of one parameter or buffer; ``None`` for an axis without features."""

Table: TypeAlias = Mapping[str, Row]
"""The row of each parameter and buffer, under every name of a tied tensor."""


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name. A tied tensor has an entry for every name."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict((*parameters, *module.named_buffers(remove_duplicate=False)))


def bind(table: Table, module: nn.Module) -> Iterator[tuple[str, Tensor, Row]]:
    """Iterate over the tensors of a module with their rows. All other code uses this loop.

    Args:
        table: the rows by name.
        module: a network, or a part of one with the same names of tensors.

    Yields:
        Name, tensor and row, once per tensor. A tied tensor has the first of its names that is in the table. A tensor
        without a name in the table has a row of ``None``.

    Example:
        >>> tied = nn.ModuleDict({"encoder": nn.Linear(2, 2, bias=False), "decoder": nn.Linear(2, 2, bias=False)})
        >>> tied["decoder"].weight = tied["encoder"].weight
        >>> [name for name, _, _ in bind({}, tied)]
        ['encoder.weight']
    """
    names: dict[int, str] = {}
    tensors = named_tensors(module)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0] not in table):
        names.setdefault(id(tensor), name)
    for name, tensor in tensors.items():
        if names[id(tensor)] == name:
            yield name, tensor, row_of(table, name, tensor)


def row_of(table: Table, name: str, tensor: Tensor) -> Row:
    """Return the row of a tensor; a row of ``None`` if the table does not contain it."""
    return table.get(name) or (None,) * tensor.ndim


def untie(module: nn.Module, table: Table) -> None:
    """Untie the parameters whose rows differ between names, because such a tensor has two roles.

    Args:
        module: a part of a merged network; it is changed.
        table: the rows by name.
    """
    first: dict[int, str] = {}
    for name, tensor in named_tensors(module).items():
        known = first.setdefault(id(tensor), name)
        if row_of(table, known, tensor) != row_of(table, name, tensor):
            owner, _, attribute = name.rpartition(".")
            copied = tensor.detach().clone()
            own = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            setattr(module.get_submodule(owner), attribute, own)


def as_starts(positions: np.ndarray) -> range | tuple[int, ...]:
    """Return positions as a range if they increase in equal steps, otherwise as a tuple."""
    if len(positions) == 1:
        return range(int(positions[0]), int(positions[0]) + 1)
    steps = np.diff(positions)
    step = int(steps[0])
    if step > 0 and (steps == step).all():
        return range(int(positions[0]), int(positions[0]) + step * len(positions), step)
    return tuple(int(position) for position in positions)
