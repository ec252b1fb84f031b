"""What a forward reads from tensors into Python: ``bool``, ``item`` and the like, by which it may decide."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode

READS = frozenset(
    {
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        torch.equal,
        Tensor.equal,
        torch.allclose,
        Tensor.allclose,
        torch.is_nonzero,
        Tensor.is_nonzero,
    }
)
"""The functions that return a Python value that depends on the entries of a tensor."""

TORCH = str(Path(torch.__file__).parent)
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Read:
    """A value that a forward read from a tensor.

    Attributes:
        line: file and line of the code that read it.
        function: the function that read it.
        value: the value.
    """

    line: str
    function: str
    value: Any

    @property
    def is_yes_or_no(self) -> bool:
        return isinstance(self.value, bool)

    def __str__(self) -> str:
        return f"{self.line} reads {self.value!r} by `{self.function}`"


class Watch(TorchFunctionMode):
    """Notes what a forward reads while it runs.

    Attributes:
        reads: what it read, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in READS:
            self.reads.append(Read(user_line(), func.__name__, value))
        return value


class Answer(TorchFunctionMode):
    """Answers what a forward reads while it is captured, when tensors have no entries, by what a run of it read.

    Args:
        reads: what the run read.

    Attributes:
        decisions: what was read from tensors that depend on the inputs.
    """

    def __init__(self, reads: Iterable[Read]) -> None:
        super().__init__()
        self.decisions: list[Read] = []
        self._reads = tuple(reads)
        self._answers: dict[tuple[str, str], deque[Read]] = {}
        self._inputs: set[fx.Node] = set()

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Start over, as torch.export may run a forward several times.

        Args:
            inputs: the inputs of the capture.
        """
        self.decisions = []
        self._answers = defaultdict(deque)
        for read in self._reads:
            self._answers[read.line, read.function].append(read)
        self._inputs = {node for tensor in inputs if (node := node_of(tensor)) is not None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS:
            waiting = self._answers[user_line(), func.__name__]
            if waiting:
                return self._answer(waiting.popleft(), args)
        return func(*args, **(kwargs or {}))

    def _answer(self, read: Read, args: tuple[Any, ...]) -> Any:
        nodes = [node for tensor in args if isinstance(tensor, Tensor) and (node := node_of(tensor)) is not None]
        if not self._inputs.isdisjoint(_ancestors(nodes)):
            self.decisions.append(read)
        return read.value


def user_line() -> str:
    """File and line of the innermost code that is neither torch's nor this package's; else the innermost of torch."""
    frame: FrameType | None = sys._getframe(1)
    first = None
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((PACKAGE, "<")):
            if not name.startswith(TORCH):
                return f"{name}:{frame.f_lineno}"
            in_library = f"{TORCH}/nn" in name or f"{TORCH}/distributions" in name
            first = first or (f"{name}:{frame.f_lineno}" if in_library else None)
        frame = frame.f_back
    return first or "unknown"


def node_of(tensor: Tensor) -> fx.Node | None:
    """The node of the graph that is being captured that makes a tensor."""
    mode = get_proxy_mode()
    slot: Any = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    return slot.proxy.node if slot is not None else None


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose entries, and not their sizes alone, go into those of some nodes."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if _takes_sizes_alone(node) else node.all_input_nodes
    return found


def _takes_sizes_alone(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
    return name.startswith(("sym_", "new_")) or name.endswith("_like")
