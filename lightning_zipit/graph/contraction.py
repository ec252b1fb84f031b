"""Ties of contractions: products of two tensors, summed over shared axes as in ``torch.einsum``."""

from __future__ import annotations

from lightning_zipit.graph.align import as_positions, fix_inner, mix, units_along
from lightning_zipit.graph.computed import computed, together
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.values import Features, Parameter, Plain, Shape, Value

Sizes = dict[str, int]


def contract(ctx: Context, letters: tuple[str, str], output: str, operands: tuple[Value, Value]) -> Value:
    """Record a product of two tensors, summed over the letters that are not in ``output``, as in ``torch.einsum``.

    Args:
        ctx: the context.
        letters: for each tensor, a letter per axis.
        output: the letters of the result.
        operands: the two tensors.

    Returns:
        The value of the result.
    """
    first, second = operands
    if any(len(set(names)) < len(names) for names in (*letters, output)):
        raise ctx.error("it takes a diagonal")
    if isinstance(first, Parameter) and isinstance(second, Parameter) and (first.counts or second.counts):
        return _of_parameters(ctx, letters, output, first, second)
    if _sort_key(second) > _sort_key(first):
        first, second, letters = second, first, letters[::-1]
    sizes = _sizes(letters, (first, second))
    if isinstance(second, Parameter) and second.counts and not isinstance(first, Parameter):
        if isinstance(first, Features):
            return _read(ctx, letters, output, first, second, sizes)
        return _make(ctx, letters, output, first, second, sizes)
    if not isinstance(first, Features):
        result = ctx.constant([first, second])
        return Plain(_shape(output, sizes)) if isinstance(result, Plain) else result
    return _multiply(ctx, letters, output, first, second, sizes)


def _sort_key(value: Value) -> tuple[int, int]:
    """Sort key of operands: tensors with more features come first, parameters last."""
    return (1, value.ids.size) if isinstance(value, Features) else (0, -int(isinstance(value, Parameter)))


def _multiply(
    ctx: Context, letters: tuple[str, str], output: str, first: Features, second: Value, sizes: Sizes | None
) -> Value:
    """Record a product of features with features, or with a tensor without features."""
    own, others = letters
    if not isinstance(second, Features):
        ctx.positional(second)
        meeting = tuple(axis for axis in first.axes if own[axis] in others)
        if meeting:
            fix_inner(ctx, first, meeting, f"`{ctx.node.name}` multiplies them by a tensor without features")
    else:
        shared = [own[axis] for axis in first.axes if own[axis] in others]
        held = [others[axis] for axis in second.axes]
        left = _against_positions(ctx, first, own, others, held)
        right = _against_positions(ctx, second, others, own, [own[axis] for axis in first.axes])
        if left is not first or right is not second:
            return contract(ctx, letters, output, (left, right))
        more = tuple(axis for axis in first.axes if own[axis] not in others and own[axis] in output)
        places = any(name in output and name not in others for axis, name in enumerate(own) if axis not in first.axes)
        if more and places and shared and not set(shared) & set(output):  # heads of queries that share one key
            return contract(ctx, letters, output, (as_positions(ctx, first, more), second))
        if sorted(shared) != sorted(held):
            raise ctx.error("one of its inputs has features on an axis where the other has positions")
        units = units_along(ctx, first, tuple(axis for axis in first.axes if own[axis] in others))
        ctx.tie(units, second.ids.transpose([held.index(letter) for letter in shared]))
        ctx.observe(first)
        ctx.observe(second)
    ids = mix(ctx, first, {axis for axis in first.axes if own[axis] not in output})
    if ids is None:
        return Plain(_shape(output, sizes))
    kept = [own[axis] for axis in first.axes if own[axis] in output]
    axes = sorted(output.index(letter) for letter in kept)
    order = [kept.index(output[axis]) for axis in axes]
    return Features(ids.transpose(order), tuple(axes), _shape(output, sizes) or ())


def _against_positions(ctx: Context, x: Features, own: str, others: str, held: list[str]) -> Value:
    """Fix the order of features along the axes where the other tensor, with features ``held``, has positions."""
    axes = tuple(axis for axis in x.axes if own[axis] in others and own[axis] not in held)
    if not axes:
        return x
    if axes != x.axes:
        return as_positions(ctx, x, axes)
    ctx.pin(x, f"`{ctx.node.name}` multiplies them by positions")
    return Plain(x.shape)


def _read(
    ctx: Context, letters: tuple[str, str], output: str, x: Features, weight: Parameter, sizes: Sizes | None
) -> Value:
    """Record a product of features with a parameter, which reads or scales features, or weights positions."""
    own, others = letters
    if len(x.axes) != 1:
        raise ctx.error("it multiplies features along several axes by a parameter")
    letter = own[x.axes[0]]
    if letter not in output and letter not in others:
        raise ctx.error("it sums over the features")
    shape = _shape(output, sizes)
    made = [name for name in _free(ctx, own, others, x, weight) if name != letter]
    if any(name not in output for name in made):
        raise ctx.error(f"it sums over an axis that only `{weight.name}` has")
    if letter in output:
        if made:
            raise ctx.error(f"`{weight.name}` mixes positions, and the order of its outputs differs between models")
        ctx.positional(weight)
        if letter in others:
            ctx.write(weight, others.index(letter), x)
        return Features(x.ids, (output.index(letter),), shape or ())
    ctx.read(weight, others.index(letter), x)
    if not made:
        return Plain(shape)
    return _new(ctx, made, others, output, weight, shape)


def _make(
    ctx: Context, letters: tuple[str, str], output: str, x: Value, weight: Parameter, sizes: Sizes | None
) -> Value:
    """Record a product of positions with a parameter, which writes new features."""
    own, others = letters
    made = _free(ctx, own, others, x, weight)
    if any(name not in output for name in made):
        raise ctx.error(f"it sums over an axis that only `{weight.name}` has")
    ctx.positional(weight)
    return _new(ctx, made, others, output, weight, _shape(output, sizes)) if made else Plain(_shape(output, sizes))


def _free(ctx: Context, own: str, others: str, x: Value, weight: Parameter) -> list[str]:
    """Return the letters along which only the parameter has several entries."""
    if x.shape is None:
        raise ctx.error("it multiplies a parameter by a tensor of unknown shape")
    spread = {name for name, size in zip(own, x.shape, strict=True) if size == 1}
    return [
        name
        for name, size in zip(others, weight.shape, strict=True)
        if size > 1 and (name not in own or name in spread)
    ]


def _new(ctx: Context, made: list[str], others: str, output: str, weight: Parameter, shape: Shape | None) -> Features:
    if len(made) != 1:
        raise ctx.error("its parameter would write new features along several axes")
    axis = others.index(made[0])
    features = Features(ctx.fresh(weight.shape[axis]), (output.index(made[0]),), shape or ())
    ctx.write(weight, axis, features)
    return features


def _of_parameters(
    ctx: Context, letters: tuple[str, str], output: str, first: Parameter, second: Parameter
) -> Parameter:
    """Multiply two parameters. Along an axis that is summed, their entries belong together."""
    own, others = letters
    for letter in (name for name in own if name in others and name not in output):
        shown = [value.along(names.index(letter)) for value, names in zip((first, second), letters, strict=True)]
        summed, other = shown
        if summed is None or other is None:
            raise ctx.error(f"it sums over entries of `{first.name}` and `{second.name}` that it cannot follow")
        inner = ctx.follow(summed)
        if len(own) > 1 and len(others) > 1:
            ctx.read(first, own.index(letter), inner)
            ctx.write(second, others.index(letter), inner)
        else:
            ctx.tie(inner, ctx.follow(other))
            for value, names in zip((first, second), letters, strict=True):
                if len(names) == 1 and not value.made_of:
                    ctx.align(value, 0, inner)
    sizes = _sizes(letters, (first, second)) or {}
    used = [
        [(value, names.index(letter)) for value, names in zip((first, second), letters, strict=True) if letter in names]
        for letter in output
    ]
    entries = [together([value.along(axis) for value, axis in pairs if value.shape[axis] > 1]) for pairs in used]
    ctx.positional(first, second)
    return computed([first, second], tuple(sizes[letter] for letter in output), entries)


def _sizes(letters: tuple[str, str], operands: tuple[Value, Value]) -> Sizes | None:
    """Return the size of each letter; ``None`` if the shape of an operand is unknown."""
    sizes: Sizes = {}
    for names, operand in zip(letters, operands, strict=True):
        if operand.shape is None:
            return None
        for name, size in zip(names, operand.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return sizes


def _shape(output: str, sizes: Sizes | None) -> Shape | None:
    return None if sizes is None else tuple(sizes[name] for name in output)
