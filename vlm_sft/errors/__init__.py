"""Errors a user can mend, and how every command reports them: one sentence, exit code 2."""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any, ClassVar, Final

from vlm_sft.commands.registry import raise_on_ctrl_c
from vlm_sft.errors.codes import CODES, ErrorCode
from vlm_sft.utils.escape import escape_control, escape_control_line, shortened
from vlm_sft.utils.streams import accept_any_text


class UserError(ValueError):
    """Wrong input, in one sentence: what, where, what was expected, what to do.

    A message quotes what comes from outside, so the constructor escapes it and bounds its
    length; a raise site need not.

    Args:
        message: The sentence.
        code: The fault's name in `error_codes`; None for the one that its class has.

    Attributes:
        code: The fault as `error_codes` describes it.
    """

    default_code: ClassVar[str] = "wrong_input"
    """The fault's name where a raise site gives none."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.code = CODES[code or self.default_code]
        super().__init__(shortened(escape_control(message)))

    @property
    def reason(self) -> str:
        """The fault's name, as ledgers have it."""
        return self.code.name


class ConfigError(UserError):
    """A wrong value or key in a YAML file or a command-line override."""

    default_code = "configuration"


class TemplateError(UserError):
    """A chat template is faulty, or does not fit the tokenizer or the turns."""

    default_code = "template"


class RecordError(UserError):
    """One record of the user's data is wrong.

    Args:
        reason: The fault's name in `error_codes`, e.g. `image_missing`, `empty_answer`.
        message: The sentence, without the record's place.
        record_id: The record's own id, or a made-up `line-N`.
        where: `file:line` (lines from 1) or `file[index]`.
    """

    def __init__(self, reason: str, message: str, *, record_id: str, where: str) -> None:
        self.message = escape_control_line(message)
        self.record_id = record_id
        self.where = where
        shown = shortened(record_id, 200)
        super().__init__(
            escape_control_line(f"{where}: record {shown!r}: {self.message}"), code=reason
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # By keyword: pickle would otherwise call the class with the finished sentence alone.
        named = {"record_id": self.record_id, "where": self.where}
        return partial(type(self), **named), (self.reason, self.message)


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""

    default_code = "checkpoint_unusable"


class ImageError(UserError):
    """An image cannot be used; `reason` is the fault's name in `error_codes`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(escape_control_line(message), code=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


_OF_ERRNO: Final[Mapping[int | None, str]] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.EROFS: "not_permitted",
}


def code_of(error: OSError) -> ErrorCode:
    """The code of what the system refused."""
    return CODES[_OF_ERRNO.get(error.errno, "disk_error")]


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused to write for want of room."""
    return isinstance(error, OSError) and code_of(error).name == "disk_full"


def error_line(error: UserError) -> str:
    """Return what commands print: `error VS311: data.json[3]: record 'r1': ...`.

    Further lines of a message are indented, so that none can pass for a line of the command's own.
    """
    return f"error {error.code}: {_whose()}{error}".replace("\n", "\n    ")


def _whose() -> str:
    """Which of several processes speaks, as a launcher numbers them; nothing for a single one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return "" if count == "1" else f"rank {os.environ.get('RANK', '?')} of {count}: "


def as_text(text: str, name: str) -> str:
    """Return text from an argument or from stdin as Unicode text.

    Python keeps bytes that are not in the locale's encoding as half surrogate pairs; where they
    are UTF-8 they are decoded.

    Args:
        text: As Python has it.
        name: What it is, for the message.

    Raises:
        UserError: The bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(
            f"{name}: {text[:60]!a} is not UTF-8 text; give it in UTF-8", code="bad_text"
        ) from None


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit with its code; user errors become one line and code 2.

    Ctrl-C exits with 130 after a line saying so; a full disk or a file that cannot be written is
    one line too. Anything else is a bug and keeps its traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    raise_on_ctrl_c()
    accept_any_text()
    try:
        code = _main_and_flush(main, arguments)
    except UserError as error:
        _print_last(error_line(error))
        code = 2
    except BrokenPipeError:
        _forget(sys.stdout)
        code = 141
    except OSError as error:
        place = escape_control_line(str(error.filename or "input/output"))
        reason = escape_control_line(str(error.strerror or error))
        _print_last(f"error {code_of(error)}: {_whose()}{place}: {reason}")
        code = 2
    except KeyboardInterrupt:
        _print_last("stopped by Ctrl-C; files already saved, if any, are complete")
        code = 130
    sys.exit(code)


def _main_and_flush(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run `main`; a reader that left (`| head`) is noticed here, not at interpreter exit."""
    _require_current_directory()
    try:
        return main(arguments)
    finally:
        if isinstance(sys.exception(), SystemExit | None):
            sys.stdout.flush()


def _require_current_directory() -> None:
    """Refuse to run in a directory that was deleted, where libraries fail in ways of their own.

    Raises:
        UserError: There is no current directory.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the current directory was deleted; change to one that exists and run this again",
            code="data_file_missing",
        ) from None


def _print_last(line: str) -> None:
    """Print a command's last line to stderr; the exit code is kept where it cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _forget(sys.stderr)


def _forget(stream: IO[str]) -> None:
    """Send what is still buffered nowhere; Python would complain about it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
