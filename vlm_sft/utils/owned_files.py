"""Record the digest of every output file whose format has no room for a mark.

Such files (a JSON list, JSON lines, text) are ours if they are in a marked directory and have the
content that its marker file records.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import atomic_open, write_json
from vlm_sft.utils.filesystem import lock
from vlm_sft.utils.output_files import has_mark, refuse_image
from vlm_sft.utils.ownership import MARKER, own_directory, read_marker, refuse_input

_LOCK_TRIALS: Final = 1000


class OwnedFiles:
    """The files of one marked directory, identified by the sha256 of their content.

    The marker file records the digest of every file that is written through `open`. A file with
    another digest was edited or created by somebody else, and is not replaced.

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
            overwrite: Whether the user allowed replacing files that were changed.

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
        """Record the current content of files, so that they may be replaced."""
        digests = {
            name: [_digest(self.directory / name)]
            for name in names
            if (self.directory / name).is_file()
        }
        self._record(digests)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a binary file that replaces `name` when the block ends without error.

        Before the rename, the new digest is recorded in addition to the old one: whenever the
        process is killed, the file on disk has one of the two.
        """
        with atomic_open(self.directory / name) as file:
            yield file
            file.flush()
            self._record({name: [_digest_of_open(file.fileno())]}, keep_last=True)

    def is_ours(self, name: str) -> bool:
        """Return whether a file is missing, empty, or unchanged since it was written here."""
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

    def _record(self, digests: dict[str, list[str]], *, keep_last: bool = False) -> None:
        """Set the digests of files in the marker; with `keep_last`, keep the last one too."""
        if not digests or read_marker(self.directory) is None:
            return
        with _locked(self.directory / MARKER):
            if (marker := read_marker(self.directory)) is None:
                return
            files = marker.get("files")
            if keep_last:
                digests = {
                    name: list(dict.fromkeys([*self._digests(name)[-1:], *new]))
                    for name, new in digests.items()
                }
            marker["files"] = (files if isinstance(files, dict) else {}) | digests
            write_json(self.directory / MARKER, marker)


def own_output(
    path: str | Path,
    kind: str,
    names: Iterable[str],
    *,
    inputs: Iterable[str | Path] = (),
    image_roots: Iterable[str | Path] = (),
    adopt: bool = False,
    overwrite: bool = False,
) -> OwnedFiles:
    """Create or accept an output directory in which a command will write the files `names`.

    Args:
        path: The directory.
        kind: As in `own_directory`.
        names: Files to be written, as paths below the directory.
        inputs: Files and directories that the command reads.
        image_roots: Directories that it reads images from; no image in them is replaced unless it
            is recorded as ours.
        adopt: Whether the caller recognized an unmarked directory as one of an older version; the
            current content of `names` is then recorded as ours.
        overwrite: Whether the user allowed replacing files of any origin except inputs.

    Raises:
        UserError: As `own_directory` and `OwnedFiles.require_unchanged`; nothing was changed.
    """
    path, names, inputs = Path(path), list(names), list(inputs)
    for name in names:
        refuse_input(path / name, inputs)
    files = OwnedFiles(path)
    for name in names:
        if not (adopt or files.is_ours(name)):
            refuse_image(path / name, image_roots)
    own_directory(path, kind, inputs=inputs, adopt=adopt or overwrite)
    if adopt:
        files.accept(names)
    files.require_unchanged(names, overwrite=overwrite)
    return files


@contextmanager
def owned_open(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends without error.

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
    """Delete a file that has our mark, or whose digest a marked directory above it records.

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


@contextmanager
def _locked(marker: Path) -> Iterator[None]:
    """Lock a marker file against other processes during the block.

    Where the file system has no locks, a warning is printed and nothing is locked.
    """
    # Every change replaces the file by a rename. A process that has waited for the lock may then
    # hold the lock of a file that is gone, so it compares the two and tries again. The limit is for
    # file systems whose inode numbers are not stable.
    for trial in range(_LOCK_TRIALS):
        with marker.open("r+b" if os.access(marker, os.W_OK) else "rb") as file:
            state = lock(file.fileno(), marker, wait=True)
            same = os.path.samestat(os.fstat(file.fileno()), marker.stat())
            if same or state != "taken" or trial == _LOCK_TRIALS - 1:
                yield
                return


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
