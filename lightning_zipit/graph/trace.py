"""From a backbone to its merge graph: record it, cut it, interpret it, and prove it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from lightning_zipit.errors import ConfigurationError, TraceError, VerificationError
from lightning_zipit.graph.analyse import Analysis
from lightning_zipit.graph.cut import descendants, find_trunk
from lightning_zipit.graph.record import record
from lightning_zipit.graph.shapes import shapes_of
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.stem import find_behind, find_stem, name_apart, split_constants
from lightning_zipit.graph.verify import explain, find_failing


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
        verify: an input on which to prove the table: every space is permuted at random in a copy, which must then
            compute the same. Two forwards of at most 8 samples are run in float64. A space that fails becomes a
            barrier.
        barriers: nodes of the traced graph that shall be barriers, and why.
        start_at: dotted name of the trunk's first module; all that does not depend on it stays a stem per task.
            ``None`` zips from the input on.

    Returns:
        The feature spaces and the table of axes.

    Raises:
        UnknownShapeError: if no input is given and none that fits was guessed.
        TraceError: if torch.fx cannot follow, or a barrier leaves nothing to merge.
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
    graph = record(backbone)
    if start_at is not None:
        split_constants(graph)
    shapes = shapes_of(backbone, graph, example_input if example_input is not None else verify)
    nodes = list(graph.nodes)
    trunk = find_trunk(backbone, nodes, stop_at, shapes, merge_heads)
    stem: set[fx.Node] = set()
    if start_at is not None:
        behind = find_behind(backbone, nodes, start_at)
        stem = find_stem(nodes, start_at, trunk, behind, shapes)
        trunk, shapes = trunk - stem, name_apart(graph, behind, shapes)
    known = dict(barriers or {})
    last: TraceError | None = None
    while True:
        before = trunk - descendants({node for node in nodes if node.name in known}, nodes)
        try:
            merge_graph = Analysis(backbone, graph, shapes, before, stop_at, known, stem, start_at).result()
            _check_mergeable(merge_graph, stop_at)
            failing = find_failing(backbone, merge_graph, verify) if verify is not None else {}
        except ConfigurationError as error:
            raise last or error from None
        except TraceError as error:
            if merge_heads or error.node is None or error.node in known:
                raise
            known[error.node], last = str(error), error
            continue
        if not failing:
            return merge_graph
        last = VerificationError(explain(merge_graph, list(failing)))
        if merge_heads:
            raise last
        known |= {node: f"permuting `{name}` would change what it computes" for name, node in failing.items()}


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
