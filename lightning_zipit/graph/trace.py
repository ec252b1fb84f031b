"""Tracing of a backbone: capture, cut, analysis and proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit.errors import ConfigurationError, TraceError, VerificationError
from lightning_zipit.graph.analyse import Analysis
from lightning_zipit.graph.cut import find_trunk
from lightning_zipit.graph.guess import guess_input
from lightning_zipit.graph.order import descendants, with_constants
from lightning_zipit.graph.prove import SAMPLES, Failure, explain, find_failing
from lightning_zipit.graph.remember import capture_once
from lightning_zipit.graph.replay import working_copy
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.stem import find_after_start, find_stem, name_apart, split_constants


def trace(
    backbone: nn.Module,
    stop_at: str | None = None,
    *,
    example_input: Any = None,
    merge_heads: bool = False,
    verify: Any = None,
    barriers: Mapping[str, str] | None = None,
    start_at: str | None = None,
) -> MergeGraph:
    """Find the axes of a network's parameters that must be merged together.

    The network runs in eval mode, and torch.export writes down what it computes. The network is not changed. No data is
    needed if a fitting input can be guessed from the first layer.

    An operator without a rule is a barrier: the operator, and all that depends on it, stays in the heads, one per task.
    :attr:`MergeGraph.barriers` lists the barriers.

    Args:
        backbone: the network. Its forward may take any number of tensors, nested in any way.
        stop_at: dotted name of the trunk's last module; everything after it stays a head per task. ``None`` zips
            everything down to the last layer with weights.
        example_input: an input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        merge_heads: include the last layer in the trunk; the models then share one output space.
        verify: an input for the proof. Every space is permuted in a copy, by two permutations without fixed points, and
            the copy must return the same. This takes three forwards of 2 samples, in float64 if the network supports
            it. A space that fails becomes a barrier.
        barriers: nodes of the traced graph that must be barriers, and the reasons.
        start_at: dotted name of the trunk's first module; everything that does not depend on it stays a stem per task.
            ``None`` zips from the input on.

    Returns:
        The feature spaces and the table of axes.

    Raises:
        UnknownShapeError: if no input is given and no guess fits.
        TraceError: if the network cannot be captured, or if a barrier leaves nothing to merge.
        ConfigurationError: if ``stop_at`` or ``start_at`` does not exist or leaves nothing to merge.
        VerificationError: if ``verify`` finds that nothing can be merged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> graph = trace(net)
        >>> list(graph.spaces)
        ['0']
        >>> [str(ref) for ref in graph.axes["3.weight"]]
        ['None', '← 0[0:288]×36']
    """
    capture = _Capture(backbone, stop_at, start_at, merge_heads, example_input if example_input is not None else verify)
    merge_graph = capture.analyse(barriers or {})
    if verify is None:
        return merge_graph
    x = Arguments.of(backbone).bind(Call.of(verify)).first(SAMPLES).each(Tensor.detach)
    working = working_copy(backbone)
    capture.captured.check(working, x)
    while failing := find_failing({"": working}, {"": merge_graph}, {"": x}):
        merge_graph = analyse_again(merge_graph, failing, merge_heads, capture.analyse)
    return merge_graph


Analysed = TypeVar("Analysed")


def analyse_again(
    graph: MergeGraph,
    failing: Sequence[Failure],
    merge_heads: bool,
    analyse: Callable[[dict[str, str]], Analysed],
) -> Analysed:
    """Analyze a network again, with barriers that keep failing spaces unmerged.

    Args:
        graph: the merge graph whose proof failed.
        failing: the spaces that fail.
        merge_heads: whether the heads are merged. If so, a failing space cannot stay per task.
        analyse: function that analyzes the network with the given barriers.

    Raises:
        VerificationError: if no barrier is left to try, or nothing is left to merge.
    """
    new = {node: failure.why for failure in failing for node in failure.barriers if node not in graph.barriers}
    if merge_heads or not new:
        raise VerificationError(explain(graph, failing))
    try:
        return analyse({**graph.barriers, **new})
    except ConfigurationError:
        raise VerificationError(explain(graph, failing)) from None


class _Capture:
    """A captured network: its graph, the shapes of its tensors, and its stem and trunk without barriers."""

    def __init__(
        self, backbone: nn.Module, stop_at: str | None, start_at: str | None, merge_heads: bool, example: Any
    ) -> None:
        self.backbone, self.stop_at, self.start_at, self.merge_heads = backbone, stop_at, start_at, merge_heads
        self.captured = capture_once(backbone, guess_input(backbone) if example is None else example)
        self.graph = graph = self.captured.graph
        if start_at is not None:
            split_constants(graph)
        shapes = {node.name: shape for node in graph.nodes if (shape := shape_of(node)) is not None}
        self.nodes = nodes = list(graph.nodes)
        trunk = find_trunk(backbone, nodes, stop_at, shapes, merge_heads)
        self.stem: set[fx.Node] = set()
        if start_at is not None:
            after_start = find_after_start(backbone, nodes, start_at)
            self.stem = find_stem(nodes, start_at, trunk, after_start, shapes)
            trunk, shapes = trunk - self.stem, name_apart(graph, after_start, shapes)
        self.trunk, self.shapes = trunk, shapes

    def analyse(self, barriers: Mapping[str, str]) -> MergeGraph:
        """Build the merge graph with the given barriers. A node that no rule supports becomes another barrier.

        Raises:
            TraceError: if a barrier leaves nothing to merge.
            ConfigurationError: if ``start_at`` or ``stop_at`` leaves nothing to merge.
        """
        known, last = dict(barriers), None
        while True:
            blocked = descendants({node for node in self.nodes if node.name in known}, self.nodes)
            trunk = with_constants(self.trunk - blocked, self.nodes)
            try:
                graph = Analysis(
                    self.backbone,
                    self.graph,
                    self.shapes,
                    trunk,
                    self.stop_at,
                    known,
                    self.stem,
                    self.start_at,
                    self.merge_heads,
                ).result()
                _check_mergeable(graph, self.stop_at)
                return replace(graph, captured=self.captured, notes=(*graph.notes, *self._decisions()))
            except ConfigurationError as error:
                raise last or error from None
            except TraceError as error:
                if self.merge_heads or error.node is None or error.node in known:
                    raise
                known[error.node], last = str(error), error

    def _decisions(self) -> Iterator[str]:
        for read in self.captured.decisions:
            yield (
                f"The forward decides by its data: {read}. The merged network decides as for the example, whatever its "
                "data are."
            )
        for call in self.captured.training_alone:
            yield f"The forward calls {call} in training mode alone. The merged network leaves it out."


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value for the captured batch; ``None`` if the value is not a tensor."""
    shape = node.meta.get("shape")
    return None if shape is None or any(isinstance(size, tuple) for size in shape) else shape


def _check_mergeable(graph: MergeGraph, stop_at: str | None) -> None:
    if not any(space.tap for space in graph.spaces.values()):
        raise ConfigurationError(
            f"start_at={graph.start_at!r} leaves no layer with weights in the trunk, so the trunk has nothing to "
            "merge. Choose an earlier module, or a later `stop_at`."
            if graph.start_at
            else f"stop_at={stop_at!r} leaves no layer with weights in the trunk, so the trunk has nothing to merge. "
            "Choose a later module."
            if stop_at
            else "The backbone has no layer with weights before its last layer, so the trunk has nothing to merge. "
            "Choose a larger `backbone`, or use merge_heads=True if all models share one output space."
        )
