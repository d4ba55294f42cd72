"""Decide which files and directories on disk this toolkit may replace or delete.

The rule: nothing that the toolkit did not write is replaced or deleted, and no output is one of the
command's own inputs. A directory is ours if it carries the marker file that `own_directory` writes;
a file is ours if it carries the mark of its format (`MADE_BY` in JSON, a generator tag in HTML).
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vlm_sft.atomic import write_json
from vlm_sft.errors import UserError

MARKER: Final = ".vlm_sft.json"
"""Name of the file that marks a directory as an output of this toolkit."""

MADE_BY: Final = "made_by"
"""Key of a JSON output whose value begins with `vlm_sft`; see `has_mark`."""

SYSTEM_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".nfs"})
"""Names that file managers and file systems create in any directory; they belong to nobody."""

_HTML_MARK: Final = b'<meta name="generator" content="vlm_sft'
_HEAD_BYTES: Final = 4096


def is_system_file(name: str) -> bool:
    """Return whether `name` is a file that a file manager or file system leaves in a directory."""
    return name in SYSTEM_FILES or name.startswith(("._", ".nfs"))


def html_mark(command: str) -> str:
    """Return the tag that marks an HTML page as written by `command`; it goes into `<head>`."""
    return f'<meta name="generator" content="vlm_sft {command}">'


def own_directory(path: str | Path, kind: str, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Create and mark an output directory, or accept one that was marked before.

    Args:
        path: The output directory. Missing parents are created.
        kind: What the directory holds, in one or two words, such as "training run".
        inputs: Files and directories that the command reads; none of them may be `path`.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: The directory holds files and no marker, carries the marker of another kind, is a
            file, or is one of the inputs.
    """
    path = Path(path)
    refuse_input(path, inputs)
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path}: is a file, but this command writes a directory; choose another name",
            code="not_ours",
        )
    found = read_marker(path)
    if found is None:
        if entries := foreign_entries(path):
            raise UserError(
                f"{path}: the directory is not empty ({_examples(entries)}) and was not created by "
                f"vlm_sft as a {kind}; nothing was changed. Choose a new or empty directory",
                code="not_ours",
            )
        write_json(path / MARKER, {MADE_BY: "vlm_sft", "kind": kind})
    elif found.get("kind") != kind:
        raise UserError(
            f"{path}: the directory holds a {found.get('kind')}, but this command writes a {kind}; "
            "nothing was changed. Choose a new or empty directory",
            code="not_ours",
        )
    return path


def read_marker(path: Path) -> dict[str, Any] | None:
    """Return the content of a directory's marker file; None if it has none that is ours."""
    try:
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and str(found.get(MADE_BY, "")).startswith("vlm_sft")
    return found if ours else None


def foreign_entries(path: Path, known: Iterable[str] = ()) -> list[str]:
    """Return the names in a directory that are neither in `known` nor left by a file manager.

    A directory that does not exist has none.
    """
    known = {MARKER, *known}
    try:
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    return [name for name in names if name not in known and not is_system_file(name)]


def require_output_file(
    path: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> Path:
    """Check that a command may write its result to `path`, before any work is done for it.

    An existing file is replaced only if it carries the mark of this toolkit (`has_mark`) or the
    user said `--overwrite`. The directory must accept a new file, which is tried.

    Args:
        path: The output file.
        inputs: Files that the command reads; none of them is replaced, even with `overwrite`.
        overwrite: Whether the user allowed to replace a file of any origin.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: The file must not be replaced, is a directory or device, or is an input.
        OSError: The directory does not accept new files.
    """
    path = Path(path)
    refuse_input(path, inputs)
    if path.is_dir():
        raise UserError(
            f"{path}: is a directory, but this command writes a file; choose another name",
            code="not_ours",
        )
    if os.path.lexists(path) and path.exists() and not path.is_file():
        return path  # a pipe or a terminal such as /dev/stdout holds nothing that could be lost
    if path.exists() and not overwrite and path.stat().st_size > 0 and not has_mark(path):
        raise UserError(
            f"{path}: the file exists and was not written by vlm_sft; nothing was changed. Choose "
            "another name, or replace it with --overwrite",
            code="not_ours",
        )
    require_writable(path.parent)
    return path


def require_writable(directory: Path) -> None:
    """Create and delete an empty file in `directory`, or in the nearest parent that exists.

    Raises:
        OSError: The directory does not accept new files; the error names it.
    """
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".vlm_sft."):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def has_mark(path: Path) -> bool:
    """Return whether a JSON or HTML file says in its first 4 KiB that this toolkit wrote it."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return f'"{MADE_BY}": "vlm_sft'.encode() in head or _HTML_MARK in head


def refuse_input(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is one of the command's inputs, under whatever name.

    Raises:
        UserError: They are the same file or directory.
    """
    for source in inputs:
        same = os.path.realpath(output) == os.path.realpath(source)
        if not same and os.path.exists(output) and os.path.exists(source):
            same = os.path.samefile(output, source)
        if same:
            raise UserError(
                f"{output}: is read by this command and would be replaced by its output; choose "
                "another output",
                code="not_ours",
            )


def _examples(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
