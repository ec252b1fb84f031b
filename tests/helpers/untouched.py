"""Asserts that public functions leave the modules that they are given as they were, also where they fail.

:func:`install` wraps the entry points once, before test modules import them. Everything that a module holds is compared
bit by bit: parameters, buffers, modes, hooks, and every other attribute of every submodule, with what containers and
objects of the user's own hold.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lightning_zipit
from lightning_zipit import Ensemble, MultiHeadModule, ZipIt, ZipItModule

FUNCTIONS = ("trace", "merge_backbones", "interpolate", "export_merged")
METHODS = (
    *((ZipIt, name) for name in ("merge", "sweep")),
    *((made, "__init__") for made in (ZipItModule, MultiHeadModule, Ensemble)),
    (MultiHeadModule, "fit_temperatures"),
    (Trainer, "predict"),
)
READ = "_hparams"  # a LightningModule makes it, empty, when it is read
PREDICT = Trainer.predict
LIBRARIES = ("torch", "lightning", "lightning_zipit", "torchmetrics", "numpy", "builtins")


class Guard:
    """Whether calls are watched; one inside another is not."""

    def __init__(self) -> None:
        self.off = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        self.off += 1
        try:
            yield
        finally:
            self.off -= 1


guard = Guard()


def install() -> None:
    """Wrap the entry points."""
    for name in FUNCTIONS:
        function = getattr(lightning_zipit, name)
        wrapped = watched(function)
        for module in [module for known, module in sys.modules.items() if known.startswith("lightning_zipit")]:
            if vars(module).get(name) is function:
                setattr(module, name, wrapped)
    for owner, name in METHODS:
        setattr(owner, name, watched(getattr(owner, name), makes=name == "__init__"))


def watched(function: Callable[..., Any], makes: bool = False) -> Callable[..., Any]:
    """A function that asserts that it leaves the modules among its arguments alone, but for one that it makes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if guard.off:
            return function(*args, **kwargs)
        modules = list(given_modules((args[makes:], kwargs)))
        if function is PREDICT:  # merges nothing else
            modules = list(given_modules([each for each in (*args, *kwargs.values()) if isinstance(each, ZipItModule)]))
        before = [Snapshot(module) for module in modules]
        try:
            with guard.suspended():
                result = function(*args, **kwargs)
        except BaseException as error:
            assert_unchanged(before, function, error)
            raise
        assert_unchanged(before, function, None)
        return result

    return call


def given_modules(value: Any) -> Iterator[nn.Module]:
    """The user's modules in arguments."""
    if isinstance(value, ZipItModule):
        yield from given_modules((value._outside.given, value.base))
    elif isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping):
        yield from given_modules(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from given_modules(each)


def assert_unchanged(before: list[Snapshot], function: Callable[..., Any], error: BaseException | None) -> None:
    changes = [change for snapshot in before for change in snapshot.changes()]
    if changes:
        where = f"{function.__qualname__}{' failed and' if error else ''} changed what it was given"
        raise AssertionError(f"{where}: {'; '.join(changes)}") from error


class Snapshot:
    """All that a module holds, by dotted name."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = dict(contents(module))

    def changes(self) -> list[str]:
        """For people: what is another now."""
        now = dict(contents(self.module))
        name = type(self.module).__name__
        added = [f"{name} has gained {path}" for path in now.keys() - self.held.keys()]
        lost = [f"{name} has lost {path}" for path in self.held.keys() - now.keys()]
        both = now.keys() & self.held.keys()
        other = [f"{path} of {name} is another" for path in both if not same(self.held[path], now[path])]
        return sorted(added + lost + other)


class Kept(NamedTuple):
    """A tensor, and what it held."""

    tensor: Tensor
    values: Tensor
    requires_grad: bool
    grad: Tensor | None


def contents(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """By name what a module and its submodules hold: tensors with copies, and all else as it is."""
    seen: set[int] = set()

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor) and not is_lazy(value):
            yield path, Kept(value, value.detach().clone(), value.requires_grad, value.grad)
            return
        yield path, value
        if id(value) in seen:
            return
        if isinstance(value, Mapping):
            seen.add(id(value))
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            seen.add(id(value))
            items = list(enumerate(value))
        elif is_plain(value):
            seen.add(id(value))
            items = [(name, each) for name, each in vars(value).items() if name != READ or each]
        else:
            return
        yield f"{path} (names)", " ".join(str(key) for key, _ in items)
        for key, each in items:
            yield from walk(f"{path}.{key}", each)

    yield from walk("", module)


def is_plain(value: Any) -> bool:
    """A module, or an object of the user's own."""
    if isinstance(value, nn.Module):
        return True
    library = type(value).__module__.partition(".")[0] in LIBRARIES
    return hasattr(value, "__dict__") and not library and not isinstance(value, type) and not callable(value)


def same(before: Any, now: Any) -> bool:
    """Whether something is what it was, to the last bit."""
    if isinstance(before, Kept) and isinstance(now, Kept):
        objects = before.tensor is now.tensor and before.grad is now.grad
        return objects and before.requires_grad == now.requires_grad and identical(before.values, now.values)
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    # What a container holds is compared by its own.
    return isinstance(before, (Mapping, list, tuple)) or (isinstance(before, (str, int, float)) and before == now)


def identical(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())
