"""Registry of operators, and its table in the manual."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_zipit.graph.operator_table import operators_as_markdown
from lightning_zipit.graph.registry import OPERATORS, Trait, operator_of, spelled, traits_of, writes_in_place

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "operators.md"


def node_of(operator, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_method if isinstance(operator, str) else graph.call_function
    return call(operator, (x, *args), kwargs)


def test_the_manual_has_the_table_of_operators():
    begin, end = "<!-- operators -->\n", "\n<!-- end of operators -->"
    written = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert written == operators_as_markdown(), (
        "run python -m lightning_zipit.graph.operator_table docs/reference/operators.md"
    )


def test_every_rule_is_found_by_all_spellings():
    for spelling in (torch.relu, F.relu, "relu", torch.Tensor.relu):
        assert traits_of(node_of(spelling), nn.Module()) == Trait.POINTWISE
    assert operator_of(node_of("no such method"), nn.Module()) is None


def test_in_place_operators_are_recognized_in_all_spellings():
    network = nn.Module()
    for node in (node_of("add_", 1), node_of(F.relu, True), node_of(F.elu, 1.0, True), node_of(F.relu, inplace=True)):
        assert writes_in_place(node, network)
    for node in (node_of("add", 1), node_of(F.relu), node_of(F.elu, 1.0), node_of(F.relu, inplace=False)):
        assert not writes_in_place(node, network)


def test_numpy_argument_names_become_torch_names():
    rule = OPERATORS["mean"].rule
    assert spelled(rule, {"axis": 1, "keepdims": True}) == {"dim": 1, "keepdim": True}


def test_traits_go_together():
    for key, known in OPERATORS.items():
        traits = known.traits
        assert not (Trait.PRODUCER in traits and Trait.POINTWISE in traits), key
        assert not (Trait.NORM in traits and Trait.PER_FEATURE not in traits), key
        assert not (Trait.IN_PLACE in traits and Trait.VIEW in traits), key
