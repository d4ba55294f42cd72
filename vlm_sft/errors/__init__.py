"""Errors that a user can fix: one sentence each, with a code of `vlm_sft.errors.codes`."""

import errno
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final

from vlm_sft.errors.codes import CODES, ErrorCode
from vlm_sft.utils.escape import escape_control, escape_control_line, shortened


class UserError(ValueError):
    """Wrong input: one sentence that says what, where, what was expected, and what to do.

    Every error that a user can fix is a subclass. The message may quote untrusted text: the
    constructor escapes control characters and limits the length.

    Args:
        message: The sentence.
        code: Name of the error in `vlm_sft.errors.codes`; None for the default of the class.

    Attributes:
        code: The error's entry in `vlm_sft.errors.codes`.
    """

    default_code: ClassVar[str] = "wrong_input"
    """Name of the error where the constructor is given none."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.code = CODES[code or self.default_code]
        super().__init__(shortened(escape_control(message)))

    @property
    def reason(self) -> str:
        """Name of the error, as in the `reason` field of `ledger.jsonl`."""
        return self.code.name


class ConfigError(UserError):
    """A configuration file or a command-line override has a wrong key or value."""

    default_code = "configuration"


class TemplateError(UserError):
    """A chat template is invalid, or does not fit the tokenizer or the conversation."""

    default_code = "template"


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""

    default_code = "checkpoint_unusable"


class RecordError(UserError):
    """One record of the user's data cannot be used.

    Args:
        reason: Name of the error in `vlm_sft.errors.codes`, e.g. `empty_answer`.
        message: The sentence, without the location of the record.
        record_id: The record's own id, or `line-N` for a record without one.
        where: Location of the record: `file:line` (lines count from 1) or `file[index]`.
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
        # Pickle would call the class with the complete sentence as its only argument.
        named = {"record_id": self.record_id, "where": self.where}
        return partial(type(self), **named), (self.reason, self.message)


class ImageError(UserError):
    """An image cannot be used.

    Args:
        reason: Name of the error in `vlm_sft.errors.codes`, e.g. `image_missing`.
        message: The sentence.
    """

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
    """Return the error code for an `OSError`; `disk_error` if its errno has none of its own."""
    return CODES[_OF_ERRNO.get(error.errno, "disk_error")]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk or the user's quota is full."""
    return isinstance(error, OSError) and code_of(error).name == "disk_full"


def error_line(error: UserError) -> str:
    """Return the line that commands print, e.g. `error VS311: data.json[3]: record 'r1': ...`.

    In distributed training the rank precedes the message. Further lines of a message are
    indented, so that text from the data cannot imitate a line of the command itself.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    rank = "" if world_size == "1" else f"rank {os.environ.get('RANK', '?')} of {world_size}: "
    return f"error {error.code}: {rank}{error}".replace("\n", "\n    ")


def as_text(text: str, name: str) -> str:
    """Return text from an argument or from stdin as valid Unicode.

    Python represents bytes that are not valid in the locale's encoding as lone surrogates. If
    those bytes are UTF-8, they are decoded.

    Args:
        text: The text as Python received it.
        name: What the text is, for the message.

    Raises:
        UserError: The bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(
            f"{name}: {text[:60]!a} is not UTF-8 text; give it in UTF-8", code="bad_text"
        ) from None
