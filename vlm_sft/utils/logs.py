"""Logging of the commands: plain lines on stderr, from rank 0.

Modules log through `logging.getLogger(__name__)`. Commands call `configure_logging` once; whoever
imports the package as a library configures logging as usual.
"""

import logging
import os
from contextlib import suppress
from typing import Any, Final

from vlm_sft.utils.console import echo

PACKAGE: Final = "vlm_sft"

ALL_RANKS: Final = {"all_ranks": True}
"""`logger.info(text, extra=ALL_RANKS)` logs a line on every rank, not on rank 0 alone."""


def configure_logging(level: int = logging.INFO) -> None:
    """Send the package's log records to stderr; calling it again changes only the level."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(level)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
        # Libraries that call `logging.basicConfig` would print every line a second time.
        logger.propagate = False


def reset_logging() -> None:
    """Undo `configure_logging`."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    for handler in list(logger.handlers):
        if isinstance(handler, StderrHandler):
            logger.removeHandler(handler)


class StderrHandler(logging.Handler):
    """Print records on stderr with control characters escaped.

    Ranks other than 0 print errors and records marked `ALL_RANKS` only, with their rank in front.
    """

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(is_for_this_rank)

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a terminal that is gone or a full disk does not end a run."""
        prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
        with suppress(OSError):
            # `sys.stderr` is looked up now: a progress bar replaces it to stay below the lines.
            echo(f"{rank_prefix()}{prefix}{record.getMessage()}")


def is_for_this_rank(record: logging.LogRecord) -> bool:
    """Return whether this rank prints a record."""
    if os.environ.get("RANK", "0") == "0" or record.levelno >= logging.ERROR:
        return True
    marked: Any = getattr(record, "all_ranks", False)
    return bool(marked)


def rank_prefix() -> str:
    """Return `rank N of M: ` on ranks other than 0, else nothing."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank} of {os.environ.get('WORLD_SIZE', '?')}: "
