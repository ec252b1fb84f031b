"""Hooks of a source on layers that several sources share: a layer has them only while their source runs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_zipit._common.copying import close_over_copies

HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward")) and "hooks" in name)
"""The attributes of a module that hold its forward and backward hooks, and their kinds."""

Hooks = dict[str, dict[Any, Any]]
"""The hooks of a module by the attributes that hold them."""


class LentHooks:
    """The hooks of a source on one layer.

    Args:
        own: the hooks.
        full: whether backward hooks are of the kind ``register_full_backward_hook``; ``None`` without them.
    """

    def __init__(self, own: Hooks, full: bool | None) -> None:
        self.own = own
        self.full = full
        self._layer: nn.Module | None = None
        self._before: Hooks = {}
        self._guard: Any = None

    def copied(self, memo: dict[int, Any]) -> LentHooks:
        """Copy the hooks with the copies of the objects that they belong to; see :func:`copy_hooks`."""
        own = copy.deepcopy(self.own, memo)
        for hooks in own.values():
            close_over_copies(hooks, memo)
        return LentHooks(own, self.full)

    def lend(self, layer: Any, guard: Callable[..., None]) -> None:
        """Add the hooks to a layer, and a guard that runs before the layer's forward."""
        if not isinstance(layer, nn.Module):
            return
        self._layer, self._before = layer, {name: dict(getattr(layer, name)) for name in HOOKS}
        for name in HOOKS:
            getattr(layer, name).update(self.own[name])
        if self.full is not None:
            layer._is_full_backward_hook = self.full
        self._guard = layer.register_forward_pre_hook(guard, prepend=True)

    def take_back(self) -> None:
        """Restore the hooks of the layer. What the source has registered in the meantime are hooks of the source."""
        if self._layer is None:
            return
        self._guard.remove()
        for name in HOOKS:
            hooks, before = getattr(self._layer, name), self._before[name]
            self.own[name] = {key: hook for key, hook in hooks.items() if before.get(key) is not hook}
            hooks.clear()
            hooks.update(before)
        if self.own["_backward_hooks"]:
            self.full = self._layer._is_full_backward_hook
        if not self._before["_backward_hooks"]:
            self._layer._is_full_backward_hook = None
        self._layer, self._before, self._guard = None, {}, None


def copy_hooks(layer: nn.Module, memo: dict[int, Any]) -> LentHooks:
    """Copy the hooks of a layer of a source.

    Args:
        layer: the layer.
        memo: the copies of the source's modules by the ``id`` of the original, so that a hook that is a method of the
            source becomes a method of its copy.
    """
    return LentHooks({name: dict(getattr(layer, name)) for name in HOOKS}, layer._is_full_backward_hook).copied(memo)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Context manager in which no hook of a module and its submodules runs."""
    held = [(vars(each), name, vars(each)[name]) for each in module.modules() for name in HOOKS]
    try:
        for attributes, name, _ in held:
            attributes[name] = OrderedDict()
        yield
    finally:
        for attributes, name, hooks in held:
            attributes[name] = hooks
