"""Every registered operator against itself: ranks 2 to 5, all spellings, features on every axis and pair of axes."""

import random
from contextlib import suppress
from functools import cache
from itertools import combinations, islice, product

import pytest
import torch
from helpers.equivariance import Call, Input, Weight, judge, resolve
from torch import nn
from torch._ops import OpOverload

from lightning_zipit.graph.registry import OPERATORS, Trait

SHAPES = {2: (2, 6), 3: (2, 6, 4), 4: (2, 6, 4, 3), 5: (2, 4, 6, 2, 3)}
WIDE = {2: (2, 8), 3: (2, 8, 8), 4: (2, 8, 8, 8), 5: (2, 4, 8, 8, 8)}


def inputs(ranks=(2, 3, 4, 5), sizes=SHAPES, pairs=True, make=None):
    """Make tensors of several ranks with features on each axis, and on each pair of axes."""
    for rank in ranks:
        singles = [(axis,) for axis in range(1, rank)]
        for axes in (*singles, *(combinations(range(1, rank), 2) if pairs else ())):
            yield Input(sizes[rank], axes, make)


def truth(tensor):
    return tensor > 0


def without(x, axes=()):
    """Make tensors of the same shape without features, or with size 1 along some axes."""
    return Input(tuple(1 if axis in axes else size for axis, size in enumerate(x.shape)))


def per_feature(x, kind):
    """Make a parameter with one entry per feature, and size 1 along all other axes."""
    shape = tuple(size if axis in x.axes else 1 for axis, size in enumerate(x.shape))
    return Weight(shape) if kind is Weight else Input(shape, x.axes)


def entrywise(x):
    """Combine an input with numbers, broadcast tensors and parameters, and masks."""
    like, other = Input(x.shape, x.axes), Input(x.shape, (len(x.shape) - x.axes[0],))
    numbers = [(x,), (x, 2), (x, 0.3), (x, 0.1, 0.5), (0.5, x)]
    seconds = [like, other, without(x), without(x, x.axes), per_feature(x, Input), Input(x.shape[1:])]
    seconds += [per_feature(x, Weight), Weight(x.shape[1:]), Weight(x.shape[-1:]), Weight(()), Weight((3, *x.shape))]
    pairs = [(x, second) for second in seconds] + [(second, x) for second in seconds]
    mask = Input(x.shape, x.axes, truth)
    masks = [
        (mask,),
        (mask, mask),
        (x, mask, 0.5),
        (x, Input(x.shape, (), truth), 0.5),
        (mask, x, like),
        (mask, x, 0.5),
        (x, mask, like),
    ]
    keywords = [{"min": per_feature(x, Weight)}, {"max": like}, {"min": -0.5, "max": 0.5}]
    yield from (((*args,), {}) for args in (*numbers, *pairs, *masks, (x, like, per_feature(x, Weight))))
    yield from (((x,), named) for named in keywords)


def along(x):
    """Make the arguments of reductions: axes in all spellings."""
    for dim in (*range(1, len(x.shape)), -1):
        yield from (((x, dim), {}), ((x,), {"dim": dim}), ((x,), {"axis": dim}), ((), {"input": x, "dim": dim}))
        yield from (
            ((x, dim, True), {}),
            ((x,), {"dim": dim, "keepdim": True}),
            ((x,), {"axis": dim, "keepdims": True}),
        )
        yield from (((x, dim, True, True), {}), ((x,), {"dim": dim, "correction": 0}), ((x, 2, dim), {}))
        yield ((x, 2.0, dim, True), {})
    for dims in combinations(range(1, len(x.shape)), 2):
        yield from (((x, dims), {}), ((x, [*dims], True), {}), ((x,), {"dim": dims}), ((x, 2, dims), {}))
    yield from (
        ((x,), {}),
        ((x, True), {}),
        ((x,), {"unbiased": False}),
        ((x, ()), {}),
        ((x, Input(x.shape, x.axes)), {}),
    )


def pooled(x):
    yield from (((x, 3, 1, 1), {}), ((x, 3, 1), {"padding": 1}))  # as many positions as before
    for size in (2, (2,), (2, 2), (1, 2, 2)):
        yield from (((x, size), {}), ((x, 2.0, size), {}), ((x,), {"kernel_size": size}), ((x, size), {"stride": 1}))
        yield from (((x, size, 2, 0, 1, False, True), {}), ((x, size), {"return_indices": True}))
    yield from (
        ((x,), {"scale_factor": 2}),
        ((x, None, 2.0, "nearest"), {}),
        ((x,), {"scale_factor": 2, "mode": "linear"}),
    )


def padded(x):
    for pad in ((1, 1), (0, 0, 2, 1), (0, 0, 0, 0, 1, 2), (1, 0, 1, 0), (0, 1, 1, 1, 0, 0), (-1, 0)):
        yield from (((x, pad), {}), ((x,), {"pad": pad, "value": 2.0}), ((x, pad, "replicate"), {}))
        yield from (((x, pad), {"mode": "reflect"}), ((x, pad, "circular"), {}))


def alone(x):
    yield from (((x,), {}), ((), {"input": x}))


REARRANGED = {
    "reshape view": lambda x: [
        (x.shape[0], -1),
        ((*x.shape[:-1], -1, 2),),
        (-1, *x.shape[2:]),
        (2, 2, 3, *x.shape[2:]),
    ],
    "flatten": lambda x: [(), (1,), (1, 2), (0, 1), (-2,)],
    "unflatten": lambda x: [(1, (2, -1)), (-1, (-1, 2)), (2, (2, 2))],
    "squeeze ravel": lambda x: [(), (-1,), (1,)],
    "unsqueeze": lambda x: [(0,), (1,), (-1,), (2,)],
    "permute": lambda x: [
        tuple(reversed(range(len(x.shape)))),
        ((*range(1, len(x.shape)), 0),),
        (0, 2, 1),
        (0, 2, 3, 1),
    ],
    "transpose swapaxes swapdims movedim moveaxis": lambda x: [(1, 2), (0, 1), (-1, 1), ((1, 2), (2, 1))],
    "t": lambda x: [()],
    "diagonal": lambda x: [(0, 1, 2), (1, -1, 1)],
    "chunk split tensor_split unsafe_chunk unsafe_split": lambda x: [(2, 1), (3, -1), (2, 2), ([2, 4], 1)],
    "split_with_sizes": lambda x: [([2, 4], 1), ([1, 3], -1), ([1, 3], 2)],
    "unbind": lambda x: [(1,), (-1,), (2,)],
    "select": lambda x: [(1, 2), (-1, 0), (2, 1)],
    "narrow": lambda x: [(1, 1, 3), (-1, 0, 2), (2, 1, 2)],
    "index_select": lambda x: [(1, Input((3,), (), indices)), (-1, Input((2,), (), indices))],
    "view_as reshape_as expand_as": lambda x: [(Input((2, *x.shape[:0:-1])),), (Input(x.shape, x.axes),)],
    "expand broadcast_to": lambda x: [((5, *x.shape),), (x.shape,)],
    "repeat tile": lambda x: [
        (1, 2, *[1] * (len(x.shape) - 2)),
        ((1, 2, *[1] * (len(x.shape) - 2)),),
        ((2,) * len(x.shape),),
    ],
    "repeat_interleave": lambda x: [(2, 1), (2, -1), (3,)],
    "roll": lambda x: [(2, 1), (1, -1), ((1, 1), (1, 2)), (1,)],
    "flip": lambda x: [(1,), ([1, -1],), ([2],)],
    "rot90": lambda x: [(1, (1, 2)), (2, (-2, -1))],
    "pixel_shuffle pixel_unshuffle channel_shuffle": lambda x: [(2,)],
    "unfold": lambda x: [(1, 2, 2), (-1, 2, 1)],
}


def indices(tensor):
    return (tensor.abs() * 10).long() % 2


def rearranged(x, name):
    """Choose the further arguments of an operator by its name."""
    (arguments,) = [make(x) for names, make in REARRANGED.items() if name in names.split()]
    yield from (((x, *given), {}) for given in arguments)


def cast(x, name):
    given = {"to": [torch.float32], "type": [torch.float32], "type_as": [Input(x.shape, x.axes)]}.get(name, [])
    yield ((x, *given), {})


def blank(x, name):
    yield (
        (x, *{"full_like": [2.0], "new_full": [(2, 3), 1.0], "new_zeros": [(2, 3)], "new_ones": [3]}.get(name, [])),
        {},
    )


def joined(x):
    """Concatenation and stacking with features, positions and parameters."""
    like, plain, token = Input(x.shape, x.axes), without(x), Weight(x.shape)
    one = Input((*x.shape[:1], 1, *x.shape[2:]), x.axes) if x.axes != (1,) else like
    for dim in range(-1, len(x.shape)):
        for others in ([like], [plain], [plain, like], [token], [one], [Input(x.shape, (len(x.shape) - x.axes[0],))]):
            yield from ((([x, *others], dim), {}), (([*others, x],), {"dim": dim}), ((), {"tensors": [x], "axis": dim}))


def items(x):
    rest = (slice(None),) * (len(x.shape) - 2)
    for index in (slice(1, 3), slice(None, None, 2), 1, None, [1, 0, 2], Input((2,), (), indices), slice(2, 3)):
        yield from (((x, (slice(None), index, *rest)), {}), ((x, (..., index)), {}), ((x, (slice(None), index)), {}))


def products(x):
    """Matrix products with features, positions and parameters on either side."""
    last, before = x.shape[-1], x.shape[-2]
    turned = Input(
        (*x.shape[:-2], last, before),
        tuple(axis - 2 * (axis == len(x.shape) - 1) + 1 if axis >= len(x.shape) - 2 else axis for axis in x.axes),
    )
    turned = Input(
        turned.shape,
        tuple(
            {len(x.shape) - 1: len(x.shape) - 2, len(x.shape) - 2: len(x.shape) - 1}.get(axis, axis) for axis in x.axes
        ),
    )
    others = [turned, Input(turned.shape), Weight((last, 5)), Weight((last,)), Input((last, 5)), Input((last,), (0,))]
    others += [Weight((*x.shape[1:-2], last, 5)), Weight((1, last, 1))]
    for other in others:
        yield from (((x, other), {}), ((x,), {"other": other}), ((Weight((5,)), x, other), {}), ((x, x, other), {}))
        yield from (((Weight((1, 5)), x, other), {"beta": 2.0}), ((Weight((1,)), x, other), {}))
    yield from (((Weight((5, before)), x), {}), ((Weight((before,)), x), {}), ((Input((3, before)), x), {}))


def einsums(x):
    own = "abcde"[: len(x.shape)]
    for axis in range(1, len(x.shape)):
        letter, kept = own[axis], own.replace(own[axis], "")
        size = x.shape[axis]
        yield ((f"{own},{letter}->{own}", x, Weight((size,))), {})
        yield ((f"{own},{letter}->{kept}", x, Weight((size,))), {})
        yield ((f"{own},{letter}z->{kept}z", x, Weight((size, 5))), {})
        yield ((f"z{letter}, {own} -> {kept}z", Weight((5, size)), x), {})
        yield ((f"{own},{own}->{kept}", x, Input(x.shape, x.axes)), {})
        yield ((f"{own},{own}->{own}", x, Input(x.shape)), {})
        yield ((f"{own}->{kept}", x), {})
    yield from (((f"{own}->{own[::-1]}", x), {}), ((f"{own},{own}->", x, Input(x.shape, x.axes)), {}))


def weighted(x, name):
    """Layers as functions, with their weights as parameters."""
    channels, last = x.shape[1], x.shape[-1]
    kernel = (3,) * (len(x.shape) - 2)
    if name == "linear":
        for weight in (Weight((5, last)), Input((5, last)), Weight((last,))):
            yield from (((x, weight), {}), ((x, weight, Weight((5,))), {}), ((), {"input": x, "weight": weight}))
    if name == "bilinear":
        yield ((x, Input((*x.shape[:-1], 3)), Weight((5, last, 3)), Weight((5,))), {})
        yield ((Input((*x.shape[:-1], 3)), x, Weight((5, 3, last))), {})
    if name.startswith("embedding"):
        yield ((Input(x.shape, (), indices), Weight((4, 5))), {})
        yield ((Input(x.shape, x.axes, indices), Weight((4, 5))), {})
    for groups in (1, 2, channels):
        weight = (channels, 5) if "transpose" in name else (4 * groups, channels // groups)
        if name.startswith("conv"):
            yield ((x, Weight((*weight, *kernel)), None, 1, 1), {"groups": groups})
            yield ((x, Weight((*weight, *kernel)), None, 1, 1, *([0] if "transpose" in name else [1]), groups), {})
    if "norm" in name:
        one = Weight((channels,))
        yield from (
            ((x, one, one, one, one), {"training": False}),
            ((x,), {}),
            ((x, None, None), {"weight": one, "training": True}),
        )
        yield from (((x, 2, one, one), {}), ((x, 1), {"weight": one, "bias": one}), ((x, channels), {}))
        for count in range(1, len(x.shape)):
            shape = x.shape[-count:]
            yield from (
                ((x, shape), {}),
                ((x, shape, Weight(shape), Weight(shape)), {}),
                ((x, shape), {"weight": Weight(shape)}),
            )
        yield from (
            ((x, one, one, one, one, False, 0.1, 1e-5, False), {}),
            ((x, None, None, one, one, True, 0.1, 1e-5, False), {}),
        )
    if name == "prelu":
        yield from (((x, Weight((channels,))), {}), ((x, Weight((1,))), {}), ((x,), {"weight": Weight((channels,))}))


def modules(x, cls):
    """Build modules of a class with many arguments. Torch rejects those that do not fit the input."""
    channels, last = x.shape[1], x.shape[-1]
    if cls is nn.Bilinear:
        yield from ((cls(last, last, 5), ((x, other), {})) for other in (Input(x.shape, x.axes), without(x)))
    if cls in (nn.Embedding, nn.EmbeddingBag):
        yield from ((cls(4, 5), ((Input(x.shape, axes, indices),), {})) for axes in (x.axes, ()))
    for module in made(cls, channels, last, x.shape[1:]):
        yield from ((module, call) for call in (((x,), {}), ((), {"input": x})))


@cache
def made(cls, channels, last, inner):
    """Return the distinct modules of a class."""
    arguments = [(), (2,), (channels,), (2, channels), (-1,), (channels, 5, 1), (channels, channels, 1), (last, 5)]
    arguments += [(inner,), (0.1, 0.5), (1, 2), (1, 2.0), ((1, 1), 0.5), (1, 0.5), (1, (2, -1)), (0.3, "row")]
    arguments += [([0, 2, 1],), (2.0, 2), (3, 1, 1), (last, 5, 2)]
    named = [{}, {"groups": 2}, {"groups": channels}, {"affine": True, "track_running_stats": True}, {"inplace": True}]
    named += [{"return_indices": True}, {"dim": 1}, {"scale_factor": 2}, {"bidirectional": True, "batch_first": True}]
    found = {}
    for args, kwargs in product(arguments, named):
        with suppress(Exception):  # whatever a class raises that is not made so
            module = cls(*args, **kwargs)
            found.setdefault((repr(module), str(vars(module).get("dims"))), module)
    return list(found.values())


def attention(x):
    for mask in (
        None,
        Input(x.shape[-2:-1] * 2),
        Weight((x.shape[1], 1, 1)),
        Input((*x.shape[:2], x.shape[2], x.shape[2])) if len(x.shape) > 3 else None,
    ):
        like = Input(x.shape, x.axes)
        yield from (((x, like, like), {"attn_mask": mask}), ((x, like, like, mask, 0.0, mask is None), {}))


def chosen(x):
    """Read and write entries at positions along each axis, which an index gives for each entry or for all."""
    like, plain, token = Input(x.shape, x.axes), without(x), Weight(x.shape[1:])
    for dim in range(1, len(x.shape)):
        size = x.shape[dim]
        flat = Input((1,) * len(x.shape), (), indices)
        one = Input((3,), (), distinct)
        part = Input((*x.shape[:dim], 3, *x.shape[dim + 1 :]), x.axes)
        for where in (Input(x.shape, (), indices), Input(x.shape, (), indices, x.axes)):
            yield from (((x, dim, where), {}), ((x, where, dim), {}), ((x, dim, where, 2.0), {}))
            yield from (((x, dim, where, other), {}) for other in (like, plain))
            yield from (((x, dim, where, other, "sum"), {}) for other in (like, plain))
        yield from (((x, dim, one, other), {}) for other in (part, without(part), 2.0))
        yield ((x, dim, flat), {})
        less = Input((*x.shape[:dim], *x.shape[dim + 1 :]), tuple(a - (a > dim) for a in x.axes if a != dim))
        for other in (less, without(less)):
            yield from (((x, other, dim, 1), {}), ((without(x), other, dim, 1), {}))
        for start, end in ((0, 3), (1, size), (size - 3, size)):
            yield from (((y, z, dim, start, end), {}) for y, z in ((x, part), (x, without(part)), (without(x), part)))
        where = [Input((3,), (), indices)] * dim + [one]
        tail = Input((3, *x.shape[dim + 1 :]), tuple(a - dim for a in x.axes if a > dim))
        for other in (tail, without(tail), token, Input(())):
            yield from (((x, where, other), {}), ((x, [None, *where[1:]], other, True), {}))


def distinct(tensor):
    return torch.arange(tensor.numel()).reshape(tensor.shape)


def in_order(x):
    """Use operators that depend on the order along some axes."""
    for dim in (*range(1, len(x.shape)), -1):
        yield from (((x, dim), {}), ((x, 2, dim), {}), ((x,), {"dim": dim}), ((x, None, dim), {}), ((x, dim, True), {}))
    for dims in combinations(range(1, len(x.shape)), 2):
        yield from (((x, None, dims), {}), ((x,), {"dim": dims}))
    yield from (((x,), {}), ((x, 1), {}))


def sampled(x):
    grid = (*x.shape[:1], *x.shape[2:], len(x.shape) - 2)
    for other in (Input(grid), Input(grid, (len(x.shape) - 1,))):
        yield from (((x, other), {"align_corners": False}), ((x, other, 0, 0, False), {}))


def patched(x):
    yield from (((x, 2), {}), ((x, (2, 1)), {}), ((x, (3, 2), (2, 1)), {}), ((x, (3, 4), 1), {}))


def several(x):
    single = Input(
        (x.shape[0], *(1 if axis not in x.axes else x.shape[axis] for axis in range(1, len(x.shape)))), x.axes
    )
    yield from (((x, Input(x.shape, x.axes)), {}), ((single, without(x)), {}), ((x, Weight(x.shape[1:])), {}))


def compared(x):
    like, rows = Input(x.shape, x.axes), Input((*x.shape[:-2], 5, x.shape[-1]), x.axes)
    for other in (like, rows, without(x), Weight((7, x.shape[-1])), Weight(x.shape[-1:])):
        yield from (((x, other), {}), ((x, other, 1), {}), ((x, other), {"keepdim": True}), ((other, x), {}))


def recurrent_function(x, name):
    """Make the arguments of recurrent layers as functions: one and two layers, both directions, several states."""
    gates, size, hidden = {"lstm": 4, "gru": 3}.get(name.partition("_cell")[0], 1), x.shape[-1], 5
    states, rank = 1 + name.startswith("lstm"), len(x.shape)

    def pack(found):
        return found if states > 1 else found[0]

    weights = [Weight((gates * hidden, size)), Weight((gates * hidden, hidden))]
    biases = [Weight((gates * hidden,))] * 2
    for axes in ((rank - 1,), ()):
        given = pack([Input((x.shape[0], hidden), axes)] * states)
        yield from (((x, given, *weights), {}), ((x, given, *weights, *biases), {}))
    for layers, directions in product((1, 2), (1, 2)):
        shape = (layers * directions, x.shape[0], hidden)
        params = []
        for layer, _ in product(range(layers), range(directions)):
            width = size if layer == 0 else hidden * directions
            params += [Weight((gates * hidden, width)), weights[1], *biases]
        for axes in ((2,), ()):
            given = pack([Input(shape, axes)] * states)
            for bias in (True, False):
                own = [each for each in params if bias or len(each.shape) == 2]
                yield ((x, given, own, bias, layers, 0.0, False, directions == 2, True), {})
    if name == "lstm":
        narrow = [Weight((4 * hidden, size)), Weight((4 * hidden, 3)), Weight((3, hidden))]
        given = [Input((1, x.shape[0], 3), (2,)), Input((1, x.shape[0], hidden), (2,))]
        yield ((x, given, narrow, False, 1, 0.0, False, False, True), {})


FAMILIES = {
    "gather take_along scatter index_write slice_scatter select_scatter index_put": chosen,
    "difference running_extreme sort order largest fourier fourier_of_several shift triangle": in_order,
    "gated": in_order,
    "as_complex": lambda x: [((Input((*x.shape, 2), axes),), {}) for axes in (x.axes, (*x.axes, len(x.shape)))],
    "as_real": lambda x: [((Input(x.shape, x.axes, lambda tensor: torch.complex(tensor, tensor.cos())),), {})],
    "sample": sampled,
    "patches sum_of_patches": patched,
    "broadcast_tensors": several,
    "inner distances distance similarity": compared,
    "layer step": recurrent_function,
    "pointwise": entrywise,
    "cast": cast,
    "alike blank": blank,
    "dropout alpha_dropout": lambda x: [((x, 0.5, False), {}), ((x,), {"p": 0.5, "training": False})],
    "stochastic_depth": lambda x: [((x, 0.5, "row", False), {}), ((x, 0.5, "batch"), {"training": True})],
    "reduction spread spread_and_mean extreme place_of_extreme norm vector_norm softmax normalize running": along,
    "max_pool other_pool adaptive_max_pool resample": pooled,
    "pad": padded,
    "rearrange": rearranged,
    "getitem": items,
    "cat stack": joined,
    "matmul sum_with_product": products,
    "einsum": einsums,
    "forward transposed linear bilinear embedding embedding_bag": weighted,
    "batch_norm instance_norm group_norm layer_norm prelu": weighted,
    "scaled_dot_product_attention": attention,
    "outer": compared,
}
NOT_SWEPT = {
    "grid": "its tensors hold no features",
    "random": "returns random numbers",
    "affine_grid": "its features keep their order: a network with a spatial transformer tests it",
    "weight_norm": "takes parameters only: networks with weight norm test it",
    "norm_except_dim": "as above",
    "attribute": "returns numbers",
    "assertion": "returns nothing",
}
HERE = {"cuda": "needs a device", "imag": "needs complex numbers"} | dict.fromkeys(
    ["addmv", "dot", "vdot", "outer", "ger"], "its vectors have no batch"
)


def base(operator):
    name = operator if isinstance(operator, str) else operator.__name__
    return name.removeprefix("special_").removeprefix("linalg_")


def calls(rule, operator, x):
    """Return all calls of an operator with an input."""
    if isinstance(operator, type):
        yield from (Call(module, args, kwargs) for module, (args, kwargs) in modules(x, operator))
        return
    (make,) = [make for names, make in FAMILIES.items() if rule in names.split()]
    for args, kwargs in make(x, base(operator)) if make.__code__.co_argcount == 2 else make(x):
        yield Call(operator, args, kwargs)


def operators():
    by_rule = {}
    for key, known in OPERATORS.items():
        if isinstance(key, OpOverload):  # see test_aten.py: arguments of a wrong kind can crash an overload
            continue
        name = known.rule.__name__
        if Trait.SHAPE not in known.traits and known.rule.__module__.startswith("lightning_zipit"):
            by_rule.setdefault(name, []).append(key)
    return by_rule


def judged(rule, operator, rng, xs, most):
    """Yield the outcomes of a random sample of calls for each input."""
    for x in xs:
        tried = list(calls(rule, operator, x))
        rng.shuffle(tried)
        outcomes = (outcome for outcome in map(judge, tried) if outcome is not None)
        yield from islice(outcomes, most)


@pytest.mark.parametrize("rule", [name for name in operators() if name not in NOT_SWEPT])
def test_the_operator_permutes_its_output_as_the_rule_says(rule):
    found, rng = operators()[rule], random.Random(0)
    for key in found:
        operator = resolve(key)
        given = list(inputs(sizes=WIDE if "huffle" in base(operator) else SHAPES))
        some = rng.sample(given, min(len(given), max(2, 80 // len(found))))
        if base(operator) not in HERE:
            moved = any([moves(outcome) for outcome in judged(rule, operator, rng, some, 1)])
            # a rule that rejects every call would be right, but useless
            assert moved or any(map(moves, judged(rule, operator, rng, given, 100))), key


def moves(outcome):
    return isinstance(outcome, int) and outcome > 0
