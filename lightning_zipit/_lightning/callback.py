"""Callback that merges models during ``trainer.predict``."""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import Unpack

from lightning_zipit._common.ending import end_together, is_ending_together
from lightning_zipit._lightning.announce import announce
from lightning_zipit._lightning.internals import unsupported_strategy
from lightning_zipit._lightning.module import ZipItModule
from lightning_zipit.errors import CalibrationError
from lightning_zipit.settings import MergeOptions, MergeSettings, with_options


@with_options
class ZipItCallback(Callback):
    """Merges the models of a :class:`~lightning_zipit.ZipItModule` during ``trainer.predict``.

    The callback ignores any other module. It restores the random state when ``trainer.predict`` returns or fails. It
    prints the report if the Trainer has a progress bar or a model summary, and passes it to the Trainer's loggers.

    Args:
        options: every option of :class:`~lightning_zipit.MergeSettings`, as a keyword argument.

    Raises:
        ConfigurationError: with every problem, if options are not allowed, or not allowed together.
    """

    def __init__(self, **options: Unpack[MergeOptions]) -> None:
        self.settings = MergeSettings.of(**options)
        self._announces = True  # whether the report is printed and logged
        self._undo = ExitStack()

    @classmethod
    def silent(cls, settings: MergeSettings) -> ZipItCallback:
        """Make a callback with given settings that neither prints nor logs the report."""
        callback = cls()
        callback.settings, callback._announces = settings, False
        return callback

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
        if merging and pl_module.needs_no_data:  # without loaders, Lightning skips its loop and on_predict_end
            self.on_predict_end(trainer, pl_module)
        self._undo.close()
        if merging and not pl_module.is_merged:
            raise CalibrationError(
                "No calibration batch was received. Pass `dataloaders` or `datamodule` to ZipItModule, and set "
                "limit_predict_batches above 0. Saved statistics make the data unnecessary only if refine=None."
            )
        if self._announces and stage == "predict" and isinstance(pl_module, ZipItModule):  # the progress bar is closed
            announce(trainer, pl_module.merged.report)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo.close()
        if isinstance(pl_module, ZipItModule) and not is_ending_together():
            end_together(exception)
