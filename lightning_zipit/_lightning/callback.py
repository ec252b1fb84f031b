"""Merging as a callback, on a Trainer that the user already has."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_zipit._common.ending import end_together, is_ending_together
from lightning_zipit._lightning.announce import announce
from lightning_zipit._lightning.internals import unsupported_strategy
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit._merging.widths import Width
from lightning_zipit.errors import CalibrationError
from lightning_zipit.matchers import Matcher, SimilarityKind
from lightning_zipit.settings import MergeSettings, ModelWeights, Refine, default_matcher
from lightning_zipit.task_vectors import Combination


class ZipItCallback(Callback):
    """Merges the models of a :class:`~lightning_zipit.ZipItModule` while ``trainer.predict`` runs over it.

    Any other module is left alone. The random state is as before when ``trainer.predict`` returns or fails. The report
    is printed, unless the Trainer shows neither a progress bar nor a model summary, and given to its loggers.

    Args:
        stop_at: dotted name inside the backbone of the trunk's last module; ``None`` zips everything down to the last
            layer, which stays a head per task. ``"auto"`` with ``width="auto"`` chooses it within ``flops``.
        matcher: similarity → labels; ``GreedyZip()`` by default, ``Average()`` with ``combine``.
        refine: what follows merging; see :class:`~lightning_zipit.MergeSettings`.
        merge_heads: merge the last layer too, for models that share one output space.
        verify: prove the table of axes on the first calibration batch.
        statistics_memory: GiB that the statistics may take; where they need more, the calibration data is gone through
            several times.
        statistics: a safetensors file for the statistics. One that is there stands for the calibration; else it is
            written, and an interrupted calibration goes on from what it had gathered.
        similarity: how alike features are; see :class:`~lightning_zipit.MergeSettings`.
        width: how many features the merged network has, as a ratio to one source's: above 1 it is more accurate and
            costs more, below 1 the opposite; for all spaces, or by the name of the space. ``"auto"`` chooses them
            within ``flops``. A single model can be folded with a width below 1.
        flops: for ``width="auto"``, what the merged network may cost, as a ratio to one source's FLOPs.
        combine: how changes to the ``base`` of the :class:`~lightning_zipit.ZipItModule` are combined, instead of
            averaging weights: ``TaskArithmetic()``, ``Ties()`` or ``Dare()``. Features are then matched by number.
        positions: how many positions of each image or sequence the statistics are taken from, at random; ``None`` for
            all.
        weights: how much each model counts where features become one, by task or in the order of the models; all the
            same by default.
        start_at: dotted name inside the backbone of the trunk's first module: all that does not depend on it stays a
            stem per task. Inputs and first layers may then differ from model to model. ``None`` zips from the input on.

    Raises:
        ConfigurationError: if an argument is not one of those there are.
    """

    def __init__(
        self,
        stop_at: str | None = None,
        matcher: Matcher | None = None,
        refine: Refine | None = "least_squares",
        merge_heads: bool = False,
        verify: bool = True,
        statistics_memory: float = 8.0,
        statistics: str | Path | None = None,
        similarity: SimilarityKind = "correlation",
        width: Width = 1.0,
        flops: float | None = None,
        combine: Combination | None = None,
        positions: int | None = None,
        weights: ModelWeights | None = None,
        start_at: str | None = None,
    ) -> None:
        self.settings = MergeSettings(
            stop_at,
            matcher or default_matcher(combine),
            refine,
            merge_heads,
            verify,
            statistics_memory,
            statistics,
            similarity,
            width,
            flops,
            combine,
            positions,
            weights,
            start_at,
        )
        self.announces = True  # the report, in the end
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" or not isinstance(pl_module, ZipItModule):
            return
        problem = unsupported_strategy(trainer)
        pl_module.prepare(self.settings, [problem] if problem else [])
        self._undo.enter_context(isolate_rng())
        self._undo.callback(pl_module.release)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, ZipItModule):
            pl_module.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        merging = stage == "predict" and isinstance(pl_module, ZipItModule)
        if merging and pl_module.needs_no_data:  # then Lightning skips its loop, with on_predict_end
            self.on_predict_end(trainer, pl_module)
        self._undo.close()
        if merging and not pl_module.is_merged:
            raise CalibrationError(
                "No calibration batch was seen: pass `dataloaders` or `datamodule` to ZipItModule, and let "
                "limit_predict_batches be above 0. Statistics that were gathered before do without data with "
                "refine=None alone."
            )
        if self.announces and stage == "predict" and isinstance(pl_module, ZipItModule):  # the progress bar is closed
            announce(trainer, pl_module.merged.report)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo.close()
        if isinstance(pl_module, ZipItModule) and not is_ending_together():
            end_together(exception)
