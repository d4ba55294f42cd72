"""Errors a user can mend, and how every command reports them: one sentence, exit code 2."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


class UserError(ValueError):
    """Wrong input, told in one sentence: what, where, what was expected, what to do."""


class ConfigError(UserError):
    """A wrong value or key in a YAML file or a command-line override."""


class RecordError(UserError):
    """One record of the user's data is wrong.

    Args:
        reason: Short code for the ledger, e.g. `image_missing`, `empty_answer`.
        message: The sentence, without the record's place.
        record_id: The record's own id, or a made-up `line-N`.
        where: `file:line` (lines from 1) or `file[index]`.
    """

    def __init__(self, reason: str, message: str, *, record_id: str, where: str) -> None:
        self.reason = reason
        self.message = message
        self.record_id = record_id
        self.where = where
        super().__init__(f"{where}: record {record_id!r}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By keyword: pickle would otherwise call the class with the finished sentence alone.
        named = {"record_id": self.record_id, "where": self.where}
        return partial(type(self), **named), (self.reason, self.message)


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""


class ImageError(UserError):
    """A picture cannot be used; carries the ledger's short code in `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit with its code; user errors become one line and code 2.

    Ctrl-C exits with 130 after a line saying so; a full disk or a file that cannot be written is
    one line too. Anything else is a bug and keeps its traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 141
    except OSError as error:
        place = error.filename or "input/output"
        print(f"error: {place}: {error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was saved is complete", file=sys.stderr)
        code = 130
    sys.exit(code)
