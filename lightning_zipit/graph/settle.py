"""Tracing of all source networks, with a check that they have one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from lightning_zipit._common.calls import Call
from lightning_zipit._common.views import Inputs, view_of
from lightning_zipit.errors import ArchitectureMismatchError, CalibrationError, ZipItError
from lightning_zipit.graph.compare import first_difference, first_difference_of_entries
from lightning_zipit.graph.guess import guess_input
from lightning_zipit.graph.prove import SAMPLES, find_failing
from lightning_zipit.graph.spaces import MergeGraph
from lightning_zipit.graph.trace import analyse_again, trace
from lightning_zipit.graph.unlike import find_unlike


def trace_all(
    backbones: Mapping[str, nn.Module],
    stop_at: str | None,
    merge_heads: bool = False,
    example: Inputs | None = None,
    barriers: Mapping[str, str] | None = None,
    start_at: str | None = None,
) -> dict[str, MergeGraph]:
    """Trace all source networks and check that their trunks have one architecture.

    Args:
        backbones: the source networks by task.
        stop_at: the trunk's last module.
        merge_heads: merge the last layer too.
        example: an input of the networks, or one input per task. Needed if a network reshapes by sizes that cannot be
            guessed.
        barriers: nodes that must stay in the heads, and the reasons.
        start_at: the trunk's first module.

    Returns:
        The merge graph of each network, by task.

    Raises:
        ArchitectureMismatchError: if trunks differ; the message lists all differences.
        ConfigurationError: if ``stop_at`` or ``start_at`` does not exist or leaves nothing to merge.
        TraceError: if a network cannot be traced.
    """
    graphs: dict[str, MergeGraph] = {}
    problems: list[str] = []
    guess: Call | None = None
    for task, backbone in backbones.items():
        own = partial(
            trace,
            backbone,
            stop_at,
            merge_heads=merge_heads,
            barriers=next(iter(graphs.values())).barriers if graphs else barriers,
            start_at=start_at,
        )
        try:
            if example is not None:
                graphs[task] = own(example_input=view_of(example, task))
            elif guess is None:
                guess = Call.of(guess_input(backbone))
                graphs[task] = own(example_input=guess)
            else:
                graphs[task] = _trace_on_guess(own, guess)
        except ZipItError as error:
            if not graphs:
                raise
            problems.append(f"Task {task!r}: {error}")
            continue
        reference = next(iter(graphs))
        difference = first_difference(graphs[reference], graphs[task])
        if not difference and example is not None:
            difference = first_difference_of_entries(graphs[reference], graphs[task])
        if difference:
            way_out = STEMS if start_at is None else ""
            problems.append(f"The networks of tasks {reference!r} and {task!r} differ: {difference}.{way_out}")
    if problems:
        raise ArchitectureMismatchError.collect(problems)
    return graphs


def _trace_on_guess(trace_on: Callable[..., MergeGraph], guess: Call) -> MergeGraph:
    """Trace a network on the input that was guessed for another network, or on a guess of its own."""
    try:
        return trace_on(example_input=guess)
    except CalibrationError:
        return trace_on()


STEMS = " If only their first layers differ, start the trunk after those layers with `start_at`."


def settle(
    networks: Mapping[str, nn.Module],
    graphs: dict[str, MergeGraph],
    inputs: Mapping[str, Call],
    trace_again: Callable[[dict[str, str]], dict[str, MergeGraph]],
    verify: bool = True,
    merge_heads: bool = False,
) -> dict[str, MergeGraph]:
    """Check captured graphs against their networks, and add a barrier for every part that would merge wrongly.

    Args:
        networks: the networks, or working copies of them, by task.
        graphs: the merge graph of each network.
        inputs: an input of each network.
        trace_again: function that traces all networks with the given barriers.
        verify: prove the trunk in the first network, and the heads of all networks.
        merge_heads: whether the heads are merged. If so, a failing part cannot stay per task.

    Returns:
        Merge graphs that pass all checks.

    Raises:
        TraceError: if a graph does not compute the same as its network.
        CalibrationError: if a network fails on its input.
        VerificationError: if nothing is left that can be merged.
    """
    for task, network in networks.items():
        captured = graphs[task].captured
        if captured is not None:
            captured.check(network, inputs[task].first(SAMPLES))
    while failing := find_unlike(networks, graphs, inputs) or (verify and find_failing(networks, graphs, inputs)):
        graphs = analyse_again(next(iter(graphs.values())), failing, merge_heads, trace_again)
    return graphs
