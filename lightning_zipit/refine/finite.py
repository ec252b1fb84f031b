"""Validation of the results of a refinement: NaN, Inf and changed structure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_zipit.errors import CalibrationError, ConfigurationError

MERGED = "the merged network"

REMEDY = (
    "Check the weights of the source models and the calibration data for NaN or Inf. In 16-bit precision, an overflow "
    "is likely: merge with precision='32-true'."
)


def source_of(tasks: list[str]) -> str:
    """Describe the source model of some tasks in an error message."""
    return f"the source of task {', '.join(map(repr, tasks))}"


def check_values(place: str, sums: Mapping[str, Tensor]) -> None:
    """Check sums over the values of networks at one layer for NaN and Inf.

    Args:
        place: the full name of the layer or norm.
        sums: sums over all processes, by the description of the network. The error names the merged network only if
            all sources are finite, because its inputs and targets come from the sources.

    Raises:
        CalibrationError: if a sum is not finite. It names the layer and the networks.
    """
    bad = [network for network, values in sums.items() if not bool(values.isfinite().all())]
    if bad := [network for network in bad if network != MERGED] or bad:
        raise CalibrationError(f"NaN or Inf at `{place}` in the values of {' and '.join(bad)}. {REMEDY}")


def check_structure(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], refinement: str) -> None:
    """Compare the names and shapes of parameters and buffers before and after a refinement.

    Args:
        before: modules by name.
        after: the same modules, refined.
        refinement: the name of the refinement, for the error message.

    Raises:
        ConfigurationError: if they differ.
    """
    for name, module in before.items():
        had, has = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (module, after[name]))
        if had != has:
            keys = ", ".join(f"`{name}.{key}`" for key in {**had, **has} if had.get(key) != has.get(key))
            raise ConfigurationError(
                f"Refinement {refinement} added, removed or reshaped {keys}. A refinement may only change the values "
                "of parameters and buffers: write to them in place, for example with `tensor.copy_(…)`."
            )


def check_results(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> None:
    """Check the results of a refinement for NaN and Inf.

    Args:
        before: modules by name.
        after: the same modules, refined. Entries that were not finite before, such as those of a mask, are ignored.

    Raises:
        CalibrationError: if a result is not finite. It names the parameters and buffers.
    """
    bad = []
    for prefix, module in after.items():
        for (name, new), old in zip(module.state_dict().items(), before[prefix].state_dict().values(), strict=True):
            if not bool((new.isfinite() | ~old.isfinite().to(new.device)).all()):
                bad.append(f"`{prefix}.{name}`")
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CalibrationError(f"The refinement produced NaN or Inf in {listed}. {REMEDY}")
