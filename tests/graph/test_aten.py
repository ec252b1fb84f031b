"""ATen operators against themselves: those that captured networks show, by the arguments of their functions."""

import random

import pytest
import test_every_operator as functions
import torch
from helpers.equivariance import Call, Input, Weight, judge

from lightning_zipit.graph import registry
from lightning_zipit.graph.operators import aten

NAMES = {"slice": "narrow", "index": "index_select", "_unsafe_view": "view", "linalg_vector_norm": "norm"}
"""Operators that take the arguments of a function of another name."""


def sliced(x):
    return [((x, dim, *given), {}) for dim in range(1, len(x.shape)) for given in ((1, 3), (0, 4, 2), (None, 2))]


def indexed(x):
    one, mask = Input((3,), (), functions.indices), Input(x.shape[1:2], (), functions.truth)
    return [((x, [*[None] * dim, one]), {}) for dim in range(1, len(x.shape))] + [((x, [None, mask]), {})]


def put(x):
    one = Input((2,), (), functions.distinct)
    tails = [[None] * dim + [one] for dim in range(1, len(x.shape))]
    found = []
    for dim, where in enumerate(tails, 1):
        tail = Input((2, *x.shape[dim + 1 :]), tuple(a - dim for a in x.axes if a > dim))
        found += [((x, where, other), {}) for other in (Input(()), tail, functions.without(tail))]
    return found


def looked_up(x):
    index = Input(x.shape, (), functions.indices)
    return [
        ((Weight((4, 5)), index), {}),
        ((Weight((4, 5)), Input((6,), (), functions.indices), Input((2,), (), zeros)), {}),
    ]


def zeros(tensor):
    return torch.tensor([0, 2])


def normalized(x):
    one, sizes = Weight(x.shape[1:2]), [*x.shape, 1, 1]
    layer = [((x, x.shape[-n:], Weight(x.shape[-n:]), Weight(x.shape[-n:]), 1e-5), {}) for n in (1, 2)]
    group = ((x, one, one, sizes[0], sizes[1], torch.Size(sizes[2:]).numel(), 2, 1e-5), {})
    return [*layer, group, ((x, one, one, one, one, 0.1, 1e-5), {})]


def pooled(x):
    return [((x, [2] * n), {}) for n in (1, 2, 3)] + [((x, [1, 1] * n), {}) for n in (1, 2, 3)]


def patched(x):
    return [((x, [2, 2], [1, 1], [0, 0], [1, 1]), {}), ((x, [3, 2], [2, 1], [1, 1], [0, 0], [1, 1]), {})]


def convolved(x):
    n = len(x.shape) - 2
    given = ([1] * n, [1] * n, [1] * n, False, [0] * n)
    return [((x, Weight((4, x.shape[1] // g, *[3] * n)), Weight((4,)), *given, g), {}) for g in (1, 2)]


def resized(x):
    n = len(x.shape) - 2
    return [((x, [5] * n, *more), {}) for more in ((), (None,), (False,), (False, None))]


def copied(x):
    return [((x, Input(x.shape, x.axes)), {}), ((functions.without(x), x), {})]


def convolved_by_one(x):
    n, channels = len(x.shape) - 2, x.shape[1]
    shapes = [
        ((channels, 5), 1),
        ((4, channels), 1),
        ((4, channels // 2), 2),
        ((channels, 1), channels),
        ((channels, 2), 2),
    ]
    weights = [(Weight((*shape, *[3] * n)), groups) for shape, groups in shapes]
    ones = [1] * n
    given = [((x, weight, None, ones, ones, ones, groups), {}) for weight, groups in weights]
    return given + [((x, weight, None, ones, ones, [0] * n, groups), {}) for weight, groups in weights]


def contracted(x):
    return [((args[0], [*args[1:]]), {}) for args, _ in functions.einsums(x)]


def several(x):
    return [(([*args],), {}) for args, _ in functions.several(x)]


def softened(x):
    return [((x, dim, False), {}) for dim in range(1, len(x.shape))]


def masked(x):
    mask = Input(x.shape, x.axes, functions.truth)
    return [((mask, other), {}) for other in (mask, Input(x.shape, (), functions.truth), True)]


def shuffled(x):
    return [((Input((2, 8, 4, 4), (axis,)), 2), {}) for axis in (1, 2)]


OWN = {
    "einsum": contracted,
    "broadcast_tensors": several,
    **dict.fromkeys(["_softmax", "_log_softmax"], softened),
    **dict.fromkeys(["__and__", "__or__"], masked),
    **dict.fromkeys(["pixel_shuffle", "pixel_unshuffle"], shuffled),
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2)], convolved_by_one),
    "slice": sliced,
    "index": indexed,
    "index_put": put,
    "embedding": looked_up,
    "embedding_bag": looked_up,
    "_embedding_bag": looked_up,
    "im2col": patched,
    "col2im": patched,
    "convolution": convolved,
    "copy": copied,
    **dict.fromkeys(["native_layer_norm", "native_group_norm", "_native_batch_norm_legit_no_training"], normalized),
    **dict.fromkeys(["constant_pad_nd", "max_pool2d_with_indices", "max_pool3d_with_indices"], pooled),
    **dict.fromkeys([f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)], pooled),
}
"""Arguments of the operators that have no function in torch, or take their arguments in another order."""

MET = """
__and__ __or__ _log_softmax _softmax _to_copy abs adaptive_avg_pool2d add addmm alias amax argmax argmin argsort
avg_pool1d avg_pool2d batch_norm bitwise_not bmm broadcast_tensors cat cdist ceil chunk clamp clamp_min clone
constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d convolution copy cos
cosine_similarity cumsum diff div dropout einsum elu embedding embedding_bag eq erf exp expand expand_as fft_fft
fft_fft2 fft_irfft2 fft_rfft fft_rfft2 flatten flip floor_divide gather ge gelu glu group_norm gru gru_cell gt
hardsigmoid hardswish hardtanh im2col col2im index index_add index_put index_select instance_norm layer_norm le
leaky_relu linalg_vector_norm linear log log1p log_softmax lstm lstm_cell lt masked_fill matmul max max_pool1d
max_pool2d max_pool2d_with_indices maximum mean min minimum mish mul narrow native_group_norm native_layer_norm
_native_batch_norm_legit_no_training ne neg norm pad pairwise_distance permute pixel_shuffle pixel_unshuffle pow
prelu prod reflection_pad1d reflection_pad2d relu relu6 repeat repeat_interleave replication_pad2d reshape
rms_norm rnn_tanh rnn_relu roll round rsqrt rsub scaled_dot_product_attention scatter scatter_add select
select_scatter selu sigmoid sign silu sin slice slice_scatter softmax softplus sort split split_with_sizes sqrt
square squeeze stack std sub sum t take_along_dim tan tanh to topk transpose tril triu type_as unbind unflatten
unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_trilinear3d var var_mean view_as_complex view_as_real where
""".split()  # noqa: SIM905 (a list of this many strings cannot be read)
"""Operators that were met in public networks."""


def calls(name, overload, record, x):
    if name in OWN:
        given = OWN[name](x)
    elif name.startswith("upsample"):
        given = resized(x)
    else:
        rule = record.rule.__name__
        (make,) = [make for names, make in functions.FAMILIES.items() if rule in names.split()]
        known = NAMES.get(name, name)
        given = make(x, known) if make.__code__.co_argcount == 2 else make(x)
    positional = sum(not argument.kwarg_only for argument in overload._schema.arguments)
    return [Call(overload, args, kwargs) for args, kwargs in given if len(args) <= positional]


ACCEPTED, ATTEMPTS = 6, 3000
"""How many calls that torch accepts suffice, and how many are tried."""


@pytest.fixture(scope="module")
def records():
    """The records of all ATen operators, made once."""
    before = dict(registry.OPERATORS)
    try:
        aten.register_all()
        return registry.OPERATORS.copy()
    finally:
        registry.OPERATORS.clear()
        registry.OPERATORS.update(before)


def attempts(name, records, rng):
    """Yield calls of the overloads of an operator at random: features on any axes, any arguments."""
    overloads = [(each, records[each]) for each in aten.overloads(name) if each in records]
    given, known = list(functions.inputs()), {}
    for _ in range(ATTEMPTS):
        x, (overload, record) = rng.choice(given), rng.choice(overloads)
        if (x, overload) not in known:
            known[x, overload] = calls(name, overload, record, x)
        if known[x, overload]:
            yield rng.choice(known[x, overload])


@pytest.mark.parametrize("name", MET)
def test_an_operator_that_networks_use_permutes_its_output_as_the_rule_says(name, records, monkeypatch):
    monkeypatch.setattr(registry, "OPERATORS", records)
    rng = random.Random(0)
    accepted = moved = 0
    for call in attempts(name, records, rng):
        outcome = judge(call)
        accepted += outcome is not None
        moved += functions.moves(outcome)
        if moved > 1 and accepted >= ACCEPTED:
            return
    pytest.fail(f"{accepted} calls of {name}, and {moved} moved features")
