"""Execution of a refinement on copies of merged networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_zipit._common.views import Inputs
from lightning_zipit.refine.finite import check_results, check_structure
from lightning_zipit.refine.refinement import Changes, MergedNetworks, Refinement


class Refiner:
    """Run a refinement on copies of merged networks. The merged networks change only if the refinement succeeds.

    Args:
        refinement: the refinement.
        merged: the merged networks, and their sources on the device of the batches.
    """

    def __init__(self, refinement: Refinement, merged: MergedNetworks) -> None:
        self.merged = merged
        self._name = type(refinement).__name__
        with torch.inference_mode(False), torch.no_grad():
            self._working = merged.working_copy()
            self._refining = refinement.start(self._working)

    def add(self, inputs: Inputs, tasks: Iterable[str]) -> None:
        """Pass a batch to the refinement.

        Args:
            inputs: one input for all networks, or one input per task.
            tasks: the tasks to which the batch belongs.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._refining.add(inputs, tasks)

    def finish(self) -> Changes:
        """Complete the refinement after the last batch, and copy its results to the merged networks.

        Returns:
            The changes, for the report.

        Raises:
            CalibrationError: if a result is NaN or Inf.
            ConfigurationError: if the refinement changed the name or shape of parameters or buffers.
        """
        with torch.inference_mode(False), torch.no_grad():
            changes = self._refining.finish() or Changes()
            before, after = self.merged.parts, self._working.parts
            check_structure(before, after, self._name)
            check_results(before, after)
            for name, module in before.items():
                refined = after[name].state_dict()
                for key, tensor in module.state_dict().items():
                    tensor.copy_(refined[key])
        return changes
