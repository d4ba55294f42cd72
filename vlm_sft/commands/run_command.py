"""Run a command: exit codes, one-line errors, Ctrl-C, closed pipes and full disks."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from vlm_sft.commands.registry import exit_command, raise_on_ctrl_c
from vlm_sft.errors import UserError, code_of, error_line
from vlm_sft.utils.libraries import missing_extra
from vlm_sft.utils.streams import accept_any_text


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit with its code.

    Exit codes: 2 after a user error or a file that cannot be read or written (one line on stderr),
    130 after Ctrl-C, 141 if the reader of stdout closed the pipe. Any other exception is a bug and
    keeps its traceback.

    Args:
        main: Takes the arguments and returns the exit code.
        argv: The arguments; None for those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    raise_on_ctrl_c()
    accept_any_text()
    try:
        code = _main_and_flush(main, arguments)
    except UserError as error:
        _print_last(error_line(error))
        code = 2
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        _print_last(error_line(missing))
        code = 2
    except BrokenPipeError:
        _discard(sys.stdout)
        code = 141
    except OSError as error:
        place = error.filename or "input/output"
        reason = error.strerror or error
        sentence = f"{place}: {reason}".replace("\n", " ")
        _print_last(error_line(UserError(sentence, code=code_of(error).name)))
        code = 2
    except KeyboardInterrupt:
        _print_last("stopped by Ctrl-C; files already saved, if any, are complete")
        code = 130
    exit_command(code)


def _main_and_flush(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run `main` and flush stdout, so that a closed pipe (`| head`) is noticed here.

    At interpreter exit it would be an error message of Python.

    Raises:
        UserError: The current directory was deleted; libraries would fail in obscure ways.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the current directory was deleted; change to one that exists and run this again",
            code="data_file_missing",
        ) from None
    try:
        return main(arguments)
    finally:
        if isinstance(sys.exception(), SystemExit | None):
            sys.stdout.flush()


def _print_last(line: str) -> None:
    """Print the last line of a command to stderr; if that fails, the exit code stays the same."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: IO[str]) -> None:
    """Redirect a stream to the null device, or Python would report its buffered text at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
