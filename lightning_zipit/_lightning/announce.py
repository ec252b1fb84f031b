"""Shows the report of a finished merge on the terminal and in loggers."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import Logger

from lightning_zipit._report.report import MergeReport


def is_talkative(trainer: Trainer) -> bool:
    """Whether a Trainer prints: it has a progress bar or a model summary."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return trainer.progress_bar_callback is not None or any(isinstance(each, ModelSummary) for each in callbacks)


def announce(trainer: Trainer, report: MergeReport | None) -> None:
    """Print a report, unless the Trainer is silent, and log it; only on rank zero."""
    if report is None or not trainer.is_global_zero:
        return
    if is_talkative(trainer):
        report.show()
    for logger in trainer.loggers:
        log_report(logger, report, trainer.global_step)


def log_report(logger: Logger, report: MergeReport, step: int = 0) -> None:
    """Log a report: numbers as ``zipit/…`` metrics, and the spaces as a table or as text.

    Loggers with ``log_table`` (Weights & Biases) get a table. Loggers whose experiment has ``add_text`` (TensorBoard)
    get text. Other loggers get only numbers.

    Args:
        logger: one of Lightning's loggers, or of the same interface.
        report: what to log.
        step: the step to log it at.
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
