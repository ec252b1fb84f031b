"""Checks of what a refinement computes: NaN and Inf are errors that name the place and the network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_zipit.errors import CalibrationError, ConfigurationError

MERGED = "the merged network"

WAY_OUT = (
    "Look at the sources' weights and at the data of this pass for NaN or Inf; under 16-bit precision an overflow is "
    "likely: merge with precision='32-true'."
)


def source_of(tasks: list[str]) -> str:
    """Name the source model of some tasks in an error."""
    return f"the source of task {', '.join(map(repr, tasks))}"


def check_values(place: str, sums: Mapping[str, Tensor]) -> None:
    """Look for NaN and Inf in sums over the values of networks at one place.

    Args:
        place: the layer or norm, by its full name.
        sums: sums over all processes by the name of the network. The merged network is named only if no source is,
            because its inputs and targets come from the sources.

    Raises:
        CalibrationError: naming the place and the networks.
    """
    bad = [network for network, values in sums.items() if not bool(values.isfinite().all())]
    if bad := [network for network in bad if network != MERGED] or bad:
        raise CalibrationError(f"NaN or Inf at `{place}` in what {' and '.join(bad)} computes. {WAY_OUT}")


def check_structure(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], refinement: str) -> None:
    """Compare the names and shapes of parameters and buffers before and after a refinement.

    Args:
        before: modules by name.
        after: the same modules, refined.
        refinement: the name of the refinement, for the error.

    Raises:
        ConfigurationError: if they differ.
    """
    for name, module in before.items():
        had, has = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (module, after[name]))
        if had != has:
            keys = ", ".join(f"`{name}.{key}`" for key in {**had, **has} if had.get(key) != has.get(key))
            raise ConfigurationError(
                f"Refinement {refinement} added, removed or reshaped {keys}. A refinement may change the values of "
                "parameters and buffers only: write to them in place, such as with `tensor.copy_(…)`."
            )


def check_results(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> None:
    """Look for NaN and Inf in the results of a refinement.

    Args:
        before: modules by name.
        after: the same modules, refined. Entries that are not finite in both, such as those of a mask, are ignored.

    Raises:
        CalibrationError: naming parameters and buffers.
    """
    bad = []
    for prefix, module in after.items():
        for (name, new), old in zip(module.state_dict().items(), before[prefix].state_dict().values(), strict=True):
            if not bool((new.isfinite() | ~old.isfinite().to(new.device)).all()):
                bad.append(f"`{prefix}.{name}`")
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CalibrationError(f"Refining gave NaN or Inf in {listed}. {WAY_OUT}")
