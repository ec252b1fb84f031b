from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.dense_zip import matrices as by_definition
from helpers.features import correlations, mixed_features
from torch import nn

from lightning_zipit import Moments
from lightning_zipit import functional as F
from lightning_zipit._matching.families import families, match_family
from lightning_zipit._matching.maps import DenseMap, SpaceMap, apply_maps, unmerge_along
from lightning_zipit._matching.similarity import similarity_from
from lightning_zipit._merging.parameters import merge_into, merge_parameter, unmerge_into
from lightning_zipit.graph import AxisRef, Block, FeatureSpace, MergeGraph
from lightning_zipit.matchers import Average, DenseMaps, GreedyZip, Permute

SPACES = {"a": 4, "b": 6}


def axis(role, *blocks, size=None):
    return AxisRef(blocks, role, size or sum(len(block.starts) * block.repeat for block in blocks))


A, B = Block("a", range(4)), Block("b", range(6))
AFTER_A = Block("b", range(4, 10))
FLAT = Block("a", range(0, 24, 6), repeat=6)
SHUFFLED = Block("b", (4, 0, 5, 2, 1, 3))
EVERY_OTHER = Block("b", range(1, 13, 2))

PARAMETERS = {
    "conv": ((4, 6, 3, 2), (axis("producer", A), axis("consumer", B), None, None)),
    "conv of the image": ((4, 3, 3, 3), (axis("producer", A), None, None, None)),
    "linear": ((6, 4), (axis("producer", B), axis("consumer", A))),
    "one space on both axes": ((6, 6), (axis("producer", B), axis("consumer", B))),
    "bias": ((6,), (axis("producer", B),)),
    "concatenation": ((6, 10, 2, 2), (axis("producer", B), axis("consumer", A, AFTER_A), None, None)),
    "norm of a concatenation": ((10,), (axis("producer", A, AFTER_A),)),
    "flattened": ((6, 24), (axis("producer", B), axis("consumer", FLAT))),
    "flattened beside another": ((4, 30), (axis("producer", A), axis("consumer", FLAT, Block("b", range(24, 30))))),
    "shuffled": ((4, 6, 1, 1), (axis("producer", A), axis("consumer", SHUFFLED), None, None)),
    "beside entries of no space": ((4, 13), (axis("producer", A), axis("consumer", EVERY_OTHER, size=13))),
    "last axis": ((3, 5, 6), (None, None, axis("producer", B))),
}


def random_maps(num_models, seed=0):
    """Matchings of both spaces in which each merged feature has at least one source feature."""
    generator = torch.Generator().manual_seed(seed)

    def labels(size):
        some = torch.randint(size, ((num_models - 1) * size,), generator=generator)
        return torch.cat([torch.arange(size), some])[torch.randperm(num_models * size, generator=generator)]

    return {space: SpaceMap(labels(size), num_models) for space, size in SPACES.items()}


def random_copies(shape, num_models, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num_models)]


def random_matrices(num_models, seed=0):
    """Dense maps of both spaces, or of one of them, for as many features as the models have."""
    generator = torch.Generator().manual_seed(seed)

    def matrices(size):
        return tuple(torch.randn(size, size, generator=generator).double() for _ in range(num_models))

    both = {space: DenseMap(DenseMaps(matrices(size), matrices(size))) for space, size in SPACES.items()}
    return {"both": both, "one": random_maps(num_models) | {"b": both["b"]}}


def dense(ref, maps, source):
    """M_i (for a producer) or U_i (for a consumer) over the whole axis; 1 where it holds no feature."""
    matrix = torch.eye(ref.size, dtype=torch.float64)
    for block in ref.blocks:
        if isinstance(maps[block.space], DenseMap):
            merge, unmerge = maps[block.space].matrices
        else:
            merge, unmerge = by_definition(maps[block.space].labels, maps[block.space].num_models)
        own = merge[source] if ref.role == "producer" else unmerge[source]
        entries = block.entries().flatten()
        matrix[entries] = 0
        matrix[entries[:, None], entries] = torch.kron(own, torch.eye(block.repeat)).double()
    return matrix


def dense_contraction(weight, refs, maps, source):
    for number, ref in enumerate(refs):
        if ref:
            matrix = dense(ref, maps, source)
            turned = matrix if ref.role == "producer" else matrix.T
            weight = torch.tensordot(turned, weight, ([1], [number])).movedim(0, number)
    return weight


@pytest.fixture(autouse=True)
def double_matrices():
    """`F.merge_matrices` are of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("name", PARAMETERS)
def test_merging_a_parameter_is_the_sum_of_dense_products(name, num_models):
    shape, refs = PARAMETERS[name]
    maps, copies = random_maps(num_models), random_copies(shape, num_models)
    expected = [dense_contraction(copy, refs, maps, source) for source, copy in enumerate(copies)]
    for source, copy in enumerate(copies):
        torch.testing.assert_close(apply_maps(copy, refs, maps, source), expected[source])
    torch.testing.assert_close(merge_parameter(copies, refs, maps), sum(expected))


@pytest.mark.parametrize("spaces", ["both", "one"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_so_it_is_where_maps_are_matrices(name, spaces):
    shape, refs = PARAMETERS[name]
    maps, copies = random_matrices(2)[spaces], random_copies(shape, 2)
    expected = [dense_contraction(copy, refs, maps, source) for source, copy in enumerate(copies)]
    for source, copy in enumerate(copies):
        torch.testing.assert_close(apply_maps(copy, refs, maps, source), expected[source])
    torch.testing.assert_close(merge_parameter(copies, refs, maps), sum(expected))
    for ref in filter(None, refs):
        unmerge = dense(replace(ref, role="consumer"), maps, 1)
        found = unmerge_along(ref, maps, 1)
        if not found.is_floating_point():
            found = nn.functional.one_hot(found, ref.size).double()
        torch.testing.assert_close(found, unmerge)


def test_labels_and_their_matrices_merge_alike():
    labels, rest = random_maps(3), random_maps(3, seed=1)["b"]
    matrices = {
        space: DenseMap(DenseMaps(*map(tuple, F.merge_matrices(each.labels, 3)))) for space, each in labels.items()
    }
    for shape, refs in PARAMETERS.values():
        copies = random_copies(shape, 3)
        for weights in (None, (1.0, 1.0, 1.0)):
            own = {space: replace(each, weights=weights) for space, each in matrices.items()}
            torch.testing.assert_close(merge_parameter(copies, refs, own), merge_parameter(copies, refs, labels))
        mixed = merge_parameter(copies, refs, {"a": matrices["a"], "b": rest})
        torch.testing.assert_close(mixed, merge_parameter(copies, refs, {"a": labels["a"], "b": rest}))


def test_a_space_of_another_width_may_have_matrices():
    maps = {
        "a": DenseMap(DenseMaps(tuple(torch.randn(2, 7, 4)), tuple(torch.randn(2, 4, 7)))),
        "b": random_maps(2)["b"],
    }
    merged = merge_parameter(random_copies((6, 10), 2), (axis("producer", B), axis("consumer", A, AFTER_A)), maps)
    assert merged.shape == (6, 13)
    beside = merge_parameter(
        random_copies((4, 13), 2), (axis("producer", A), axis("consumer", EVERY_OTHER, size=13)), maps
    )
    assert beside.shape == (7, 13)


def test_weights_count_in_matrices_as_they_do_in_clusters():
    shape, refs = PARAMETERS["conv"]
    labels = {
        space: SpaceMap(torch.cat([torch.arange(size), torch.randperm(size)]), 2) for space, size in SPACES.items()
    }
    matrices = {
        space: DenseMap(DenseMaps(*map(tuple, F.merge_matrices(each.labels, 2)))) for space, each in labels.items()
    }
    copies = random_copies(shape, 2)
    found = [
        merge_parameter(copies, refs, {space: replace(each, weights=(3.0, 1.0)) for space, each in maps.items()})
        for maps in (labels, matrices)
    ]
    torch.testing.assert_close(*found)


def test_a_convolution_merges_as_the_equation_reads():
    shape, refs = PARAMETERS["conv"]
    maps, copies = random_maps(2), random_copies(shape, 2)
    (merge_a, _), (_, unmerge_b) = (by_definition(maps[space].labels, 2) for space in "ab")
    expected = sum(
        torch.einsum("wo,oihk,iv->wvhk", m, weight, u) for m, weight, u in zip(merge_a, copies, unmerge_b, strict=True)
    )
    torch.testing.assert_close(merge_parameter(copies, refs, maps), expected)


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("name", PARAMETERS)
def test_shuffled_copies_of_a_parameter_merge_to_the_parameter(name, num_models):
    shape, refs = PARAMETERS[name]
    torch.manual_seed(num_models)
    maps = {
        space: SpaceMap(torch.cat([torch.randperm(size) for _ in range(num_models)]), num_models)
        for space, size in SPACES.items()
    }
    (parameter,) = random_copies(shape, 1)
    copies = []
    for source in range(num_models):
        targets = {space: space_map.targets(source) for space, space_map in maps.items()}
        copy = parameter
        for number, ref in enumerate(refs):
            copy = copy.index_select(number, ref.index(targets)) if ref else copy
        copies.append(copy)
    torch.testing.assert_close(merge_parameter(copies, refs, maps), parameter)


@pytest.mark.parametrize("num_models", [2, 3])
def test_a_parameter_that_writes_no_space_is_averaged(num_models):
    maps, copies = random_maps(num_models), random_copies((5, 6), num_models)
    refs = (None, axis("consumer", B))
    unmerged = [copy @ dense(refs[1], maps, source) for source, copy in enumerate(copies)]
    torch.testing.assert_close(merge_parameter(copies, refs, maps), sum(unmerged) / num_models)
    torch.testing.assert_close(merge_parameter(copies, (None, None), maps), sum(copies) / num_models)
    torch.testing.assert_close(merge_parameter([copy[0, 0] for copy in copies], (), {}), sum(copies)[0, 0] / num_models)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_whole_numbers_are_taken_over_from_the_first_model(dtype):
    first, second = torch.tensor([3, 0, 1]).to(dtype), torch.tensor([0, 5, 0]).to(dtype)
    merged = merge_parameter([first, second], (None,), {})
    assert merged.dtype == dtype
    assert torch.equal(merged, first)
    assert merged.data_ptr() != first.data_ptr()


def test_equal_copies_of_what_is_in_no_space_stay_as_they_are_to_the_last_digit():
    (value,) = random_copies((1000,), 1)
    assert not torch.equal((value + value + value) / 3, value)
    merged = merge_parameter([value, value.clone(), value.clone()], (None,), {})
    assert torch.equal(merged, value)
    assert merged.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_taken_in_double_precision_and_come_back_in_the_type_of_the_parameter(dtype):
    shape, refs = PARAMETERS["conv"]
    maps, copies = random_maps(3), random_copies(shape, 3, dtype)
    merged = merge_parameter(copies, refs, maps)
    assert merged.dtype == dtype
    assert torch.equal(merged, merge_parameter([copy.double() for copy in copies], refs, maps).to(dtype))


def test_merging_leaves_the_sources_alone_and_records_no_gradient():
    shape, refs = PARAMETERS["conv"]
    copies = [nn.Parameter(copy) for copy in random_copies(shape, 2)]
    before = [copy.detach().clone() for copy in copies]
    assert not merge_parameter(copies, refs, random_maps(2)).requires_grad
    assert all(map(torch.equal, copies, before))


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_targets_and_shares_are_the_entries_of_the_matrices(num_models):
    for space_map in random_maps(num_models).values():
        merge, unmerge = by_definition(space_map.labels, num_models)
        for source in range(num_models):
            features, targets = torch.arange(len(unmerge[source])), space_map.targets(source)
            assert torch.equal(unmerge[source], nn.functional.one_hot(targets, len(features)).double())
            torch.testing.assert_close(merge[source][targets, features], space_map.shares(source))


AXES = {
    "conv.weight": (axis("producer", B), axis("consumer", A), None, None),
    "norm.weight": (axis("producer", B),),
    "norm.bias": (axis("producer", B),),
    "norm.running_mean": (axis("producer", B),),
    "norm.running_var": (axis("producer", B),),
    "head.weight": (None, axis("consumer", B)),
}


def network(seed):
    """Space a → convolution → norm → space b → head."""
    torch.manual_seed(seed)
    layers = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, bias=False), "norm": nn.BatchNorm2d(6), "head": nn.Linear(6, 3)})
    for tensor in layers["norm"].state_dict().values():
        tensor.copy_(torch.randint(1, 9, tensor.shape))
    return layers.double()


def test_every_parameter_and_buffer_is_merged_by_its_axes():
    sources, target, maps = [network(1), network(2)], network(3), random_maps(2)
    merge_into(target, sources, AXES, maps)
    for name, merged in target.state_dict().items():
        copies = [source.state_dict()[name] for source in sources]
        if name in AXES:
            expected = sum(dense_contraction(copy, AXES[name], maps, source) for source, copy in enumerate(copies))
            share = 2 if AXES[name][0] is None else 1  # what writes no space is averaged
            torch.testing.assert_close(merged, expected / share, msg=name)
    assert target["norm"].num_batches_tracked == sources[0]["norm"].num_batches_tracked
    torch.testing.assert_close(target["head"].bias, (sources[0]["head"].bias + sources[1]["head"].bias) / 2)


@pytest.mark.parametrize("source", [0, 1])
def test_a_head_reads_the_merged_features_as_its_own(source):
    maps, head, features = random_maps(2), network(1)["head"], torch.randn(8, 6)
    expected = head(features[:, maps["b"].targets(source)])
    unmerge_into(head, head, {"weight": AXES["head.weight"]}, maps, source)
    torch.testing.assert_close(head(features), expected)


def test_measured_spaces_are_matched_by_similarity_and_the_others_by_number():
    spaces = {name: FeatureSpace(name, size, (), (), tap=None) for name, size in SPACES.items()}
    graph = MergeGraph(spaces, {}, (), frozenset(), None, nn.Identity(), torch.fx.Graph())
    features = mixed_features(50, 12)
    measured = {"b": Moments(50, features.mean(0), features.T.cov())}
    known, matched = {name: similarity_from(each) for name, each in measured.items()}, {}
    for family in families(graph):
        own = {name: known[name] for name in family if name in known}
        matched |= match_family(graph, family, own, GreedyZip(), 2)
    labels = {name: match.features for name, match in matched.items()}
    similarities = {name: match.similarity for name, match in matched.items() if match.similarity is not None}
    assert list(labels) == ["a", "b"]
    assert list(similarities) == ["b"]
    torch.testing.assert_close(similarities["b"], correlations(features), rtol=2e-6, atol=0)
    assert torch.equal(labels["b"], GreedyZip()(correlations(features), 2))
    assert labels["a"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("matcher", [GreedyZip(), Permute()])
def test_features_that_are_active_on_the_same_sample_are_told_apart_by_their_scale(matcher):
    features = torch.zeros(50, 6, dtype=torch.float64)
    features[7] = torch.tensor([1.0, 2.0, 4.0, 4.0, 1.0, 2.0])
    similarity = similarity_from(Moments(50, features.mean(0), features.T.cov()))
    assert matcher(similarity, 2).tolist() == [0, 1, 2, 2, 0, 1]


@pytest.mark.parametrize("matcher", [GreedyZip(), Permute(), Average()])
def test_features_are_matched_within_the_units_that_have_become_one(matcher):
    spaces = {
        "groups": FeatureSpace("groups", 3, (), (), tap=None),
        "inner": FeatureSpace("inner", 6, (), (), tap=None, units="groups", unit_of=(0, 1, 2, 0, 1, 2)),
    }
    graph = MergeGraph(spaces, {}, (), frozenset(), None, nn.Identity(), torch.fx.Graph())
    features = mixed_features(200, 12)
    measured = {"inner": Moments(200, features.mean(0), features.T.cov())}
    (family,) = families(graph)
    known = {name: similarity_from(each) for name, each in measured.items()}
    matched = match_family(graph, family, known, matcher, 2)
    maps = {name: SpaceMap(match.features, 2) for name, match in matched.items()}
    assert maps["inner"].labels.unique().tolist() == list(range(6))
    units = torch.tensor(spaces["inner"].unit_of)
    for model in range(2):
        own, whole = maps["inner"].targets(model), maps["groups"].targets(model)
        assert torch.equal(units[own], whole[units])
