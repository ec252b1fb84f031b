"""Trust: the classes and functions that a file may name.

A class path with arguments is a call, so that even a file of tensors and primitives can run any program. Every reader
of a file therefore checks all names here before it imports or calls anything. These names are allowed:

1. entries of ``trust=`` (``--trust``): all classes of a module, or one class or function;
2. names that the user gives elsewhere: the classes of ``models=``, ``--model``, ``--classes.TASK`` or a
   :class:`~lightning_zipit.ZipItCLI`; and for a given module, the classes of its submodules from the same package;
3. for a source model: a LightningModule class that the running program has imported or defined. A file cannot import
   anything, so that this is a class of the user, or of a library that the program uses for its models;
4. for an argument: the classes of :data:`BUILDING_BLOCKS`, and the defaults in signatures of the user's classes.

All other names are refused. Names are looked up in modules that are already imported, so that a refused name is never
imported. A name below an entry of ``trust`` is imported, and must then be a class that is also defined below that
entry: ``my_project.subprocess.Popen`` is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from inspect import isroutine
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric

from lightning_zipit._lightning.files.names import dotted, find_object, homes_of, is_import_path, is_name, look_up
from lightning_zipit._lightning.internals import lightning_modules
from lightning_zipit.errors import CheckpointError, ConfigurationError, UntrustedError

Trusted: TypeAlias = Sequence[str] | str
"""Names of modules, classes or functions, or a single name."""

BUILDING_BLOCKS: tuple[tuple[str, type], ...] = (
    ("torch.nn.modules", nn.Module),
    ("torch.optim", Optimizer),
    ("torch.optim", LRScheduler),
    ("lightning.pytorch.cli", ReduceLROnPlateau),
    ("pytorch_lightning.cli", ReduceLROnPlateau),
    ("torchmetrics.aggregation", Metric),
    ("torchmetrics.classification", Metric),
    ("torchmetrics.clustering", Metric),
    ("torchmetrics.collections", nn.Module),
    ("torchmetrics.nominal", Metric),
    ("torchmetrics.regression", Metric),
    ("torchmetrics.retrieval", Metric),
    ("torchmetrics.segmentation", Metric),
)
"""Classes that any file may use as arguments: the module that defines them, and their base class.

The constructors of these classes open no file, load nothing, and call none of their arguments. This does not hold for
``torch.fx``, ``torch.jit``, ``torch.distributed`` and ``torch.ao``, for Lightning's trainers, loggers and callbacks, or
for metrics with pretrained networks.
"""

FRAMEWORKS = frozenset({"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"})
"""Packages that are imported even if the user does not import them."""

OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Trust:
    """Names that a file may refer to.

    Attributes:
        modules: the entries of ``trust=``: modules whose classes are allowed, and single classes and functions.
        names: names that the user gave elsewhere. Only exactly these names are allowed.
        objects: classes and functions that the user gave.
    """

    modules: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    objects: tuple[Any, ...] = ()

    @classmethod
    def of(cls, trust: Trusted | Trust | None = None, *given: Any) -> Trust:
        """Convert an argument ``trust=``.

        Args:
            trust: modules, classes or functions by name; or an existing :class:`Trust`.
            given: classes, functions, modules and names that the user gave; see :meth:`naming`.

        Raises:
            ConfigurationError: if ``trust`` contains anything but such names.
        """
        if isinstance(trust, Trust):
            return trust.naming(*given)
        entries = [trust] if isinstance(trust, str) else list(trust or ())
        for entry in entries:
            if not isinstance(entry, str) or not is_name(entry):
                raise ConfigurationError(
                    f"`trust` contains {entry!r}, which is not a name of a module or class. Use full names, such as "
                    "'my_project' or 'my_project.LitNet'."
                )
        return cls(tuple(map(dotted, entries))).naming(*given)

    def naming(self, *given: Any) -> Trust:
        """Add classes, functions and names that the user gave.

        Args:
            given: classes and functions, or their names. A module stands for its class, and for the classes of its
                submodules from the same package. Anything else is ignored.
        """
        names = {dotted(one) for one in given if isinstance(one, str)}
        objects = [one for one in given if isinstance(one, type) or isroutine(one)]
        for module in (one for one in given if isinstance(one, nn.Module)):
            package = package_of(type(module))
            objects += {type(part) for part in module.modules() if package_of(type(part)) == package}
        return replace(self, names=self.names | names, objects=(*self.objects, *objects))

    def allows(self, name: Any, as_source: bool = False, default: Any = None) -> bool:
        """Whether a file may refer to a name. Nothing is imported.

        Args:
            name: the name in the file.
            as_source: whether the name is the class of a source model, and not an argument.
            default: the default of the parameter, which is allowed because the user's code contains it.
        """
        if not isinstance(name, str) or not is_import_path(name):
            return False
        found = look_up(name)
        return self._vouches(dotted(name)) if found is None else self._confirms(name, found, as_source, default)

    def find(self, name: str, as_source: bool = False, default: Any = None) -> Any:
        """Import a class or function that a file names.

        Raises:
            CheckpointError: if the name does not exist, or is not allowed.
        """
        if not self.allows(name, as_source, default):
            raise UntrustedError(f"{name} is not allowed. If it may be called, give trust=[{name!r}] (--trust={name}).")
        found = look_up(name)
        if isinstance(found, type) or any(found is one for one in (*self.objects, default) if one is not None):
            return found
        try:
            found = find_object(name)
        except ConfigurationError as error:
            raise CheckpointError(str(error)) from error
        if not self._confirms(name, found, as_source, default):
            homes = " or ".join(sorted(homes_of(found))) or type(found).__name__
            raise UntrustedError(
                f"{name} is not allowed: an entry of `trust` contains it, but it is {homes}, which is not a class "
                "defined in that entry. If it may be called, add its full name to `trust`."
            )
        return found

    def _vouches(self, name: str) -> bool:
        return name in self.names or any(name == entry or name.startswith(f"{entry}.") for entry in self.modules)

    def _confirms(self, name: str, found: Any, as_source: bool, default: Any) -> bool:
        if found is None:
            return False
        homes = homes_of(found)
        if not self.names.union(self.modules).isdisjoint({dotted(name), *homes}):
            return True  # allowed by its full name
        if any(found is one for one in (*self.objects, default)):
            return True
        return isinstance(found, type) and (
            any(map(self._vouches, homes)) or (is_own_source(found) if as_source else is_building_block(found))
        )


def package_of(cls: type) -> str:
    """Return the name of the package or script that defines a class."""
    return cls.__module__.partition(".")[0]


def is_own_source(found: type) -> bool:
    """Whether an imported class is a LightningModule class of the user."""
    return issubclass(found, lightning_modules()) and package_of(found) not in FRAMEWORKS | {OURS}


def is_building_block(found: type) -> bool:
    """Whether a class is one of :data:`BUILDING_BLOCKS`."""
    return not found.__name__.startswith("_") and any(
        f"{found.__module__}.".startswith(f"{place}.") and issubclass(found, kind) for place, kind in BUILDING_BLOCKS
    )


def find_source_class(name: str, trust: Trust) -> type[LightningModule]:
    """Import the class of a source model that a file names.

    Raises:
        CheckpointError: if the name does not exist, is not allowed, or is not a class of source models.
    """
    found = trust.find(name, as_source=True)
    if not (isinstance(found, type) and issubclass(found, lightning_modules())):
        raise CheckpointError(f"{name!r} is not a LightningModule class.")
    if any(package_of(base) == OURS for base in found.__mro__):
        raise CheckpointError(f"{name!r} is a class of {OURS}, and cannot be a source model.")
    return found


@dataclass(frozen=True)
class Request:
    """A reference in a file to a class or function.

    Attributes:
        name: the name in the file.
        where: a description of its use, for error messages.
        allowed: whether the name is allowed.
    """

    name: Any
    where: str
    allowed: bool

    def __str__(self) -> str:
        text = f"{self.name} ({self.where})"
        return text if text.isprintable() else repr(text)  # the file could hold control characters


def check_requests(where: str, requests: Iterable[Request], ways_out: Iterable[str] = ()) -> None:
    """Refuse a file with a name that is not allowed.

    Args:
        where: the file.
        requests: all references in the file.
        ways_out: other ways to allow the names than ``trust``.

    Raises:
        UntrustedError: with all references in the file, and the ways to allow them.
    """
    requests = list(requests)
    refused = [request for request in requests if not request.allowed]
    if not refused:
        return
    listed = [f"\n  - {request}" for request in refused]
    listed += [f"\n  - {request}: allowed" for request in requests if request.allowed]
    names = list(dict.fromkeys(request.name for request in refused if is_import_path(str(request.name))))
    trust = (
        f" If you trust these with the arguments in the file, allow them: trust={names} in Python, "
        f"--trust='[{', '.join(names)}]' on the command line. The name of a module allows all classes defined in it."
    )
    hint = trust if names else " `trust` cannot allow them, because they are not valid names."
    raise UntrustedError(
        f"{where} refers to classes or functions that are not trusted. They were neither imported nor called:"
        f"{''.join(listed)}\nNothing that the file names was called.{hint}{''.join(f' Or {way}.' for way in ways_out)}"
    )
