"""Registry of operators, and its table in the manual."""

from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.capturing import module
from torch import fx, nn

from lightning_zipit._merging.rebuild import build_head, build_trunk
from lightning_zipit.graph import register_rule, trace
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


class Mixer(nn.Module):
    """A block of an operator without a rule, with several tensors and a number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x, other, power=1.0, *, mask=None):
        y = torch.linalg.matrix_exp(torch.diag_embed(x * self.scale)).sum(-1) * other**power
        return y if mask is None else y * mask.unsqueeze(-1)


class WithMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.mixer, self.last = nn.Linear(4, 6), nn.Linear(4, 6), Mixer(), nn.Linear(6, 3)

    def forward(self, x, mask):
        y = self.mixer(self.a(x), self.b(x).relu(), 2.0, mask=mask)
        return self.last(self.mixer(y, other=y, mask=mask))


def mix(ctx, module, x, other, power=1.0, mask=None):
    ctx.write(ctx.parameter("scale"), 0, x)
    return OPERATORS["add"].rule(ctx, x, other)


def test_a_rule_of_a_module_takes_several_tensors():
    register_rule(Mixer, mix)
    network, x = WithMixer().eval(), (torch.rand(4, 4), torch.rand(4))
    graph = trace(network, "a", example_input=x, verify=x)
    assert not graph.barriers and set(graph.axes) >= {"mixer.scale", "b.weight", "last.weight"}
    calls = [node for node in graph.fx_graph.nodes if node.target == "mixer"]
    assert [(len(call.args), list(call.kwargs)) for call in calls] == [(3, ["mask"]), (1, ["other", "mask"])]
    with torch.no_grad():
        torch.testing.assert_close(build_head(graph)(*build_trunk(graph)(*x)), network(*x))


def doubles(self, x):
    return self.last(self.up(self.first(x), output_size=[8]).mean(2))


def test_arguments_that_a_module_can_do_without_are_not_lost():
    network = module(
        doubles, first=nn.Conv1d(2, 4, 3, 2, 1), up=nn.ConvTranspose1d(4, 4, 3, 2, 1), last=nn.Linear(4, 3)
    )
    graph = trace(network.eval(), example_input=(x := torch.rand(4, 2, 8)))
    with torch.no_grad():
        torch.testing.assert_close(build_head(graph)(*build_trunk(graph)(x)), network(x))
