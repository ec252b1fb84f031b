"""Weights of a module in a file of any origin: the state dict in it, and its names in the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_zipit.errors import CheckpointError

WRAPPERS = frozenset({"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch and Lightning insert when they wrap a module, such as with `torch.compile`."""

ALSO_MODULE = WRAPPERS | {"module"}
"""The same, with the name that data parallel training and averages of weights insert."""

WEIGHTS = "state_dict"
"""The entry of a Lightning checkpoint with the weights."""

State = Mapping[str, Tensor]


def load_weights(module: LightningModule, checkpoint: dict[str, Any], where: str, key: str | None = None) -> None:
    """Load the weights of a module from the content of a file.

    The file is a Lightning checkpoint, a state dict, or a dict that holds state dicts. The names may have prefixes, as
    of `torch.compile`, of an average of weights, or of another module around the same network.

    Args:
        module: the module.
        checkpoint: the content of the file.
        where: the file, for error messages.
        key: the entry of the file that holds the weights, or the prefix of their names; ``None`` to find them.

    Raises:
        CheckpointError: if the file holds no weights, several that fit the module, or none under ``key``.
    """
    if WEIGHTS in checkpoint:
        module.on_load_checkpoint(checkpoint)
    found = dict(_find_states("", checkpoint))
    if key is None:
        state = _find(module, found, where, list(checkpoint))
    else:
        state = _choose(found, key, where)
        state = next((aligned for _, aligned in _alignments(module, state)), state)
    module.load_state_dict(state, strict=module.strict_loading)


def _find(module: LightningModule, found: Mapping[str, State], where: str, keys: list[Any]) -> State:
    """Find the weights of a module among the state dicts of a file."""
    fits = {(path, prefix): aligned for path, state in found.items() for prefix, aligned in _alignments(module, state)}
    usual = WEIGHTS if WEIGHTS in found else ""
    candidates = [place for place in fits if place[0] == usual or usual not in found]
    names = {place: _join(*place) for place in fits}
    if len(candidates) > 1:
        raise CheckpointError(
            f"{where} holds several sets of weights that fit {type(module).__name__}: "
            f"{', '.join(repr(names[place]) for place in candidates)}. Choose one by "
            f"weights_key={names[candidates[-1]]!r} (--weights_key={names[candidates[-1]]})."
        )
    if not candidates and usual in found:
        return found[usual]  # loading it says what does not fit, unless the module reads it in its own way
    if not candidates:
        held = f" It holds tensors under {', '.join(map(repr, found))}, whose names do not fit." if found else ""
        raise CheckpointError(
            f"{where} is neither a Lightning checkpoint from trainer.save_checkpoint nor a state_dict of "
            f"{type(module).__name__}. Its keys are {', '.join(map(repr, keys[:5])) or 'none'}.{held}"
        )
    if others := [names[place] for place in fits if place not in candidates]:
        rank_zero_warn(
            f"{where} also holds weights under {', '.join(map(repr, others))}. The weights under "
            f"{names[candidates[0]]!r} are used. Give weights_key={others[0]!r} (--weights_key={others[0]}) for others."
        )
    return fits[candidates[0]]


def _find_states(path: str, content: Mapping[Any, Any], depth: int = 3) -> Iterator[tuple[str, State]]:
    """Find all dicts in a file that hold only tensors, each with the keys that lead to it."""
    if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        yield path, content
    elif depth:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _find_states(_join(path, key), value, depth - 1)


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _choose(found: Mapping[str, State], key: str, where: str) -> State:
    """Return the state dict under a key, or the entries of a state dict whose names have a prefix."""
    if key in found:
        return found[key]
    for path, state in found.items():
        for prefix in (f"{key}.", f"{key.removeprefix(f'{path}.')}."):
            if part := {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}:
                return part
    raise CheckpointError(
        f"{where} holds no weights under {key!r}. It holds weights under "
        f"{', '.join(repr(path) for path in found) or 'no key'}."
    )


def _alignments(module: LightningModule, state: State) -> list[tuple[str, State]]:
    """Rename a state dict to the names of a module, in every way that gives the module all its weights.

    Returns:
        For each way, the prefix that the names had, and the state dict with the names of the module. There is none if
        other entries are left than counters.
    """
    expected = module.state_dict(keep_vars=True)
    for without in (frozenset[str](), WRAPPERS, ALSO_MODULE):
        names = {_without(name, without): each for name, each in state.items()}
        if len(names) < len(state):
            continue
        fits: dict[str, State] = {}
        explained: set[str] = set()
        for place in _places(module, expected):
            for prefix in _prefixes(names, expected, place):
                used, aligned = _align(names, prefix, expected, place)
                if aligned and not used <= explained:
                    explained |= used
                    fits[prefix.rstrip(".")] = aligned
        if fits and not any(each.ndim for name, each in names.items() if name not in explained):
            return list(fits.items())
    return []


def _align(
    names: Mapping[str, Tensor], prefix: str, expected: Mapping[str, Any], place: str
) -> tuple[set[str], State | None]:
    """Put the entries with a prefix at a place in a module.

    Returns:
        The names of the entries that are used, and the state dict; ``None`` if names or shapes differ. What the module
        has outside the place may be missing, unless the file has the module's own names.
    """
    inside = {name: each for name, each in expected.items() if name.startswith(place)}
    outside = {name: names.get(name, each) for name, each in expected.items() if name not in inside}
    own = {name for name in names if name.startswith(prefix)}
    moved = {f"{place}{name.removeprefix(prefix)}": names[name] for name in own}
    used = own | (names.keys() & outside.keys())
    if not _agree(moved, inside) or (prefix == place and not outside.keys() <= names.keys()):
        return used, None
    return used, {**outside, **moved}


def _without(name: str, parts: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _places(module: LightningModule, expected: Mapping[str, Any]) -> list[str]:
    """List the prefixes of the submodules that have all parameters of a module, from the module itself inwards."""
    parameters = [name.split(".") for name, _ in module.named_parameters() if name in expected]
    places = [""]
    for depth in range(1, min(map(len, parameters), default=1)):
        if len({tuple(name[:depth]) for name in parameters}) > 1:
            break
        places.append(f"{'.'.join(parameters[0][:depth])}.")
    return places


def _prefixes(names: Mapping[str, Tensor], expected: Mapping[str, Any], place: str) -> list[str]:
    """List what may precede the names in a file, by the first name of the module at a place."""
    first = next((name.removeprefix(place) for name in expected if name.startswith(place)), "")
    return [name.removesuffix(first) for name in names if first and f".{name}".endswith(f".{first}")]


def _agree(own: State, inside: Mapping[str, Any]) -> bool:
    """Whether a state dict has exactly the names and shapes that are expected."""
    return set(own) == set(inside) and all(
        not isinstance(each, Tensor) or is_lazy(each) or own[name].shape == each.shape for name, each in inside.items()
    )
