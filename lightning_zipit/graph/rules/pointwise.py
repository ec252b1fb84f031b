"""Rules of elementwise operators: they preserve features, and tie the features of their operands."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_zipit.graph.align import entrywise
from lightning_zipit.graph.interpret import Context
from lightning_zipit.graph.registry import Trait, in_place, module_rule, rule, spellings
from lightning_zipit.graph.values import Features, Value

ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu "
    "softplus softshrink softsign tanh tanhshrink threshold"
)
FUNCTIONS = (
    "abs absolute acos acosh asin asinh atan atanh ceil clone cos cosh erf erfc erfinv exp exp2 expm1 floor frac "
    "isfinite isinf isnan log log10 log1p log2 logical_not logit nan_to_num neg negative pos positive reciprocal round "
    "rsqrt sign sin sinc sinh sqrt square tan trunc bitwise_not invert angle conj conj_physical deg2rad digamma erfcx "
    "i0 lgamma rad2deg real imag sgn signbit resolve_conj resolve_neg"
)
BOUNDS = "clamp clip clamp_min clamp_max pow float_power"
OF_SEVERAL = (
    "div divide true_divide truediv floor_divide floordiv fmod remainder mod atan2 copysign hypot xlogy "
    "logaddexp logaddexp2 maximum minimum fmax fmin masked_fill addcmul addcdiv lerp where heaviside ldexp nextafter "
    "complex polar isclose "
    "eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor and_ or_ xor"
)


@rule(*spellings(f"{ACTIVATIONS} {FUNCTIONS} {BOUNDS}"), traits=Trait.POINTWISE, ignored=("inplace",))
@rule(*in_place(f"{ACTIVATIONS} {FUNCTIONS} {BOUNDS}"), traits=Trait.POINTWISE | Trait.IN_PLACE)
@rule(*spellings("add"), traits=Trait.SUM)
@rule(*in_place("add"), traits=Trait.SUM | Trait.IN_PLACE)
@rule(*spellings("sub subtract rsub"), traits=Trait.DIFFERENCE)
@rule(*in_place("sub subtract"), traits=Trait.DIFFERENCE | Trait.IN_PLACE)
@rule(*spellings("mul multiply"), traits=Trait.PRODUCT)
@rule(*in_place("mul multiply"), traits=Trait.PRODUCT | Trait.IN_PLACE)
@rule(*spellings(OF_SEVERAL))
@rule(*in_place(OF_SEVERAL), traits=Trait.IN_PLACE)
def pointwise(ctx: Context, *operands: Any, **named: Any) -> Any:
    """Compute each entry from the corresponding entries of its operands, and tie their features."""
    return entrywise(ctx, operands, named)


@module_rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid),
    *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
    traits=Trait.POINTWISE,
    ignored=("inplace",),
)
def pointwise_module(ctx: Context, module: nn.Module, input: Value) -> Value:
    """Apply one function to each entry."""
    return entrywise(ctx, input)


@rule(
    *("contiguous", "detach", "to", "float", "half", "double", "bfloat16", "type", "type_as", "cpu", "cuda"),
    *("int", "long", "bool", "requires_grad_"),
    traits=Trait.POINTWISE | Trait.VIEW,
)
def cast(ctx: Context, input: Value, *like: Any, **named: Any) -> Value:
    """Convert entries to another dtype, device or memory format."""
    ctx.positional(like, named)
    return input


@rule(*spellings("zeros_like ones_like full_like"), traits=Trait.SHAPE)
def alike(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Fill a tensor with one number, so features and positions can have any order."""
    ctx.positional(input)
    return input if isinstance(input, Features) else ctx.constant([input, *args])


@rule("new_zeros", "new_ones", "new_full", traits=Trait.SHAPE)
def blank(ctx: Context, input: Value, *args: Any, **kwargs: Any) -> Value:
    """Create a tensor without features, with the dtype and device of another."""
    ctx.positional(input)
    return ctx.constant([])


# Identity in eval mode


@rule(
    *spellings("dropout dropout1d dropout2d dropout3d feature_dropout"),
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
    ignored=("inplace",),
)
def dropout(ctx: Context, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    """Identity in eval mode."""
    if training and p:
        raise ctx.error("it applies dropout in eval mode too; pass `training=self.training` to it")
    return input


@rule(
    *spellings("alpha_dropout feature_alpha_dropout"),
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
    ignored=("inplace",),
)
def alpha_dropout(ctx: Context, input: Value, p: float = 0.5, training: bool = False, inplace: bool = False) -> Value:
    """Identity in eval mode."""
    return dropout(ctx, input, p, training)


@rule(
    "torchvision.ops.stochastic_depth.stochastic_depth",
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
)
def stochastic_depth(ctx: Context, input: Value, p: float, mode: str, training: bool = True) -> Value:
    """Identity in eval mode."""
    return dropout(ctx, input, p, training)


@module_rule(
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *("torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath"),
    traits=Trait.POINTWISE | Trait.IDENTITY | Trait.POOLING | Trait.VIEW,
    ignored=("inplace",),
)
def unchanged_module(ctx: Context, module: nn.Module, input: Value, *args: Any) -> Value:
    """Identity in eval mode."""
    return input
