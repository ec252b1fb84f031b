"""Small networks whose feature spaces are named by hand, a line per layer; see ``dense_zip``."""

from __future__ import annotations

import torch

from helpers.dense_nets import (
    MLP,
    Decoder,
    Dense,
    Gated,
    Grouped,
    LanguageModel,
    NormedCNN,
    PlainCNN,
    Residual,
    Separable,
    TokenMLP,
    Transformer,
    UNet,
)
from helpers.dense_zip import Case, Cut


def vectors():
    return torch.randn(64, 6, dtype=torch.float64)


def maps():
    return torch.randn(24, 2, 8, 8, dtype=torch.float64)


def tokens():
    return torch.randn(48, 5, 4, dtype=torch.float64)


def ids():
    return torch.randint(0, 13, (48, 7))


CASES = {
    "mlp": Case(
        MLP,
        vectors,
        {"a": 8, "b": 7},
        {"first": "input -> a", "second": "a -> b", "last": "b -> classes"},
        Cut("act", "a", last="first"),
    ),
    "plain cnn": Case(
        PlainCNN,
        maps,
        {"a": 6, "b": 5, "c": 9},
        {"conv1": "image -> a", "conv2": "a -> b", "hidden": "b*4 -> c", "last": "c -> classes"},
        Cut("pool", "b", last="conv2"),
    ),
    "batch norm": Case(
        NormedCNN,
        maps,
        {"a": 6, "b": 8},
        {"conv1": "image -> a", "bn1": "a", "conv2": "a -> b", "bn2": "b", "last": "b -> classes"},
        Cut("act", "a", last="bn1"),
        pooling="mean",
    ),
    "residual": Case(
        Residual,
        maps,
        {"stem": 6, "in1": 5, "in2": 7, "stream": 8},
        {
            "conv": "image -> stem",
            "bn": "stem",
            "block1.conv1": "stem -> in1",
            "block1.bn1": "in1",
            "block1.conv2": "in1 -> stem",
            "block1.bn2": "stem",
            "block2.conv1": "stem -> in2",
            "block2.bn1": "in2",
            "block2.conv2": "in2 -> stream",
            "block2.bn2": "stream",
            "block2.shortcut.0": "stem -> stream",
            "block2.shortcut.1": "stream",
            "last": "stream -> classes",
        },
        Cut("block1", "stem", last="block1.bn2"),
        pooling="mean",
    ),
    "depthwise": Case(
        Separable,
        maps,
        {"a": 6, "b": 8, "c": 7},
        {
            "stem": "image -> a",
            "bn0": "a",
            "deep1": "a -> a",
            "bn1": "a",
            "point1": "a -> b",
            "bn2": "b",
            "deep2": "b -> b",
            "point2": "b -> c",
            "last": "c -> classes",
        },
        Cut("act", "b", last="bn2"),
        pooling="mean",
    ),
    "concatenation": Case(
        Dense,
        maps,
        {"a": 6, "b": 4, "c": 5},
        {
            "stem": "image -> a",
            "bn1": "a",
            "conv1": "a -> b",
            "bn2": "a b",
            "conv2": "a b -> c",
            "bn3": "a b c",
            "last": "a b c -> classes",
        },
        Cut("bn3", "a b c", last="bn3"),
        pooling="mean",
    ),
    "groups": Case(
        Grouped,
        maps,
        {"a": 6, "b": 8, "c": 9},
        {"conv1": "image -> a", "conv2": "a -> b", "conv3": "b -> c", "last": "c -> classes"},
        Cut("act", "c", last="conv3"),
        units={"a": 2, "b": 2},
        pooling="mean",
    ),
    "tokens": Case(
        TokenMLP,
        tokens,
        {"stream": 8, "a": 11, "b": 10},
        {
            "embed": "input -> stream",
            "position": "stream",
            "norm1": "stream",
            "up1": "stream -> a",
            "down1": "a -> stream",
            "norm2": "stream",
            "up2": "stream -> b",
            "last": "b -> classes",
        },
        Cut("norm2", "stream", last="norm2"),
        pooling="mean",
    ),
    "transformer": Case(
        Transformer,
        tokens,
        {"stream": 10, "qk": 6, "v": 4, "a": 12},
        {
            "embed": "input -> stream",
            "norm1": "stream",
            "q": "stream -> qk",
            "k": "stream -> qk",
            "v": "stream -> v",
            "proj": "v -> stream",
            "norm2": "stream",
            "up": "stream -> a",
            "down": "a -> stream",
            "norm": "stream",
            "last": "stream -> classes",
        },
        Cut("norm", "stream", last="norm"),
        units={"qk": 2, "v": 2},
        pooling="mean",
    ),
    "language model": Case(
        LanguageModel,
        ids,
        {"stream": 9, "a": 12},
        {
            "embed": "ids -> stream",
            "norm1": "stream",
            "up": "stream -> a",
            "down": "a -> stream",
            "norm2": "stream",
            "last": "stream -> vocabulary",
        },
        Cut("embed", "stream", last="embed"),
    ),
    "u-net": Case(
        UNet,
        maps,
        {"skip": 6, "a": 8, "b": 5, "c": 7},
        {
            "down1": "image -> skip",
            "bn1": "skip",
            "down2": "skip -> a",
            "up": "a -> b",
            "mix": "b skip -> c",
            "last": "c -> classes",
        },
        Cut("act", "c", last="mix"),
    ),
    "decoder": Case(
        Decoder,
        vectors,
        {"a": 7, "b": 8, "c": 5},
        {"up0": "code -> a", "up1": "a -> b", "bn1": "b", "up2": "b -> c", "last": "c -> image"},
        Cut("act", "b", last="bn1"),
    ),
    "gates": Case(
        Gated,
        maps,
        {"a": 8, "s": 5, "b": 7},
        {
            "conv1": "image -> a",
            "bn1": "a",
            "squeeze": "a -> s",
            "excite": "s -> a",
            "conv2": "a -> b",
            "last": "b -> classes",
        },
        Cut("act", "b", last="conv2"),
        pooling="mean",
    ),
}
