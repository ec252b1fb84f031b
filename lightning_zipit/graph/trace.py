"""From a backbone to its merge graph: record it, cut it, interpret it, and prove it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, fx, nn

from lightning_zipit.errors import ConfigurationError, TraceError, VerificationError
from lightning_zipit.graph.analyse import Analysis
from lightning_zipit.graph.cut import find_trunk
from lightning_zipit.graph.order import descendants, with_constants
from lightning_zipit.graph.prove import SAMPLES, Failure, explain, find_failing
from lightning_zipit.graph.record import record
from lightning_zipit.graph.replay import check_capture, working_copy
from lightning_zipit.graph.shapes import shapes_of
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.stem import find_behind, find_stem, name_apart, split_constants


def trace(
    backbone: nn.Module,
    stop_at: str | None = None,
    *,
    example_input: Tensor | None = None,
    merge_heads: bool = False,
    verify: Tensor | None = None,
    barriers: Mapping[str, str] | None = None,
    start_at: str | None = None,
) -> MergeGraph:
    """Find out which axes of a network's parameters must be merged together.

    The network is recorded in eval mode by torch.fx and is left as it was. No data is needed where an input that fits
    can be guessed from the first layer.

    An operator that no rule knows is a barrier: it and all that depends on it stays a part of the heads, one per task,
    and :attr:`MergeGraph.barriers` says so.

    Args:
        backbone: a network of one input whose ``forward`` torch.fx can follow.
        stop_at: dotted name of the trunk's last module; all that comes after it stays a head per task. ``None``
            zips everything down to the last layer with weights.
        example_input: an input whose sizes are used. Its values do not matter.
        merge_heads: put the last layer into the trunk too: the models then share one output space.
        verify: an input on which to compare the capture with the network, and to prove the table: every space is
            permuted in a copy, by two permutations without fixed points, and the copy must return the same. Three
            forwards of 2 samples are run, in float64 where the network can. A space that fails becomes a barrier.
        barriers: nodes of the traced graph that shall be barriers, and why.
        start_at: dotted name of the trunk's first module; all that does not depend on it stays a stem per task.
            ``None`` zips from the input on.

    Returns:
        The feature spaces and the table of axes.

    Raises:
        UnknownShapeError: if no input is given and none that fits was guessed.
        TraceError: if torch.fx cannot follow, or what it recorded is not what the network computes, or a barrier leaves
            nothing to merge.
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
    working, x = working_copy(backbone), verify[:SAMPLES].detach()
    check_capture(working, capture.graph, x)
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
    """Analyse a network anew, with barriers that keep failing spaces from being merged.

    Args:
        graph: the merge graph whose proof failed.
        failing: the spaces that fail.
        merge_heads: whether there are no heads that could take over what fails.
        analyse: the analysis, given barriers.

    Raises:
        VerificationError: if no barrier is left to try, or nothing to merge.
    """
    new = {node: failure.why for failure in failing for node in failure.barriers if node not in graph.barriers}
    if merge_heads or not new:
        raise VerificationError(explain(graph, failing))
    try:
        return analyse({**graph.barriers, **new})
    except ConfigurationError:
        raise VerificationError(explain(graph, failing)) from None


class _Capture:
    """A captured network: its graph, the sizes of its tensors, and its parts before anything is a barrier."""

    def __init__(
        self, backbone: nn.Module, stop_at: str | None, start_at: str | None, merge_heads: bool, example: Tensor | None
    ) -> None:
        self.backbone, self.stop_at, self.start_at, self.merge_heads = backbone, stop_at, start_at, merge_heads
        self.graph = graph = record(backbone)
        if start_at is not None:
            split_constants(graph)
        shapes = shapes_of(working_copy(backbone), graph, example)
        self.nodes = nodes = list(graph.nodes)
        trunk = find_trunk(backbone, nodes, stop_at, shapes, merge_heads)
        self.stem: set[fx.Node] = set()
        if start_at is not None:
            behind = find_behind(backbone, nodes, start_at)
            self.stem = find_stem(nodes, start_at, trunk, behind, shapes)
            trunk, shapes = trunk - self.stem, name_apart(graph, behind, shapes)
        self.trunk, self.shapes = trunk, shapes

    def analyse(self, barriers: Mapping[str, str]) -> MergeGraph:
        """The merge graph with some barriers; a node that no rule understands becomes one more.

        Raises:
            TraceError: if a barrier leaves nothing to merge.
            ConfigurationError: if there is nothing to merge.
        """
        known, last = dict(barriers), None
        while True:
            behind = descendants({node for node in self.nodes if node.name in known}, self.nodes)
            trunk = with_constants(self.trunk - behind, self.nodes)
            try:
                graph = Analysis(
                    self.backbone, self.graph, self.shapes, trunk, self.stop_at, known, self.stem, self.start_at
                ).result()
                _check_mergeable(graph, self.stop_at)
                return graph
            except ConfigurationError as error:
                raise last or error from None
            except TraceError as error:
                if self.merge_heads or error.node is None or error.node in known:
                    raise
                known[error.node], last = str(error), error


def _check_mergeable(graph: MergeGraph, stop_at: str | None) -> None:
    if not any(space.tap for space in graph.spaces.values()):
        raise ConfigurationError(
            f"start_at={graph.start_at!r} leaves no layer with weights in the trunk, so there is nothing to merge: "
            "name an earlier module, or a later `stop_at`."
            if graph.start_at
            else f"stop_at={stop_at!r} leaves no layer with weights in the trunk, so there is nothing to merge: "
            "name a later module."
            if stop_at
            else "The backbone has no layer with weights before its last, so there is nothing to merge."
        )
