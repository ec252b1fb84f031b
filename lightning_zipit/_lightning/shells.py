"""Copies of source modules in which a stand-in replaces the backbone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._lightning.lent_hooks import copy_hooks
from lightning_zipit._lightning.sources import PATH, get_backbone
from lightning_zipit._lightning.standin import STAND_IN, Absent, MergedContainer, MergedPath, StandIn, find_in


def make_shell(model: LightningModule, backbone: str, stand_in: StandIn, used: Sequence[str]) -> LightningModule:
    """Copy a source model with its steps, metrics and losses. A merged path stands in for its backbone.

    Args:
        model: the source model.
        backbone: dotted name of the merged part.
        stand_in: a stand-in, which takes over the structure of the backbone.
        used: the names of the modules and tensors that the forward of the backbone uses.
    """
    original = get_backbone(model, backbone)
    earlier: StandIn | None = original.__dict__.get(STAND_IN)
    memo, absent = _placeholders(original, used, drop_others=bool(backbone))
    names = list(absent.values())
    structure = original if earlier is None else earlier.body
    path = (MergedContainer if hasattr(type(structure), "__getitem__") else MergedPath)(stand_in)
    if backbone or earlier is not None:
        memo[id(original)] = path
    shell = copy_module(model, memo)
    shell._modules.pop(PATH, None)
    body: nn.Module = shell
    if backbone:
        memo.pop(id(original))
        body = copy_module(structure, memo)
        path.share(body)
    else:
        shell.__dict__["forward"] = path
    for name in names:
        layer = find_in(original, name)
        if isinstance(layer, nn.Module):
            stand_in.hooks[name] = copy_hooks(layer, memo) if earlier is None else earlier.hooks[name].copied(memo)
    places = [] if earlier is None else copy.deepcopy(earlier.places, memo)
    stand_in.take(body, shell, names, absent, places)
    return shell


def split_source(source: LightningModule, backbone: str, path: MergedPath, network: nn.Module) -> LightningModule:
    """Copy a source of a merged module, with a network in place of its merged path, so that it can be merged again.

    Args:
        source: the source with its merged path.
        backbone: dotted name of the merged part.
        path: the merged path.
        network: the network. It gets the stand-in of the path.
    """
    memo: dict[int, Any] = {id(path): network}
    split = copy_module(source, memo)
    if not backbone:
        split.add_module(PATH, network)
    stand_in: StandIn = path.__dict__[STAND_IN]
    memo[id(stand_in.owner)] = None
    network.__dict__[STAND_IN] = copy.deepcopy(stand_in, memo)
    return split


def _placeholders(backbone: nn.Module, used: Sequence[str], drop_others: bool) -> tuple[dict[int, Any], dict[int, str]]:
    """Make placeholders for the layers and tensors of a backbone.

    Args:
        backbone: the backbone.
        used: the names of the modules and tensors that its forward uses.
        drop_others: whether layers that its forward does not use get placeholders too.

    Returns:
        The placeholders by the ``id`` of what they stand for, and the used names by the ``id`` of their placeholders.
    """
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    for name in used:
        original = find_in(backbone, name)
        if original is None or id(original) in memo:  # a constant of the capture, or another name of a tied tensor
            continue
        if isinstance(original, nn.Module):
            memo[id(original)] = Absent(name)
        elif isinstance(original, nn.Parameter):
            memo[id(original)] = nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            memo[id(original)] = torch.empty(0)
        names[id(memo[id(original)])] = name
    if drop_others:
        for name, module in backbone.named_modules():
            within = any(f"{each}.".startswith(f"{name}.") or f"{name}.".startswith(f"{each}.") for each in used)
            if name and not within and any(True for _ in module.parameters()):
                memo.setdefault(id(module), Absent(name))
    return memo, names
