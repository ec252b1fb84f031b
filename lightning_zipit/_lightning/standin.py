"""Stand-ins for the backbones of source modules: the code of a source reaches the merged network through them.

A source uses its backbone in many ways: it calls the backbone or a part of it, reads attributes, registers hooks, lists
parameters. A stand-in has the structure, attributes and methods of the source's backbone, without its layers. While the
source runs, the layers of stem, trunk and head are lent to the stand-in, at their places in the structure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_zipit._common.copying import copy_module
from lightning_zipit._lightning.lent_hooks import HOOKS, LentHooks, copy_hooks, without_hooks
from lightning_zipit._lightning.sources import PATH, get_backbone
from lightning_zipit.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_zipit._lightning.multitask import MultiTaskModule

REGISTRIES = ("_modules", "_parameters", "_buffers")
"""The attributes of a module that hold its submodules and tensors by name."""

Place = tuple[dict[str, Any], str, str]
"""A place of a layer or tensor: the registry of a module of the structure, the key in it, the name in the backbone."""

STRUCTURE = "_zipit_structure"
"""The attribute of the backbone of a split source with its earlier stand-in."""


class Absent(nn.Module):
    """A layer of a backbone that the merged network does not have, or has elsewhere.

    Args:
        name: dotted name of the layer in the backbone.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigurationError(
            f"`{self.name}` of the backbone was merged away, so that it cannot be run alone. Run the whole backbone, "
            "or merge with a `backbone` that does not contain it."
        )


class MergedPath(nn.Module):
    """Stem, trunk and head of one task as a single module, which replaces the backbone of a source module.

    The parts are looked up in their owner at each call, so that a part that is replaced in the owner is replaced here.
    The owner is stored in a tuple, so that it is not a submodule. A copy of the owner has its own paths.

    Args:
        owner: the module that has stems, trunk and heads.
        task: the task.

    Attributes:
        entered: whether code of the source has run the merged network. The user of the attribute resets it.
    """

    def __init__(self, owner: MultiTaskModule, task: str) -> None:
        super().__init__()
        self._owner: tuple[MultiTaskModule, ...] = (owner,)
        self.task = task
        self.entered = False
        self._body: tuple[nn.Module, ...] = ()
        self._inner: list[nn.Module] = []  # modules of the structure that contain lent layers
        self._places: list[Place] = []
        self._hooks: dict[str, LentHooks] = {}
        self._depth = 0
        self._running = False
        self._changed: dict[str, Any] = {}  # the values of the capture of attributes that have other values now
        self._checked: tuple[Any, str | None] | None = None

    def take(
        self,
        body: nn.Module,
        shell: LightningModule,
        names: Sequence[str],
        absent: Mapping[int, str],
        places: Sequence[Place],
    ) -> None:
        """Take over the structure of a backbone.

        Args:
            body: a copy of the backbone without its layers; the shell itself for the backbone ``""``.
            shell: a copy of the source module without its backbone.
            names: the names of the layers and tensors that stem, trunk and head have.
            absent: the names by the ``id`` of their placeholders in the copies.
            places: further places of these layers and tensors in the copies.
        """
        if body is not shell:
            for name in (*REGISTRIES, "_non_persistent_buffers_set", *HOOKS):
                self.__dict__[name] = body.__dict__[name]
        self._body = (body,)
        self._places += places
        for name in names:
            owner, _, key = name.rpartition(".")
            if (holder := _find(body, owner)) is not None:
                self._places += [(known, key, name) for known in _registries(holder) if key in known]
        for module in shell.modules():  # other references to a layer
            for known in _registries(module):
                self._places += [(known, key, absent[id(value)]) for key, value in known.items() if id(value) in absent]
        inside = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
        self._inner = [found for name in sorted(inside) if isinstance(found := _find(body, name), nn.Module)]
        self._fill(False)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self.entered = True
        with self.lent():
            hooked = any(getattr(each, name) for each in self._inner for name in HOOKS)
            if hooked or self._changed:
                self._check("has a hook in its backbone" if hooked else "changes an attribute of its backbone")
                return self.run_body(*inputs, **kwargs)
            with self._run_whole():
                return partial(self._owner[0].run_task, task=self.task)(*inputs, **kwargs)

    def run_body(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the source's own code of the backbone on the lent layers."""
        with self.lent(), self._run_whole():
            return type(self._body[0]).forward(self._body[0], *inputs, **kwargs)

    @contextmanager
    def _run_whole(self) -> Iterator[None]:
        before, self._running = self._running, True
        try:
            yield
        finally:
            self._running = before

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Context manager in which the structure has the layers of stem, trunk and head, with the source's hooks."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._fill(True)
                for name, hooks in self._hooks.items():
                    hooks.lend(self._layer(name), self._enter)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for hooks in self._hooks.values():
                    hooks.take_back()
                self._fill(False)

    def _layer(self, name: str) -> Any:
        return next(
            (found for part in self._owner[0].parts_of(self.task) if (found := _find(part, name)) is not None), None
        )

    def _fill(self, lending: bool) -> None:
        found = {name: self._layer(name) if lending else None for _, _, name in self._places}
        for registry, key, name in self._places:
            registry[key] = found[name]

    def _enter(self, layer: nn.Module, inputs: Any) -> None:
        """Check, before a layer runs, whether it may run outside the backbone's forward."""
        if not self._running:
            self.entered = True
            self._check("runs a part of its backbone, and not the whole backbone")

    def _check(self, what: str) -> None:
        """Check that parts of the backbone compute what they compute in the merged network.

        Raises:
            ConfigurationError: if they do not, or if layers outside the backbone could read their features.
        """
        owner = self._owner[0]
        key = tuple(map(id, owner.parts_of(self.task)))
        if self._checked is None or self._checked[0] != key:
            with self._run_whole(), without_hooks(self._body[0]), self._unchanged():
                self._checked = (key, self._find_difference())
        if self._checked[1] is not None:
            raise ConfigurationError(
                f"Task {self.task!r}: the source module {what}. Parts of a merged backbone cannot be used alone here, "
                f"because {self._checked[1]}. Merge with a `backbone` that the source only runs as a whole, or remove "
                "this use from the source's steps and hooks."
            )

    def _find_difference(self) -> str | None:
        if (reason := self._owner[0].find_difference(self.task)) is not None:
            return reason
        source = self._owner[0].sources[self.task]
        own = {id(tensor) for part in self._owner[0].parts_of(self.task) for tensor in part.parameters()}
        others = [name for name, tensor in source.named_parameters() if id(tensor) not in own and tensor.numel() > 1]
        if others and self._owner[0].reorders:
            return (
                f"their features are merged and in another order than the source's, and the source has layers outside "
                f"the backbone, such as `{others[0]}`, which may read them"
            )
        return None

    def find_twin(self, source: LightningModule) -> str | None:
        """Return the name of a module of the source whose parameters have the names and shapes of the backbone."""
        shapes = {name: tensor.shape for name, tensor in self._body[0].named_parameters()} if self._body else {}
        own = {id(each) for each in (self, *self.modules())}
        for name, module in source.named_modules():
            found = {key: tensor.shape for key, tensor in module.named_parameters()}
            if name and id(module) not in own and shapes and found == shapes:
                return name
        return None

    # Everything else is an attribute of the structure

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            body = self.__dict__.get("_body")
            if not body or name.startswith("__") or body[0].__dict__.get("forward") is self:
                raise
            return getattr(body[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        body = self.__dict__.get("_body")
        if not body or name in self.__dict__ or isinstance(value, (nn.Module, Tensor)):
            super().__setattr__(name, value)
            return
        if name in vars(body[0]):
            captured = self._changed.pop(name, vars(body[0])[name])
            if captured is not value and not (_is_plain(value) and captured == value):
                self._changed[name] = captured
        setattr(body[0], name, value)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Context manager in which the attributes of the structure have the values that they had in the capture."""
        now = {name: vars(self._body[0])[name] for name in self._changed}
        vars(self._body[0]).update(self._changed)
        try:
            yield
        finally:
            vars(self._body[0]).update(now)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _registries(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__[name] for name in REGISTRIES]


def _find(module: Any, name: str) -> Any:
    """Return a submodule, parameter or buffer by its dotted name; ``None`` if the module does not have it."""
    for step in name.split(".") if name else ():
        if not isinstance(module, nn.Module):
            return None
        module = next((known[step] for known in _registries(module) if known.get(step) is not None), None)
    return module


def make_shell(model: LightningModule, backbone: str, path: MergedPath, used: Sequence[str]) -> LightningModule:
    """Copy a source model with its steps, metrics and losses. The merged path stands in for its backbone.

    Args:
        model: the source model.
        backbone: dotted name of the merged part.
        path: the merged path.
        used: the names of the modules and tensors that the forward of the backbone uses.
    """
    original = get_backbone(model, backbone)
    earlier: MergedPath | None = original.__dict__.get(STRUCTURE)
    memo, absent = _placeholders(original, used, drop_others=bool(backbone))
    names = list(absent.values())
    if backbone or earlier is not None:
        memo[id(original)] = path
    shell = copy_module(model, memo)
    shell._modules.pop(PATH, None)
    body: nn.Module = shell
    if backbone:
        memo.pop(id(original))
        body = copy_module(original if earlier is None else earlier._body[0], memo)
    else:
        shell.__dict__["forward"] = path
    for name in names:
        layer = _find(original, name)
        if isinstance(layer, nn.Module):
            path._hooks[name] = copy_hooks(layer, memo) if earlier is None else earlier._hooks[name].copied(memo)
    places = [] if earlier is None else copy.deepcopy(earlier._places, memo)
    path.take(body, shell, names, absent, places)
    return shell


def split_source(source: LightningModule, backbone: str, path: MergedPath, network: nn.Module) -> LightningModule:
    """Copy a source of a merged module, with a network in place of its merged path, so that it can be merged again.

    Args:
        source: the source with its merged path.
        backbone: dotted name of the merged part.
        path: the merged path.
        network: the network. It takes over the structure of the path.
    """
    memo: dict[int, Any] = {id(path): network}
    split = copy_module(source, memo)
    if not backbone:
        split.add_module(PATH, network)
    memo.pop(id(path))
    owner, path._owner = path._owner, ()
    try:
        network.__dict__[STRUCTURE] = copy.deepcopy(path, memo)
    finally:
        path._owner = owner
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
        original = _find(backbone, name)
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
