"""What a file may name: every reader asks here before anything that a file names is imported or called.

A class path and arguments are a call, so that a file of tensors and primitives can run any program. What is allowed is
listed, and everything else is refused:

1. what the user vouches for with ``trust=`` (``--trust``): the classes of a module, or one class or function by name;
2. what the user names: a class given as ``models=``, ``--model``, ``--classes.TASK`` or to a
   :class:`~lightning_zipit.ZipItCLI`; of a module that is given, also the classes of the same package inside it;
3. as the class of a source: a LightningModule that the running program has imported or defined. A file cannot import
   anything, so that this is one of the user's own classes, or of a library that the program uses for its models;
4. as an argument: the classes of :data:`BUILDING_BLOCKS`, and what the user's own signatures have as default.

Names are looked up among what is imported already: refusing imports nothing. A name under ``trust`` is imported, and
then has to be a class that is defined under ``trust`` too: ``my_project.subprocess.Popen`` is not.
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
from lightning_zipit.errors import CheckpointError, ConfigurationError, UntrustedError

Trusted: TypeAlias = Sequence[str] | str
"""Modules, classes or functions by name, or one of them."""

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
"""Where classes are defined, and of which kind, that any file may use as arguments.

Their constructors open no file, load nothing and call nothing that they are given, unlike those of ``torch.fx``,
``torch.jit``, ``torch.distributed`` and ``torch.ao``, Lightning's trainers, loggers and callbacks, or metrics with
pretrained networks.
"""

FRAMEWORKS = frozenset({"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"})
"""Packages whose modules are imported without the user's doing."""

OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Trust:
    """What one reader of a file may import and call.

    Attributes:
        modules: names of modules whose classes are allowed, and names of single classes and functions.
        names: names that are allowed as they stand.
        objects: classes and functions that the user has named.
    """

    modules: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    objects: tuple[Any, ...] = ()

    @classmethod
    def of(cls, trust: Trusted | Trust | None = None, *given: Any) -> Trust:
        """The trust that an argument ``trust=`` asks for.

        Args:
            trust: modules, classes or functions by name; or what the command line made of them.
            given: what the user has named; see :meth:`naming`.

        Raises:
            ConfigurationError: if it holds anything but such names.
        """
        if isinstance(trust, Trust):
            return trust.naming(*given)
        entries = [trust] if isinstance(trust, str) else list(trust or ())
        for entry in entries:
            if not isinstance(entry, str) or not is_name(entry):
                raise ConfigurationError(
                    f"`trust` holds {entry!r}: name modules, or classes in full, such as 'my_project' or "
                    "'my_project.LitNet'."
                )
        return cls(tuple(map(dotted, entries))).naming(*given)

    def naming(self, *given: Any) -> Trust:
        """The same, with what the user has named.

        Args:
            given: classes and functions, or their names; modules stand for their class, and for the classes of the same
                package inside them. Anything else is ignored.
        """
        names = {dotted(one) for one in given if isinstance(one, str)}
        objects = [one for one in given if isinstance(one, type) or isroutine(one)]
        for module in (one for one in given if isinstance(one, nn.Module)):
            package = package_of(type(module))
            objects += {type(part) for part in module.modules() if package_of(type(part)) == package}
        return replace(self, names=self.names | names, objects=(*self.objects, *objects))

    def allows(self, name: Any, as_source: bool = False, default: Any = None) -> bool:
        """Whether something may be imported and used; nothing is imported to find out.

        Args:
            name: what the file names.
            as_source: whether as the class of a source model, rather than as an argument.
            default: what the parameter that it is for is by default, which the user's code has named.
        """
        if not isinstance(name, str) or not is_import_path(name):
            return False
        found = look_up(name)
        return self._vouches(dotted(name)) if found is None else self._confirms(name, found, as_source, default)

    def find(self, name: str, as_source: bool = False, default: Any = None) -> Any:
        """Import what a file names.

        Raises:
            CheckpointError: if it is not there, or not allowed.
        """
        if not self.allows(name, as_source, default):
            raise UntrustedError(f"{name} is not allowed: say trust=[{name!r}] (--trust={name}) if it may be called.")
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
                f"{name} is under `trust`, but it is {homes}, which is not a class that is defined there. Trust it by "
                "its full name if it may be called."
            )
        return found

    def _vouches(self, name: str) -> bool:
        return name in self.names or any(name == entry or name.startswith(f"{entry}.") for entry in self.modules)

    def _confirms(self, name: str, found: Any, as_source: bool, default: Any) -> bool:
        if found is None:
            return False
        homes = homes_of(found)
        if not self.names.union(self.modules).isdisjoint({dotted(name), *homes}):
            return True  # by its full name
        if any(found is one for one in (*self.objects, default)):
            return True
        return isinstance(found, type) and (
            any(map(self._vouches, homes)) or (is_own_source(found) if as_source else is_building_block(found))
        )


def package_of(cls: type) -> str:
    """The name of the package or script that defines a class."""
    return cls.__module__.partition(".")[0]


def is_own_source(found: type) -> bool:
    """Whether an imported class is a LightningModule of the user's."""
    return issubclass(found, LightningModule) and package_of(found) not in FRAMEWORKS | {OURS}


def is_building_block(found: type) -> bool:
    """Whether a class is one of :data:`BUILDING_BLOCKS`."""
    return not found.__name__.startswith("_") and any(
        f"{found.__module__}.".startswith(f"{place}.") and issubclass(found, kind) for place, kind in BUILDING_BLOCKS
    )


def find_source_class(name: str, trust: Trust) -> type[LightningModule]:
    """Import the class of a source model that a file names.

    Raises:
        CheckpointError: if it is not there, not allowed, or no class of source models.
    """
    found = trust.find(name, as_source=True)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise CheckpointError(f"{name!r} is not a LightningModule class.")
    if any(package_of(base) == OURS for base in found.__mro__):
        raise CheckpointError(f"{name!r} is a class of {OURS}, which is no source of a merge.")
    return found


@dataclass(frozen=True)
class Request:
    """What a file asks for.

    Attributes:
        name: a class or function, as the file names it.
        where: what for, in words.
        allowed: whether that is allowed.
    """

    name: Any
    where: str
    allowed: bool

    def __str__(self) -> str:
        text = f"{self.name} ({self.where})"
        return text if text.isprintable() else repr(text)  # it comes from the file


def check_requests(where: str, requests: Iterable[Request], ways_out: Iterable[str] = ()) -> None:
    """Refuse a file that asks for anything that is not allowed.

    Args:
        where: the file.
        requests: all that it asks for.
        ways_out: other ways to allow that than ``trust``.

    Raises:
        UntrustedError: with all that the file asks for, and what to say to allow it.
    """
    requests = list(requests)
    refused = [request for request in requests if not request.allowed]
    if not refused:
        return
    listed = [f"\n  - {request}" for request in refused]
    listed += [f"\n  - {request}: allowed" for request in requests if request.allowed]
    names = list(dict.fromkeys(request.name for request in refused if is_import_path(str(request.name))))
    trust = (
        f" If you know what these do with the arguments in the file, allow them: trust={names} in Python, "
        f"--trust='[{', '.join(names)}]' on the command line; a module's name allows all classes that it defines."
    )
    raise UntrustedError(
        f"{where} names what you have not vouched for, which was neither imported nor called:{''.join(listed)}\n"
        f"Nothing else that the file names was called either.{trust if names else ' No trust allows what is no name.'}"
        f"{''.join(f' Or {way}.' for way in ways_out)}"
    )
