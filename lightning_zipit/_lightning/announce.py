"""Output of the merge report to the terminal and to the loggers of a Trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import Logger

from lightning_zipit._report.report import MergeReport


def is_talkative(trainer: Trainer) -> bool:
    """Whether a Trainer has a progress bar or a model summary."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return trainer.progress_bar_callback is not None or any(isinstance(each, ModelSummary) for each in callbacks)


def announce(trainer: Trainer, report: MergeReport | None) -> None:
    """Print a report, unless the Trainer is silent, and log it. Only rank 0 does this."""
    if report is None or not trainer.is_global_zero:
        return
    if is_talkative(trainer):
        report.show()
    for logger in trainer.loggers:
        log_report(logger, report, trainer.global_step)


def log_report(logger: Logger, report: MergeReport, step: int = 0) -> None:
    """Log a report: its numbers as ``zipit/…`` metrics, and its feature spaces as a table or a text.

    The table goes to loggers with ``log_table`` (Weights & Biases). The text goes to loggers whose experiment has
    ``add_text`` (TensorBoard).

    Args:
        logger: a Lightning logger, or an object with the same interface.
        report: the report.
        step: the step at which it is logged.
    """
    logger.log_metrics({f"zipit/{name}": value for name, value in report.metrics().items()}, step)
    rows = report.to_rows()
    add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
    if hasattr(logger, "log_table"):
        columns = [*rows[0]] if rows else []
        logger.log_table("zipit/report", columns=columns, data=[[*row.values()] for row in rows], step=step)
    elif add_text is not None:
        indented = "".join(f"    {line}\n" for line in str(report).splitlines())  # a code block in Markdown
        add_text("zipit/report", indented, step)
