"""Merged networks that are wider or narrower than a source."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from helpers.nets import Lit, PlainNet, SmallResNet, images, settle, settled_pair, trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_zipit import MergeSettings, MultiHeadModule, ZipIt, merge_backbones, trace
from lightning_zipit._common.calls import Call
from lightning_zipit._merging.cost import FlopsModel, count_flops, measure_cost
from lightning_zipit._merging.widths import find_fixed, spend, total_loss
from lightning_zipit.errors import ConfigurationError
from lightning_zipit.graph import AxisRef
from lightning_zipit.graph.spaces import Block
from lightning_zipit.matchers import Agglomerative, DualSpace, GreedyZip, KMeans, Matcher, Permute
from lightning_zipit.paths import AllHeads


class Dense(nn.Module):
    """Concatenation, depthwise and transposed convolution, and a flatten over positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grow = nn.ModuleList([nn.Conv2d(8 + 4 * number, 4, 3, padding=1) for number in range(2)])
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.PReLU(16))
        self.down = nn.Sequential(nn.ConvTranspose2d(16, 6, 2), nn.InstanceNorm2d(6, affine=True), nn.MaxPool2d(4))
        self.hidden, self.last = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for layer in self.grow:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.last(F.relu(self.hidden(self.down(self.depthwise(x)).flatten(1))))


class Mixer(nn.Module):
    """A residual stream with layer norm, which the head reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.inner, self.outer, self.last = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        return self.last((x + self.outer(F.gelu(self.inner(self.norm(x))))).mean(1))


def batches(channels=3, count=2):
    return list(torch.randn(count, 32, channels, 16, 16, generator=torch.Generator().manual_seed(0)))


def networks(make, count=2):
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        nets.append(make())
        settle(nets[-1], *batches()) if make is not Mixer else None
    return {f"task{number}": net.eval() for number, net in enumerate(nets)}


def run(merged, x):
    with torch.no_grad():
        return AllHeads(merged.trunk, merged.heads)(x)


NETWORKS = {
    "resnet": (SmallResNet, None),
    "cut resnet": (SmallResNet, "layer1.0"),
    "plain": (PlainNet, None),
    "dense": (Dense, None),
    "cut dense": (Dense, "depthwise"),
    "mobilenet": (lambda: tv.MobileNetV2(num_classes=4, width_mult=0.25), None),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name == "mobilenet" else ()) for name in NETWORKS]
)
def test_with_nothing_merged_every_head_is_its_own_source(name, count):
    make, stop_at = NETWORKS[name]
    nets, x = networks(make, count), batches()[0][:4]
    merged = merge_backbones(nets, batches(), MergeSettings(stop_at=stop_at, width=count, refine=None))
    for task, output in run(merged, x).items():
        torch.testing.assert_close(output, nets[task](x), rtol=1e-3, atol=1e-4)
    assert not any(space.within or space.across for space in merged.report.spaces)


@pytest.mark.parametrize("refine", [None, "batch_norm", "least_squares", "repair"])
@pytest.mark.parametrize("matcher", [GreedyZip(), KMeans(), Agglomerative(), DualSpace(matcher=GreedyZip())], ids=str)
def test_a_wider_merge_of_copies_is_the_network(matcher, refine):
    net, x = networks(SmallResNet, 1)["task0"], batches()[0]
    settings = MergeSettings(width=1.25, refine=refine, matcher=matcher)
    merged = merge_backbones({"a": net, "b": copy.deepcopy(net)}, batches(), settings)
    with torch.no_grad():
        expected = net(x)
    for output in run(merged, x).values():
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


def test_one_network_with_every_feature_twice_is_folded_to_half():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1728, 4))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            half = len(layer.weight) // 2
            layer.weight[half:], layer.bias[half:] = layer.weight[:half], layer.bias[:half]
    merged = merge_backbones({"only": net}, batches(), MergeSettings(width=0.5))
    assert merged.trunk.get_submodule("2").weight.shape == (6, 4, 3, 3)
    x = batches()[0]
    torch.testing.assert_close(run(merged, x)["only"], net(x), rtol=1e-4, atol=1e-5)


def test_a_width_of_its_own_for_a_space():
    nets = networks(SmallResNet)
    merged = merge_backbones(nets, batches(), MergeSettings(width={"layer2.0.conv1": 0.5, "conv1": 1.5}))
    widths = {space.name: space.width for space in merged.report.spaces}
    sizes = {space.name: space.size for space in merged.report.spaces}
    assert widths == sizes | {"layer2.0.conv1": 8, "conv1": 12}
    conv = merged.trunk.get_submodule("layer2.0.conv1")
    assert (conv.out_channels, conv.in_channels, tuple(conv.weight.shape)) == (8, 12, (8, 12, 3, 3))
    assert merged.trunk.get_submodule("bn1").num_features == 12


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_the_checkpoint_holds_the_sizes(tmp_path, ratio):
    models = {"a": Lit(), "b": Lit(7)}
    run = trainer()
    merged = ZipIt(run).merge(models, images(), backbone="net", stop_at="layer2.0", width=ratio)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    again = MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt")
    x = batches()[0]
    with torch.no_grad():
        first, second = merged(x), again(x)
    assert all(torch.equal(first[task], second[task]) for task in models)
    assert [space.width for space in again.report.spaces] == [space.width for space in merged.report.spaces]
    assert measure_cost(again, x[:1]).flops == merged.report.merged.flops


def test_a_single_checkpoint_is_folded_by_the_driver():
    merged = ZipIt(trainer()).merge({"a": Lit()}, images(), backbone="net", width=0.5)
    assert merged(batches()[0])["a"].shape == (32, 5)
    with pytest.raises(ConfigurationError, match="compress the single model with a `width`"):
        ZipIt(trainer()).merge({"a": Lit()}, images(), backbone="net")


# What must keep its size


def test_space_whose_size_an_operator_needs_keeps_its_size():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.last(torch.relu(self.second(x)).reshape(-1, 12) / 12)

    torch.manual_seed(0)
    net, data = Reshaped(), torch.randn(64, 6)
    assert list(find_fixed(trace(net, example_input=data), net, Call.of(data))) == ["second"]
    merged = merge_backbones({"a": net, "b": Reshaped()}, [data], MergeSettings(width=1.5))
    assert {space.name: space.width for space in merged.report.spaces} == {"first": 12, "second": 12}
    assert any("`width` was not applied to these spaces: `second`" in note for note in merged.report.notes)
    with pytest.raises(ConfigurationError, match="'second' must be 1: an operator depends on its size"):
        merge_backbones({"a": net, "b": Reshaped()}, [data], MergeSettings(width={"second": 1.5}))


def test_features_that_layer_norm_looks_at_together_can_be_resized():
    net = networks(Mixer, 1)["task0"]
    x = torch.randn(4, 6, 5, 5)
    assert not find_fixed(trace(net, example_input=x), net, Call.of(x))
    merged = merge_backbones({"a": net, "b": Mixer()}, [torch.randn(64, 6, 5, 5)], MergeSettings(width=1.5))
    assert merged.trunk.get_submodule("norm").normalized_shape == (12,)


def test_groups_and_interleaved_features_keep_their_size():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
            self.second, self.third, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.grouped(torch.relu(self.first(x))))
            x = torch.cat([self.second(x), self.third(x)], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
            return self.last(torch.relu(x).mean((2, 3)))

    net, x = Shuffled(), batches()[0]
    fixed = find_fixed(trace(net, example_input=x), net, Call.of(x))
    assert set(fixed.values()) == {"groups or heads", "its features are interleaved with other features"}
    assert "grouped" in fixed and "second" in fixed


# The budget


def test_a_budget_of_flops_is_kept_and_spent():
    nets = networks(SmallResNet)
    for budget in (0.6, 1.0, 1.7):
        report = merge_backbones(nets, batches(), MergeSettings(width="auto", flops=budget, refine=None)).report
        ratio = report.merged.flops / report.sources["task0"].flops
        assert 0.85 * budget <= ratio <= budget * 1.001


def test_features_that_are_alike_are_merged_first():
    torch.manual_seed(0)
    first, second = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in "ab"
    )
    second[0].load_state_dict(first[0].state_dict())
    report = merge_backbones(
        {"a": first, "b": second}, [torch.randn(256, 6)], MergeSettings(width="auto", flops=1.4)
    ).report
    alike, other = report.spaces
    assert alike.width <= 8 < other.width


def test_the_flops_of_widths_are_those_that_are_measured():
    nets = networks(Dense)
    graphs = [trace(net, example_input=batches()[0]) for net in nets.values()]
    pairs = zip(nets.values(), graphs, strict=True)
    model = FlopsModel.of(graphs, [count_flops(net, graph, Call.of(batches()[0][:1])) for net, graph in pairs])
    merged = merge_backbones(nets, batches(), MergeSettings(width=1.5, refine=None))
    assert model(merged.widths) == pytest.approx(merged.report.merged.flops)
    assert model({}) == pytest.approx(merge_backbones(nets, batches(), MergeSettings()).report.merged.flops)


class TiedTwice(nn.Module):
    """One weight that a module, another module and the forward itself multiply with."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.again = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + F.relu(self.inner(x)) + F.relu(self.again(x))
        return self.head(x + F.relu(F.linear(x, self.inner.weight)))


class ComputedWeight(nn.Module):
    """A convolution with a weight that the forward scales, and a matrix that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.matrix = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 6) / 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        weight = self.conv.weight * 2
        x = F.relu(F.conv2d(x, weight, self.conv.bias)).mean((2, 3))
        return self.head(F.relu(x @ self.matrix))


@pytest.mark.parametrize("width", [0.5, 1.5])
@pytest.mark.parametrize(
    ("make", "x"),
    [(TiedTwice, torch.randn(48, 6)), (ComputedWeight, torch.randn(48, 3, 5, 5))],
    ids=["tied", "computed"],
)
def test_the_flops_of_tied_and_computed_weights_are_predicted_exactly(make, x, width):
    torch.manual_seed(0)
    nets = {task: make() for task in "ab"}
    graphs = [trace(net, example_input=x[:1]) for net in nets.values()]
    pairs = zip(nets.values(), graphs, strict=True)
    model = FlopsModel.of(graphs, [count_flops(net, graph, Call.of(x[:1])) for net, graph in pairs])
    merged = merge_backbones(nets, [x], MergeSettings(width=width, refine=None))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        AllHeads(merged.trunk, merged.heads)(x[:1])
    assert merged.widths
    assert model(merged.widths) == pytest.approx(counter.get_total_flops())


def test_a_budget_is_spent_where_most_would_be_lost():
    flops = FlopsModel(((1.0, (axis("a"), axis("b"))),), 0.0, 1.0)
    losses = {name: {width: loss * (8 - width) for width in range(1, 9)} for name, loss in (("a", 0.01), ("b", 0.1))}
    assert spend(flops, losses, 1.0) == {"a": 2, "b": 8}
    assert spend(flops, losses, 0.0) == {"a": 1, "b": 1}


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_spent_nearly_as_well_as_the_best_of_all_ways(seed):
    generator = torch.Generator().manual_seed(seed)
    axes = [axis(name) for name in "abc"]
    flops = FlopsModel(((1.0, (axes[0], axes[1])), (2.0, (axes[1], axes[2])), (1.0, (axes[1], axes[1]))), 0.0, 1.0)
    falls = torch.rand(3, 8, generator=generator).sort(descending=True).values  # each feature adds less than the last
    losses = {
        name: {width: float(fall[width:].sum() / fall.sum()) for width in range(1, 9)}
        for name, fall in zip("abc", falls, strict=True)
    }
    every = [dict(zip("abc", widths, strict=True)) for widths in itertools.product(range(1, 9), repeat=3)]
    narrowest = total_loss(flops, losses, every[0])
    for budget in (2.0, 4.0, 8.0):
        chosen = spend(flops, losses, budget)
        assert flops(chosen) <= budget
        best = min(total_loss(flops, losses, widths) for widths in every if flops(widths) <= budget)
        assert total_loss(flops, losses, chosen) <= best + 0.1 * narrowest


# Where the trunk ends


def test_the_more_may_be_spent_the_earlier_the_trunk_ends():
    nets, ends = networks(SmallResNet), []
    for budget in (0.6, 1.5, 1.9):
        settings = MergeSettings(stop_at="auto", width="auto", flops=budget, refine=None)
        merged = merge_backbones(nets, batches(), settings)
        assert merged.report.merged.flops <= budget * merged.report.sources["task0"].flops * 1.001
        (graph,) = {graph.stop_at: graph for graph in merged.graphs.values()}.values()
        assert [space.name for space in merged.report.spaces] == list(graph.spaces)
        ends.append(len(graph.trunk_nodes))
        assert any("The trunk ends at" in note for note in merged.report.notes)
    assert ends[0] > ends[2] and ends == sorted(ends, reverse=True)


def test_a_trunk_whose_end_was_chosen_is_saved_and_made_again_from_its_statistics(tmp_path):
    models, how = settled_pair(), {"backbone": "net", "stop_at": "auto", "width": "auto", "flops": 1.6, "refine": None}
    how["statistics"] = tmp_path / "known.safetensors"
    run = trainer()
    merged = ZipIt(run).merge(models, images(32), **how)
    run.save_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    for other in (
        MultiHeadModule.load_from_checkpoint(tmp_path / "merged.ckpt"),
        ZipIt(trainer()).merge(models, **how),
    ):
        for name, tensor in merged.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)


def test_a_sweep_over_ends_of_the_trunk_calibrates_once(tmp_path):
    result = ZipIt(trainer()).sweep(
        settled_pair(),
        images(32),
        val_dataloaders=[images(16), images(16)],
        backbone="net",
        metric="val_acc",
        stop_at=["auto", "layer1", None],
        width="auto",
        flops=[0.7, 1.7],
        refine=None,
        results=tmp_path / "swept.csv",
    )
    assert not any(row.error for row in result.rows[:2]) and len(result.rows) == 6
    assert all(row.relative_flops <= row.settings.flops * 1.001 for row in result.rows if not row.error)


# Axes


def axis(*spaces, size=4, role="producer"):
    blocks = tuple(Block(name, range(number * size, (number + 1) * size)) for number, name in enumerate(spaces))
    return AxisRef(blocks, role, size * len(spaces))


def test_blocks_keep_their_order_when_they_grow_and_shrink():
    blocks = (Block("b", range(7, 15, 2), 2), Block("a", range(1, 7, 2), 2))
    ref = AxisRef(blocks, "consumer", 16)  # entry 0 | a, a, a | b, b, b, b | entry 15
    resized = ref.resized({"a": 5, "b": 2})
    assert (resized.size, resized.blocks[1].starts, resized.blocks[0].starts) == (16, range(1, 11, 2), range(11, 15, 2))
    index = ref.index({"a": torch.tensor([4, 0, 0]), "b": torch.tensor([1, 1, 0, 1])}, resized)
    assert index.tolist() == [0, 9, 10, 1, 2, 1, 2, 13, 14, 13, 14, 11, 12, 13, 14, 15]
    assert ref.resized({"a": 3}) is ref


def test_interleaved_blocks_move_with_what_grows_before_them():
    ref = AxisRef((Block("a", range(2)), Block("b", range(2, 6, 2)), Block("c", (5, 3))), "consumer", 6)
    resized = ref.resized({"a": 3})
    assert [block.starts for block in resized.blocks] == [range(3), range(3, 7, 2), (6, 4)]
    tables = {"a": torch.tensor([2, 0]), "b": torch.tensor([1, 0]), "c": torch.tensor([0, 1])}
    assert ref.index(tables, resized).tolist() == [2, 0, 5, 4, 3, 6]


# Arguments


class TwoArguments(Matcher):
    def __call__(self, similarity, num_models):
        return torch.arange(len(similarity) // num_models).repeat(num_models)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1.5, "matcher": Permute()}, "Permute cannot change the number of features"),
        ({"width": 1.5, "matcher": TwoArguments()}, "TwoArguments cannot change"),
        ({"width": 1.5, "matcher": DualSpace()}, "Permute cannot change"),
        ({"width": "auto"}, "`flops` is the budget"),
        ({"flops": 1.5}, "`flops` is the budget"),
        ({"stop_at": "auto"}, "within a budget of FLOPs"),
        ({"stop_at": "auto", "width": "auto", "flops": 1.0, "merge_heads": True}, "and merge_heads=False"),
        ({"width": "auto", "flops": -1.0}, "`flops` must be above 0"),
        ({"width": "automatic"}, "`width` must be a ratio"),
        ({"width": "auto", "flops": 1.0, "matcher": DualSpace(matcher=GreedyZip())}, "all spaces together"),
    ],
)
def test_merge_settings_refuse_bad_widths(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        MergeSettings(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 2.5}, r"must be above 0 and at most 2 \(the number of models\)"),
        ({"width": 0.0}, "must be above 0"),
        ({"width": {"layer9": 1.5}}, "the space 'layer9', but the spaces of this network are conv1, layer1.0.conv1"),
        ({"width": "auto", "flops": 0.001}, "cannot be met: .* has 0.0. times the FLOPs of one source"),
    ],
)
def test_merge_refuses_impossible_widths(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        merge_backbones(networks(SmallResNet), batches(), MergeSettings(**arguments))


def test_matcher_without_width_works_for_width_one():
    nets = networks(SmallResNet)
    merged = merge_backbones(nets, batches(), MergeSettings(width={"conv1": 1.0}, matcher=TwoArguments()))
    assert merged.widths == {}
