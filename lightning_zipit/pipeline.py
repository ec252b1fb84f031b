"""Pipeline of a merge: prepare → calibrate → match → merge → refine → done.

The caller pushes batches into a :class:`Pipeline`, pass by pass. The pipeline is independent of their origin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_zipit._calibration.calibration import Calibration
from lightning_zipit._calibration.layout import Layout
from lightning_zipit._common.collectives import exchange
from lightning_zipit._common.messages import warn_on_rank_zero
from lightning_zipit._common.sources import Sources
from lightning_zipit._common.views import Inputs, as_inputs, bound
from lightning_zipit._matching.families import split_families
from lightning_zipit._matching.matchings import Matchings
from lightning_zipit._phases.calibrate import Gathering, measuring
from lightning_zipit._phases.match import Matching, choose
from lightning_zipit._phases.merge import merge, with_report
from lightning_zipit._phases.prepare import (
    Graphs,
    Traced,
    open_file,
    prepare,
    prepare_from,
    prepare_without_data,
    trace_without_data,
)
from lightning_zipit.errors import CalibrationError, ConfigurationError
from lightning_zipit.graph import MergeGraph
from lightning_zipit.merged import MergedBackbone
from lightning_zipit.refine import MergedNetworks
from lightning_zipit.refine.refiner import Refiner
from lightning_zipit.settings import MergeSettings

Result = TypeVar("Result")


class Phase(IntEnum):
    """The next phase of a pipeline."""

    PREPARE = 0
    CALIBRATE = 1
    MERGE = 2
    REFINE = 3
    DONE = 4


class Pipeline:
    """One merge, from its sources to the merged networks.

    The caller reads the calibration data :attr:`passes` times. Each pass starts with :meth:`begin`, followed by
    :meth:`add` for each batch. :meth:`finish` ends the merge. All ranks of a process group call the same methods. A
    rank may have no batch in a pass.

    Args:
        sources: the source networks.
        settings: the options of the merge.
        without_data: merge without any pass, which is possible if neither matcher nor refinement needs data. The
            networks are traced and proved on an input that is guessed from their first layers.

    Raises:
        ConfigurationError: with every problem that is known without data.
        UnknownShapeError: if no guess of the input fits.
        TraceError: if a network cannot be traced.
        StatisticsError: if the statistics file belongs to other networks or settings.

    Attributes:
        phase: the next phase.
        calibration_passes: the number of passes that gather statistics.
    """

    def __init__(self, sources: Sources, settings: MergeSettings, without_data: bool = False) -> None:
        self.sources, self.settings = sources, settings
        self.phase = Phase.PREPARE
        self._layout = Layout()
        self._file = open_file(sources, settings)
        self._matchings = Matchings(settings.matcher, settings.measured_similarity, len(sources.models))
        self._networks: Mapping[str, nn.Module] = {}
        self._expected: Sequence[int | None] = ()
        self._begun, self._calibrated = 0, 0  # index of the latest pass; number of complete calibration passes
        self._refined = False  # whether the refinement has received a batch
        self._gathering: Gathering | None = None
        self._matching: Matching | None = None
        self._refiner: Refiner | None = None
        self._result: MergedBackbone | None = None
        if self._file is not None and self._file.complete is not None:
            self._traced: Traced | None = prepare_from(sources, settings, self._file.complete)
            self.graphs: Graphs = self._traced.graphs
            self._file.check_operators(sources.of_models(self.graphs))
            self._enter_calibration(self._traced)
            self.calibration_passes = 0
            return
        if without_data:
            self._traced = prepare_without_data(sources, settings)
            self.graphs = self._traced.graphs
            self._enter_calibration(self._traced)
            self.calibration_passes = 0
            return
        self._traced = None
        self.graphs = trace_without_data(sources, settings)
        self.calibration_passes = max(1, len(self._turns())) if self.graphs else 1
        if self._file is not None and self.calibration_passes > 1:
            raise ConfigurationError(
                f"A statistics file needs a calibration in one pass. With statistics_memory="
                f"{settings.statistics_memory} GiB, these statistics need {self.calibration_passes} passes. Raise "
                "`statistics_memory`, or omit `statistics`."
            )

    @property
    def passes(self) -> int:
        """The number of passes over the calibration data, for statistics and refinement."""
        return self.calibration_passes + self._refines

    @property
    def _refines(self) -> bool:
        how = self.settings.refinement
        return how is not None and how.needs_data(self.sources.networks.values())

    def expect(self, samples: Sequence[int | None]) -> None:
        """Set the expected numbers of samples, to check that all ranks together see every sample once.

        Args:
            samples: the number of samples in each loader's data set; ``None`` if it is unknown.
        """
        self._expected = samples

    def begin(self, number: int, networks: Mapping[str, nn.Module]) -> None:
        """Start a pass over the calibration data, and complete the phases of earlier passes.

        Args:
            number: the index of the pass, from 0.
            networks: copies of the source networks in eval mode, on the device of the batches.
        """
        self._networks, self._begun = networks, max(self._begun, number)
        if number:
            self._end_calibration_passes(min(number, self.calibration_passes))
        if number >= self.calibration_passes and self.phase in (Phase.CALIBRATE, Phase.MERGE):
            self._merge()

    def add(self, x: Any, tasks: Iterable[str], loader: int = 0) -> None:
        """Add a batch to the pass.

        Args:
            x: an input of the networks, or one input per task; see
                :func:`~lightning_zipit._common.views.as_inputs`.
            tasks: the tasks that the batch belongs to.
            loader: the index of the dataloader of the batch.

        Raises:
            CalibrationError: if a network fails on the batch, or the activations on the first batch contain NaN or Inf.
            StatisticsError: if the batches differ from the batches of the calibration that is resumed.
            VerificationError: if no feature space passes the proof.
        """
        inputs = bound(as_inputs(x, self.sources.networks), self.sources.networks)
        if self.phase is Phase.PREPARE:
            self._prepare(inputs)
        if self.phase is Phase.REFINE:
            assert self._refiner is not None
            self._refiner.add(self._layout(inputs, self._networks), tasks)
            self._refined = True
            return
        if self._gathering is None:
            self._gathering = self._gather()
        self._gathering.add(self._layout(inputs, self._networks), loader)

    def finish(self) -> MergedBackbone:
        """End the merge.

        Returns:
            The merged networks, on the device and of the type of the sources.

        Raises:
            CalibrationError: if a pass received no batch, or activations contain NaN or Inf.
        """
        if self._begun < self.calibration_passes - 1:
            raise CalibrationError(
                f"The calibration data was read {self._begun + 1} times, but the statistics need "
                f"{self.calibration_passes} passes. Give dataloaders that can be iterated several times, or raise "
                "`statistics_memory`."
            )
        if self.phase < Phase.REFINE:
            self._merge()
        if self._refiner is not None:
            if not any(exchange(lambda: self._refined)):
                raise CalibrationError(
                    "The last pass over the calibration data received no batch. Give dataloaders that can be iterated "
                    "several times, or merge in one pass with refine=None and a larger `statistics_memory`."
                )
            assert self._result is not None
            self._result = self._result.refined(self._refiner.finish())
            self._refiner = None
        self.phase = Phase.DONE
        assert self._result is not None
        return self._result

    def match(self) -> None:
        """Complete the matching from the passes so far.

        Raises:
            CalibrationError: if no pass received a batch, or activations contain NaN or Inf.
        """
        self._end_calibration_passes(self.calibration_passes)
        if self.phase is not Phase.CALIBRATE:
            return
        assert self._traced is not None
        traced, sources = self._traced, self.sources
        with torch.inference_mode(False), torch.no_grad():
            if self._file is not None and self._file.complete is not None:
                self._match(self._restored(traced))
            elif not self._calibrated:
                self._match(self._measuring(traced, sources.networks))
            self._matchings.finish(traced.graph, list(sources.leads.values()), traced.choices)
            self._matching = self._in_step(lambda: choose(self._matchings.found, traced, sources, self.settings))
        self.graphs = self._matching.graphs
        self.phase = Phase.MERGE

    def weighted(self, weights: Sequence[float]) -> Pipeline:
        """Copy the pipeline after its matching, with other weights of the models.

        Args:
            weights: the weight of each model, in the order of the models.

        Returns:
            A pipeline of the same sources and matching, whose next phase is the merge.
        """
        self.match()
        other = copy.copy(self)
        other.sources = replace(self.sources, weights=tuple(weights))
        other.calibration_passes = other._begun = other._calibrated = 0
        other.phase, other._refined = Phase.MERGE, False
        return other

    # Transitions between the phases

    def _prepare(self, x: Inputs | None) -> None:
        """Trace and prove the sources on the first batch, once every rank has one."""
        seen = exchange(lambda: x is not None)
        if x is None or not all(seen):
            raise CalibrationError(
                "A process received no calibration batch, because the data has fewer batches than processes. Use a "
                "smaller batch size, or fewer devices."
                if any(seen)
                else "No calibration batch was received, because the dataloaders are empty. Give a few hundred samples."
            )
        self._traced = prepare(self.sources, self.settings, self._networks, x, self.graphs)
        self.graphs = self._traced.graphs
        self._enter_calibration(self._traced)

    def _enter_calibration(self, traced: Traced) -> None:
        if barriers := traced.graph.barriers:
            warn_on_rank_zero("A part of the trunk cannot be merged and stays per task. " + " ".join(barriers.values()))
        self.phase = Phase.CALIBRATE

    def _gather(self) -> Gathering:
        """Start the statistics of the feature spaces of this pass."""
        assert self._traced is not None
        calibration = self._measuring(self._traced, self._networks)
        return Gathering(calibration, self._traced, self.sources, self.settings, self._file)

    def _measuring(self, traced: Traced, networks: Mapping[str, nn.Module]) -> Calibration:
        """Create empty statistics of the feature spaces of this pass."""
        spaces = [name for family in self._families() for name in family]
        return measuring(traced, self.sources, self.settings, networks, spaces)

    def _end_calibration_passes(self, count: int) -> None:
        """Complete passes, until this number of passes has gathered statistics."""
        if self.phase is Phase.PREPARE:
            self._prepare(None)
        while self._calibrated < count:
            self._end_calibration_pass()

    def _end_calibration_pass(self) -> None:
        """Sum the statistics of a pass over all ranks, and match the feature spaces of the pass."""
        with torch.inference_mode(False), torch.no_grad():
            gathering = self._in_step(lambda: self._gathering or self._gather())
            self._match(gathering.finish(self._expected))
        self._gathering = None
        self._calibrated += 1

    def _match(self, moments: Calibration) -> None:
        """Match the feature spaces of this pass, and free their statistics."""
        assert self._traced is not None
        self._matchings.add(self._traced.graph, self._families(), moments, self._traced.choices)
        if self._file is not None:
            self._file.discard()
        for statistics in moments.statistics.values():
            statistics.free()

    def _merge(self) -> None:
        """Merge, and start the refinement."""
        self.match()
        self._in_step(self._build)
        self.phase = Phase.REFINE

    def _build(self) -> None:
        assert self._traced is not None and self._matching is not None
        sources, settings, networks = self.sources, self.settings, self._networks or self.sources.networks
        with torch.inference_mode(False), torch.no_grad():
            merged = merge(sources, self._matching, settings)
            example, notes = self._traced.example, self._traced.notes
            self._result = with_report(merged, self._matching, sources, settings, example, notes)
        if self._refines and (how := settings.refinement) is not None:
            device = next(next(iter(networks.values())).parameters()).device
            self._refiner = Refiner(
                how,
                MergedNetworks(
                    trunk=merged.trunk,
                    heads=merged.heads,
                    stems=merged.stems,
                    sources=networks,
                    graphs=self.graphs,
                    maps=merged.maps,
                    models=sources.numbers,
                    weights=sources.weights,
                    device=device,
                ),
            )

    def _restored(self, traced: Traced) -> Calibration:
        """Load the statistics from the file, instead of calibrating."""
        assert self._file is not None and self._file.complete is not None
        known = self._file.complete.statistics
        calibration = self._measuring(traced, self.sources.networks)
        calibration.restore(known)
        for unused in known.values():
            unused.free()
        return calibration

    @property
    def _graph(self) -> MergeGraph:
        return next(iter(self.graphs.values()))

    def _families(self) -> list[list[str]]:
        """Return the families of feature spaces of this pass. The last pass takes all remaining families."""
        last = self._calibrated >= self.calibration_passes - 1
        turns = self._turns()[self._calibrated : None if last else self._calibrated + 1]
        return [family for turn in turns for family in turn]

    def _turns(self) -> list[list[list[str]]]:
        limit = self.settings.statistics_memory * 2**30
        return split_families(self._graph, len(self.sources.models), limit)

    def _in_step(self, work: Callable[[], Result]) -> Result:
        """Call a function on every rank. An error on one rank is raised on all ranks."""
        done: list[Result] = []

        def do() -> None:
            done.append(work())

        exchange(do)
        return done[0]
