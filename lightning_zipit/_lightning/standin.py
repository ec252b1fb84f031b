"""Stand-ins for the backbones of source modules: the code of a source reaches the merged network through them.

A source uses its backbone in many ways: it calls the backbone or a part of it, reads attributes, registers hooks, lists
parameters. A stand-in has the structure, attributes and methods of the source's backbone, without its layers. While the
source runs, the layers of stem, trunk and head are lent to the stand-in, at their places in the structure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_zipit._common.calls import Call
from lightning_zipit._lightning.lent_hooks import HOOKS, LentHooks, without_hooks
from lightning_zipit.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_zipit._lightning.multitask import MultiTaskModule

REGISTRIES = ("_modules", "_parameters", "_buffers")
"""The attributes of a module that hold its submodules and tensors by name."""

Place = tuple[dict[str, Any], str, str]
"""A place of a layer or tensor: the registry of a module of the structure, the key in it, the name in the backbone."""

STAND_IN = "_zipit_stand_in"
"""The attribute with the stand-in of a merged path, and of the backbone of a source that was split from a merge."""


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


class StandIn:
    """What stands in for the backbone of a source: its structure, and the places of its layers in it.

    The layers are looked up in their owner at each use, so that a part that is replaced in the owner is replaced here.

    Args:
        owner: the module that has stems, trunk and heads.
        task: the task.

    Attributes:
        body: the backbone without its layers; the source without them for the backbone ``""``.
        entered: whether code of the source has run the merged network. The user of the attribute resets it.
    """

    body: nn.Module

    def __init__(self, owner: MultiTaskModule | None, task: str) -> None:
        self.owner = owner
        self.task = task
        self.entered = False
        self.places: list[Place] = []
        self.hooks: dict[str, LentHooks] = {}
        self._inner: list[nn.Module] = []  # modules of the structure that contain lent layers
        self._depth = 0
        self._running = False
        self._changed: dict[str, Any] = {}  # the values of the capture of attributes that have other values now
        self._checked: tuple[Any, str | None] | None = None

    @property
    def _parts(self) -> list[nn.Module]:
        assert self.owner is not None
        return self.owner.parts_of(self.task)

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
        self.body = body
        self.places += places
        for name in names:
            owner, _, key = name.rpartition(".")
            if (holder := find_in(body, owner)) is not None:
                self.places += [(known, key, name) for known in _registries(holder) if key in known]
        for module in shell.modules():  # other references to a layer
            for known in _registries(module):
                self.places += [(known, key, absent[id(value)]) for key, value in known.items() if id(value) in absent]
        inside = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
        self._inner = [found for name in sorted(inside) if isinstance(found := find_in(body, name), nn.Module)]
        self._fill(False)

    def run(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the merged network: the source's own code of the backbone if it has hooks or other settings."""
        assert self.owner is not None
        self.entered = True
        with self.lent():
            hooked = any(getattr(each, name) for each in self._inner for name in HOOKS)
            if hooked or self._changed:
                self._check("has a hook in its backbone" if hooked else "changes an attribute of its backbone")
                return self.run_body(*inputs, **kwargs)
            with self._run_whole():
                return self.owner.run_task(Call.of_arguments(inputs, kwargs), self.task)

    def run_body(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the source's own code of the backbone on the lent layers."""
        with self.lent(), self._run_whole():
            return type(self.body).forward(self.body, *inputs, **kwargs)

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
                for name, hooks in self.hooks.items():
                    hooks.lend(self._layer(name), self._enter)
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for hooks in self.hooks.values():
                    hooks.take_back()
                self._fill(False)

    def _layer(self, name: str) -> Any:
        found = (find_in(part, name) for part in self._parts)
        return next((each for each in found if each is not None), None)

    def _fill(self, lending: bool) -> None:
        found = {name: self._layer(name) if lending else None for _, _, name in self.places}
        for registry, key, name in self.places:
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
        key = tuple(map(id, self._parts))
        if self._checked is None or self._checked[0] != key:
            with self._run_whole(), without_hooks(self.body), self._unchanged():
                self._checked = (key, self._find_difference())
        if self._checked[1] is not None:
            raise ConfigurationError(
                f"Task {self.task!r}: the source module {what}. Parts of a merged backbone cannot be used alone here, "
                f"because {self._checked[1]}. Merge with a `backbone` that the source only runs as a whole, or remove "
                "this use from the source's steps and hooks."
            )

    def _find_difference(self) -> str | None:
        assert self.owner is not None
        if (reason := self.owner.find_difference(self.task)) is not None:
            return reason
        source = self.owner.sources[self.task]
        own = {id(tensor) for part in self._parts for tensor in part.parameters()}
        others = [name for name, tensor in source.named_parameters() if id(tensor) not in own and tensor.numel() > 1]
        if others and self.owner.reorders:
            return (
                f"their features are merged and in another order than the source's, and the source has layers outside "
                f"the backbone, such as `{others[0]}`, which may read them"
            )
        return None

    @property
    def is_lent(self) -> bool:
        """Whether the structure has its layers."""
        return self._depth > 0

    def copy_body(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the structure with the layers that are lent to it, without hooks."""
        self._check("copies its backbone")
        self.entered = True
        with without_hooks(self.body):
            return copy.deepcopy(self.body, memo)

    def find_twin(self, source: LightningModule) -> str | None:
        """Return the name of a module of the source whose parameters have the names and shapes of the backbone."""
        shapes = {name: tensor.shape for name, tensor in self.body.named_parameters()}
        own = set(map(id, self.body.modules()))
        others = {name: module for name, module in source.named_modules() if name and id(module) not in own}
        for name, module in others.items():
            found = {key: tensor.shape for key, tensor in module.named_parameters()}
            if found == shapes and not isinstance(module, MergedPath):
                return name
        return None

    def set(self, name: str, value: Any) -> None:
        """Set an attribute of the structure. The captured graph has the value of the capture."""
        if name in vars(self.body):
            captured = self._changed.pop(name, vars(self.body)[name])
            if captured is not value and not (_is_plain(value) and captured == value):
                self._changed[name] = captured
        setattr(self.body, name, value)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Context manager in which the attributes of the structure have the values that they had in the capture."""
        now = {name: vars(self.body)[name] for name in self._changed}
        vars(self.body).update(self._changed)
        try:
            yield
        finally:
            vars(self.body).update(now)


class MergedPath(nn.Module):
    """Stem, trunk and head of one task as a single module, which replaces the backbone of a source module.

    Its attributes, methods and submodules are those of the backbone. The stand-in has no registered modules of its own:
    the path has its submodules, which are without layers unless these are lent.

    Args:
        stand_in: what stands in for the backbone.
    """

    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self.__dict__[STAND_IN] = stand_in

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        stand_in: StandIn = self.__dict__[STAND_IN]
        return stand_in.run(*inputs, **kwargs)

    def share(self, body: nn.Module) -> None:
        """Share the submodules, tensors and hooks of a structure."""
        for name in (*REGISTRIES, "_non_persistent_buffers_set", *HOOKS):
            self.__dict__[name] = body.__dict__[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the path with its owner; or, for code of the source, the backbone with the layers that are lent."""
        stand_in: StandIn = self.__dict__[STAND_IN]
        if stand_in.is_lent:
            return stand_in.copy_body(memo)
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            body = vars(self.__dict__.get(STAND_IN, object)).get("body")
            if body is None or name.startswith("__") or body.__dict__.get("forward") is self:
                raise
            return getattr(body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        stand_in = self.__dict__.get(STAND_IN)
        if stand_in is None or name in self.__dict__ or isinstance(value, (nn.Module, Tensor)):
            super().__setattr__(name, value)
        else:
            stand_in.set(name, value)


class MergedContainer(MergedPath):
    """A merged path for a backbone that is also a container, such as ``nn.Sequential``."""

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__[STAND_IN].body[key]

    def __len__(self) -> int:
        return len(self.__dict__[STAND_IN].body)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__[STAND_IN].body)

    def __contains__(self, key: Any) -> bool:
        return key in self.__dict__[STAND_IN].body


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _registries(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__[name] for name in REGISTRIES]


def find_in(module: Any, name: str) -> Any:
    """Return a submodule, parameter or buffer by its dotted name; ``None`` if the module does not have it."""
    for step in name.split(".") if name else ():
        if not isinstance(module, nn.Module):
            return None
        module = next((known[step] for known in _registries(module) if known.get(step) is not None), None)
    return module
