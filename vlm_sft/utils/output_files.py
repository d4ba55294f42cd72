"""Decide whether a command may write an output file, and write results that carry no mark.

JSON, HTML and PNG files carry a mark of the command that wrote them: `MADE_BY` as the first key, a
generator tag, a `Software` text. A file without the mark is replaced only with `--overwrite`.
"""

import mimetypes
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import is_stream, write_bytes
from vlm_sft.utils.filesystem import require_writable
from vlm_sft.utils.ownership import (
    MADE_BY,
    MARKER,
    made_by,
    refuse_in_checkpoint,
    refuse_input,
)

PNG_SOFTWARE: Final = "vlm_sft"
"""Value of a PNG file's `Software` text that marks it as written by this toolkit."""

_HEAD_BYTES: Final = 4096
_IMAGE_SIGNATURES: Final = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0",
)  # fmt: skip
"""First bytes of JPEG, PNG, GIF, WebP, BMP, TIFF, and of HEIF and AVIF."""


def html_mark(command: str) -> str:
    """Return the tag that marks an HTML page as written by `command`; it goes into `<head>`."""
    return f'<meta name="generator" content="{made_by(command)}">'


def require_output_file(
    path: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    image_roots: Iterable[str | Path] = (),
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Check that a command may write its result to `path`, before any work is done for it.

    An existing file is replaced only if it has the mark of `command` (`has_mark`) or the user
    passed `--overwrite`. The directory is tested by creating a file in it.

    Args:
        path: The output file. Of a symbolic link, the target is written.
        inputs: Files and whole directories that the command reads. None of them is replaced, nor
            any file in such a directory, even with `overwrite`.
        image_roots: Directories that it reads images from; no image in them is replaced.
        command: Name of the command in marks; "" accepts files of any command.
        overwrite: Whether the user allowed replacing a file of any origin.

    Returns:
        The path to write.

    Raises:
        UserError: The file must not be replaced, is a directory, is inside a checkpoint, or is an
            input.
        OSError: The directory does not accept new files.
    """
    path, inputs = Path(path), list(inputs)
    refuse_input(path, inputs)
    if is_stream(path):
        return path  # a pipe or terminal such as /dev/stdout has no content to lose
    refuse_in_checkpoint(path)
    if path.is_dir():
        raise UserError(
            f"{path}: is a directory, but this command writes a file; choose another name",
            code="not_ours",
        )
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists():
        _require_replaceable(path, target, inputs, image_roots, command, overwrite)
    require_writable(target.parent)
    return target


def write_result(
    path: str | Path,
    data: bytes,
    *,
    inputs: Iterable[str | Path] = (),
    image_roots: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Write a file of a format without room for a mark to a path that the user gave.

    An existing file of the same content is left as it is; another one is replaced only with
    `overwrite`.

    Raises:
        UserError: The file has other content, is a directory, an input, or an image in one of
            `image_roots`.
    """
    path = Path(path)
    refuse_input(path, inputs)
    same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    require_output_file(path, inputs=inputs, image_roots=image_roots, overwrite=overwrite or same)
    if not same:
        write_bytes(path, data)


def has_mark(path: Path, command: str = "") -> bool:
    """Return whether a JSON, HTML or PNG file has the mark of `command` in its first 4 KiB.

    "" stands for any command of this toolkit.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    mark = made_by(command).strip().encode()
    if head.startswith(b"\x89PNG"):
        return b"Software\0" + mark in head
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return b'<meta name="generator" content="' + mark in head
    first_key = rb'\s*\{\s*"' + MADE_BY.encode() + rb'"\s*:\s*"' + re.escape(mark)
    return re.match(first_key, head) is not None


def refuse_image(path: Path, image_roots: Iterable[str | Path]) -> None:
    """Refuse to replace an image in a directory from which the command reads images.

    Raises:
        UserError: `path` is an image by name or content, and is in such a directory.
    """
    if path.is_file() and (_named_as_image(path) or _begins_as_image(path)):
        _refuse_within(path, image_roots)


def _require_replaceable(
    path: Path,
    target: Path,
    inputs: Iterable[str | Path],
    image_roots: Iterable[str | Path],
    command: str,
    overwrite: bool,
) -> None:
    if target.name == MARKER:
        raise UserError(
            f"{path}: marks a directory as an output of vlm_sft; choose another name",
            code="not_ours",
        )
    if has_mark(target, command):
        return
    _refuse_within(path, inputs)
    refuse_image(path, image_roots)
    if not overwrite and target.stat().st_size > 0:
        raise UserError(
            f"{path}: the file exists and was not written by {made_by(command).strip()}; nothing "
            "was changed. Choose another name, or replace it with --overwrite",
            code="not_ours",
        )


def _named_as_image(path: Path) -> bool:
    return str(mimetypes.guess_type(path.name)[0]).startswith("image/")


def _begins_as_image(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).startswith(_IMAGE_SIGNATURES)


def _refuse_within(path: Path, folders: Iterable[str | Path]) -> None:
    if folder := next((source for source in folders if _is_inside(path, source)), None):
        raise UserError(
            f"{path}: is inside {folder}, which this command reads, and would be replaced by its "
            "output; choose another output",
            code="not_ours",
        )


def _is_inside(path: Path, folder: str | Path) -> bool:
    """Return whether `path` or the target of its link is below `folder`."""
    named = Path(os.path.realpath(path.parent), path.name)
    above = {*named.parents, *Path(os.path.realpath(path)).parents}
    return Path(os.path.realpath(folder)) in above
