"""Decide which files and directories on disk this toolkit may replace or delete.

The rule: nothing that the toolkit did not write is replaced or deleted, and no output is one of the
command's own inputs. A directory is ours if it carries the marker file that `own_directory` writes;
a file is ours if it carries the mark of its format (`MADE_BY` in JSON, a generator tag in HTML).
Files of formats without room for a mark (a JSON list, JSON lines, text) are ours if they lie in a
directory of ours and have the content that its marker file records: see `OwnedFiles`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.atomic import atomic_open, write_bytes, write_json
from vlm_sft.errors import UserError
from vlm_sft.reading import read_text

MARKER: Final = ".vlm_sft.json"
"""Name of the file that marks a directory as an output of this toolkit."""

MADE_BY: Final = "made_by"
"""Key of a JSON output whose value begins with `vlm_sft`; see `has_mark`."""

SYSTEM_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".nfs"})
"""Names that file managers and file systems create in any directory; they belong to nobody."""

_HTML_MARK: Final = b'<meta name="generator" content="vlm_sft'
_PNG_MARK: Final = b"Software\0vlm_sft"
_HEAD_BYTES: Final = 4096

PNG_SOFTWARE: Final = "vlm_sft"
"""Value of a PNG file's `Software` text that marks it as written by this toolkit."""


def is_system_file(name: str) -> bool:
    """Return whether `name` is a file that a file manager or file system leaves in a directory."""
    return name in SYSTEM_FILES or name.startswith(("._", ".nfs"))


def html_mark(command: str) -> str:
    """Return the tag that marks an HTML page as written by `command`; it goes into `<head>`."""
    return f'<meta name="generator" content="vlm_sft {command}">'


def own_directory(
    path: str | Path, kind: str, *, inputs: Iterable[str | Path] = (), adopt: bool = False
) -> Path:
    """Create and mark an output directory, or accept one that was marked before.

    Args:
        path: The output directory. Missing parents are created.
        kind: What the directory holds, in one or two words, such as "training run".
        inputs: Files and directories that the command reads; none of them may be `path`.
        adopt: Whether to mark a directory that holds files already. The caller has recognized it
            as the output of an older version, or the user said `--overwrite`.

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
        if not adopt and (entries := foreign_entries(path)):
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
        found = json.loads(read_text(path / MARKER, limit=2**20))
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
    """Return whether a JSON, HTML or PNG file says in its first 4 KiB that we wrote it."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    marks = (f'"{MADE_BY}": "vlm_sft'.encode(), _HTML_MARK, _PNG_MARK)
    return any(mark in head for mark in marks)


class OwnedFiles:
    """The files of one marked directory, each known by the SHA-256 of its content.

    The marker file records the digest of every file that is written through `open`. A file that
    exists and has another digest was edited or put there by somebody else, and is not replaced.

    Args:
        directory: Marked by `own_directory`. Without a marker nothing is recorded.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def require_unchanged(
        self, names: Iterable[str], *, inputs: Iterable[str | Path] = (), overwrite: bool = False
    ) -> None:
        """Check that the files that a command is about to write may be replaced.

        Args:
            names: Paths below the directory, with `/`.
            inputs: Files that the command reads; none of them is replaced, even with `overwrite`.
            overwrite: Whether the user allowed to replace files that were changed.

        Raises:
            UserError: A file was not written here, was changed since, or is an input.
        """
        names, inputs = list(names), list(inputs)
        for name in names:
            refuse_input(self.directory / name, inputs)
        changed = [] if overwrite else [name for name in names if not self.is_ours(name)]
        if changed:
            raise UserError(
                f"{self.directory / changed[0]}: the file was changed after vlm_sft wrote it, or "
                f"was not written by vlm_sft{_others(changed)}; nothing was replaced. Choose "
                "another output directory, or replace it with --overwrite",
                code="not_ours",
            )

    def accept(self, names: Iterable[str]) -> None:
        """Record the present content of files, which are then replaced like our own."""
        digests = {
            name: [_digest(self.directory / name)]
            for name in names
            if (self.directory / name).is_file()
        }
        self._record(digests)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a binary file that takes the place of `name` when the block ends without error.

        The new digest is recorded next to the old one before the file is renamed, so that the file
        is known as ours whenever the process is killed.
        """
        with atomic_open(self.directory / name) as file:
            yield file
            file.flush()
            digests = [*self._digests(name)[-1:], _digest_of_open(file.fileno())]
            self._record({name: list(dict.fromkeys(digests))})

    def is_ours(self, name: str) -> bool:
        """Return whether a file is missing, empty, or as it was written here."""
        path = self.directory / name
        if not os.path.lexists(path):
            return True
        if not path.is_file():
            return False
        return path.stat().st_size == 0 or _digest(path) in self._digests(name)

    def _digests(self, name: str) -> list[str]:
        files = (read_marker(self.directory) or {}).get("files")
        digests = files.get(name) if isinstance(files, dict) else None
        return digests if isinstance(digests, list) else []

    def _record(self, digests: dict[str, list[str]]) -> None:
        marker = read_marker(self.directory)
        if marker is None or not digests:
            return
        files = marker.get("files")
        marker["files"] = (files if isinstance(files, dict) else {}) | digests
        write_json(self.directory / MARKER, marker)


def own_output(
    path: str | Path,
    kind: str,
    names: Iterable[str],
    *,
    inputs: Iterable[str | Path] = (),
    adopt: bool = False,
    overwrite: bool = False,
) -> OwnedFiles:
    """Create or accept an output directory in which a command will write the files `names`.

    Args:
        path: The directory.
        kind: As in `own_directory`.
        names: Files to be written, as paths below the directory.
        inputs: Files and directories that the command reads.
        adopt: Whether the caller recognized an unmarked directory as one of an older version; the
            present content of `names` is then taken for ours.
        overwrite: Whether the user allowed to replace files of any origin except inputs.

    Raises:
        UserError: As `own_directory` and `OwnedFiles.require_unchanged`; nothing was changed.
    """
    path, names, inputs = Path(path), list(names), list(inputs)
    for name in names:
        refuse_input(path / name, inputs)
    own_directory(path, kind, inputs=inputs, adopt=adopt or overwrite)
    files = OwnedFiles(path)
    if adopt:
        files.accept(names)
    files.require_unchanged(names, overwrite=overwrite)
    return files


@contextmanager
def owned_open(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the place of `path` when the block ends without error.

    Its digest is recorded in the nearest marked directory at most three levels above it, if any.
    """
    marked = next((above for above in [*path.parents][:3] if (above / MARKER).is_file()), None)
    opened = (
        atomic_open(path)
        if marked is None
        else OwnedFiles(marked).open(path.relative_to(marked).as_posix())
    )
    with opened as file:
        yield file


def write_owned(path: Path, data: bytes) -> None:
    """Replace `path` by `data` and record it; see `owned_open`."""
    with owned_open(path) as file:
        file.write(data)


def write_owned_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Replace `path` by `value` as JSON and record it; NaN and infinities are refused."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    write_owned(path, (text + "\n").encode("utf-8"))


def remove_owned(path: Path) -> bool:
    """Delete a file that carries our mark, or that a marked directory above it records unchanged.

    Returns:
        Whether it was deleted.
    """
    if not path.is_file() or path.is_symlink():
        return False
    marked = next((above for above in [*path.parents][:3] if (above / MARKER).is_file()), None)
    ours = has_mark(path) or (
        marked is not None and OwnedFiles(marked).is_ours(path.relative_to(marked).as_posix())
    )
    if ours:
        path.unlink()
    return ours


def write_result(
    path: str | Path, data: bytes, *, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """Write one file of a format without room for a mark to a place that the user named.

    An existing file is left alone if it already has this content, and is replaced only with
    `overwrite`.

    Raises:
        UserError: The file has other content, is a directory, or is an input.
    """
    path = Path(path)
    refuse_input(path, inputs)
    same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    require_output_file(path, inputs=inputs, overwrite=overwrite or same)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    elif not same:
        write_bytes(path, data)


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_open(descriptor: int) -> str:
    """Return the SHA-256 of an open file's whole content, wherever its position is."""
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""


def _examples(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
