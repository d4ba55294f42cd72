"""Decide which files and directories on disk this toolkit may replace or delete.

The rule: nothing that the toolkit did not write is replaced or deleted, and no output is one of the
command's own inputs. A directory is ours if it carries the marker file that `own_directory` writes;
a checkpoint is ours if it carries its manifest; a file is ours if it carries the mark of its format
(`MADE_BY` as the first key of a JSON object, a generator tag in HTML, a software note in PNG).
Files of formats without room for a mark (a JSON list, JSON lines, text) are ours if they lie in a
directory of ours and have the content that its marker file records: see `OwnedFiles`.
"""

import hashlib
import json
import mimetypes
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import atomic_open, is_stream, write_bytes, write_json
from vlm_sft.utils.filesystem import existing_above, lock, rename_folder, temporary_sibling
from vlm_sft.utils.reading import read_text

MARKER: Final = ".vlm_sft.json"
"""Name of the file that marks a directory as an output of this toolkit."""

MANIFEST: Final = "manifest.json"
"""Name of the file that makes a directory a checkpoint."""

TRAINING_RUN: Final = "training run"
CACHE: Final = "cache"

MADE_BY: Final = "made_by"
"""First key of a JSON output; its value begins with `vlm_sft` and the command; see `has_mark`."""

SYSTEM_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".nfs"})
"""Names that file managers and file systems create in any directory; they belong to nobody."""

PNG_SOFTWARE: Final = "vlm_sft"
"""Value of a PNG file's `Software` text that marks it as written by this toolkit."""

_MARKER_TEMPORARY: Final = re.compile(rf"\.{re.escape(MARKER)}\.[a-z0-9_]{{8,12}}\.tmp")
_HEAD_BYTES: Final = 4096
_IMAGE_SIGNATURES: Final = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0",
)  # fmt: skip
"""First bytes of JPEG, PNG, GIF, WebP, BMP, TIFF, and of HEIF and AVIF."""
_LOCK_TRIALS: Final = 1000
_MAX_MANIFEST_BYTES: Final = 64 << 20


def is_system_file(name: str) -> bool:
    """Return whether `name` is a file that a file manager or file system leaves in a directory."""
    return name in SYSTEM_FILES or name.startswith(("._", ".nfs"))


def made_by(command: str) -> str:
    """Return the value of `MADE_BY` in the JSON output of `command`."""
    return f"vlm_sft {command}"


def html_mark(command: str) -> str:
    """Return the tag that marks an HTML page as written by `command`; it goes into `<head>`."""
    return f'<meta name="generator" content="{made_by(command)}">'


def own_directory(
    path: str | Path,
    kind: str,
    *,
    inputs: Iterable[str | Path] = (),
    adopt: bool = False,
    setting: str = "",
) -> Path:
    """Create and mark an output directory, or accept one that was marked before.

    Args:
        path: The output directory. Missing parents are created.
        kind: What the directory holds, in one or two words, such as "training run".
        inputs: Files and directories that the command reads; none of them may be `path`.
        adopt: Whether to mark a directory that holds files already. The caller has recognized it
            as the output of an older version, or the user said `--overwrite`.
        setting: The configuration key that names `path`, for the message.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: As `require_directory`; nothing was changed.
    """
    path = Path(path)
    if not require_directory(path, kind, inputs=inputs, adopt=adopt, setting=setting):
        _mark(path, kind)
    return path


def _mark(path: Path, kind: str) -> None:
    """Write a marker file, unless another process has written one meanwhile."""
    marker = path / MARKER
    temporary = temporary_sibling(marker)
    write_json(temporary, {MADE_BY: "vlm_sft", "kind": kind})
    try:
        os.link(temporary, marker)  # fails where there is a marker, which may have records by now
    except OSError:
        if read_marker(path) is None and not _has_foreign_marker(path):
            os.replace(temporary, marker)
    finally:
        temporary.unlink(missing_ok=True)


def require_directory(
    path: str | Path,
    kind: str,
    *,
    inputs: Iterable[str | Path] = (),
    adopt: bool = False,
    setting: str = "",
) -> bool:
    """Check that `own_directory` would accept a directory, without changing anything.

    Returns:
        Whether the directory carries the marker already.

    Raises:
        UserError: The directory holds files and no marker, carries the marker of another kind or a
            file of that name that is not ours, is a file, lies in a checkpoint, or is one of the
            inputs.
    """
    path = Path(path)
    named = f"{setting} {path}".strip()
    refuse_input(path, inputs)
    refuse_in_checkpoint(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(
            f"{named}: is not a directory, but this command writes one; choose another name",
            code="not_ours",
        )
    # Names before the marker: another process may be marking the directory and filling it.
    entries, found = foreign_entries(path), read_marker(path)
    if found is not None and found.get("kind") != kind:
        raise UserError(
            f"{named}: the directory holds a {found.get('kind')}, but this command writes a "
            f"{kind}; nothing was changed. Choose a new or empty directory",
            code="not_ours",
        )
    if found is None and entries and not adopt:
        raise UserError(
            f"{named}: the directory is not empty ({_examples(entries)}) and was not created by "
            f"vlm_sft as a {kind}; nothing was changed. Choose a new or empty directory",
            code="not_ours",
        )
    if _has_foreign_marker(path):
        raise UserError(
            f"{path / MARKER}: was not written by vlm_sft, or is damaged, and would be replaced; "
            "nothing was changed. Move the file away, or choose another directory",
            code="not_ours",
        )
    return found is not None


def require_new_directory(path: str | Path, *, inputs: Iterable[str | Path] = ()) -> Path:
    """Check, before any work, that a directory made elsewhere can be renamed to `path`.

    Args:
        path: Must be missing, or a directory that is empty but for what file managers leave.
        inputs: Files and directories that the command reads.

    Returns:
        The absolute path.

    Raises:
        UserError: It is something else, a link, a mount point, an input, or lies in a checkpoint.
        OSError: The directory that it is to be in accepts no new files.
    """
    refuse_input(path, inputs)
    refuse_in_checkpoint(path)
    place = Path(os.path.abspath(path))
    if place.is_symlink():
        raise UserError(
            f"{path}: is a symbolic link; give the directory that it means, or a new one",
            code="not_ours",
        )
    if place.exists() and not (place.is_dir() and all(map(is_system_file, os.listdir(place)))):
        raise UserError(f"{path}: is not an empty directory; give a new one", code="not_ours")
    if place.is_mount():
        raise UserError(
            f"{path}: is a mount point, which cannot be replaced; give a new directory in it",
            code="not_ours",
        )
    require_writable(place.parent)
    return place


def read_marker(path: Path) -> dict[str, Any] | None:
    """Return the content of a directory's marker file; None if it has none that is ours."""
    try:
        found = json.loads(read_text(path / MARKER, limit=2**20))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and str(found.get(MADE_BY, "")).startswith("vlm_sft")
    return found if ours else None


def _has_foreign_marker(path: Path) -> bool:
    """Return whether a file of the marker's name has content that is not ours."""
    marker = path / MARKER
    if not os.path.lexists(marker) or read_marker(path) is not None:
        return False
    return not marker.is_file() or marker.stat().st_size > 0


def foreign_entries(path: Path, known: Iterable[str] = ()) -> list[str]:
    """Return the names in a directory that are neither in `known` nor left by a file manager.

    A directory that does not exist has none.
    """
    known = {MARKER, *known}
    try:
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if not (name in known or is_system_file(name) or _MARKER_TEMPORARY.fullmatch(name))
    ]


def is_checkpoint(folder: Path) -> bool:
    """Return whether a directory holds the manifest of a checkpoint, damaged or not."""
    path = folder / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    keys = {"format": int, "step": int, "files": dict}
    return isinstance(found, dict) and all(isinstance(found.get(k), t) for k, t in keys.items())


def is_run(folder: Path) -> bool:
    """Return whether a directory is a training run: marked as one, or one with a checkpoint."""
    marker = read_marker(folder)
    if marker is not None:
        return marker.get("kind") == TRAINING_RUN
    return any(map(is_checkpoint, (folder / "final", *folder.glob("checkpoints/step-*"))))


def refuse_in_checkpoint(output: str | Path) -> None:
    """Refuse an output inside a checkpoint, or where a run keeps its checkpoints.

    Raises:
        UserError: A file there would make the checkpoint damaged, or replace a part of it.
    """
    place = Path(os.path.realpath(output))
    for folder in (place, *place.parents):
        kept = folder.name in ("checkpoints", "final") and is_run(folder.parent)
        if kept or is_checkpoint(folder):
            raise UserError(
                f"{output}: lies in {folder}, where a training run keeps checkpoints; nothing was "
                "changed. Choose a place outside of it",
                code="not_ours",
            )


def require_output_file(
    path: str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    image_roots: Iterable[str | Path] = (),
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Check that a command may write its result to `path`, before any work is done for it.

    An existing file is replaced only if it carries the mark of `command` (`has_mark`) or the user
    said `--overwrite`. The directory must accept a new file, which is tried.

    Args:
        path: The output file. A symbolic link stays and its target is written.
        inputs: Files that the command reads, and directories that it reads as a whole; neither is
            replaced, nor a file in such a directory, even with `overwrite`.
        image_roots: Directories that it reads images from; no image in them is replaced.
        command: Name of the command in marks; empty: files of any command are replaced.
        overwrite: Whether the user allowed to replace a file of any origin.

    Returns:
        The path to write.

    Raises:
        UserError: The file must not be replaced, is a directory, lies in a checkpoint, or is an
            input.
        OSError: The directory does not accept new files.
    """
    path, inputs = Path(path), list(inputs)
    refuse_input(path, inputs)
    if is_stream(path):
        return path  # a pipe or a terminal such as /dev/stdout holds nothing that could be lost
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


def refuse_image(path: Path, image_roots: Iterable[str | Path]) -> None:
    """Refuse to replace an image that lies in a directory from which the command reads images.

    Raises:
        UserError: `path` is an image by its name or its content, and lies in such a directory.
    """
    if path.is_file() and (_named_as_image(path) or _begins_as_image(path)):
        _refuse_within(path, image_roots)


def _named_as_image(path: Path) -> bool:
    return str(mimetypes.guess_type(path.name)[0]).startswith("image/")


def _begins_as_image(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).startswith(_IMAGE_SIGNATURES)


def _refuse_within(path: Path, folders: Iterable[str | Path]) -> None:
    if folder := next((source for source in folders if _lies_in(path, source)), None):
        raise UserError(
            f"{path}: lies in {folder}, which this command reads, and would be replaced by its "
            "output; choose another output",
            code="not_ours",
        )


def _lies_in(path: Path, folder: str | Path) -> bool:
    """Return whether `path` or what it links to is below `folder`."""
    named = Path(os.path.realpath(path.parent), path.name)
    above = {*named.parents, *Path(os.path.realpath(path)).parents}
    return Path(os.path.realpath(folder)) in above


def require_writable(directory: Path) -> None:
    """Create and delete an empty file in `directory`, or in the nearest parent that exists.

    Raises:
        OSError: The directory does not accept new files; the error names it.
    """
    directory = existing_above(directory)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".vlm_sft."):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def has_mark(path: Path, command: str = "") -> bool:
    """Return whether a JSON, HTML or PNG file says that `command` of this toolkit wrote it.

    Looks at the first 4 KiB. Without `command`, any command of this toolkit.
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
            self._record({name: [_digest_of_open(file.fileno())]}, keep_last=True)

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

    def _record(self, digests: dict[str, list[str]], *, keep_last: bool = False) -> None:
        """Add digests to the marker file, `keep_last` next to the last one of each file."""
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


@contextmanager
def _locked(marker: Path) -> Iterator[None]:
    """Keep other processes from changing a marker file while the block lasts.

    Where the file system has no locks, a warning is printed and nothing is locked.
    """
    # Every change replaces the file: who has waited for it holds the lock of a file that is gone,
    # and tries again. The number of trials ends that where a file never looks the same twice.
    for trial in range(_LOCK_TRIALS):
        with marker.open("r+b" if os.access(marker, os.W_OK) else "rb") as file:
            state = lock(file.fileno(), marker, wait=True)
            same = os.path.samestat(os.fstat(file.fileno()), marker.stat())
            if same or state != "taken" or trial == _LOCK_TRIALS - 1:
                yield
                return


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
        image_roots: Directories that it reads images from; no image in them is replaced, unless
            it is a file of ours.
        adopt: Whether the caller recognized an unmarked directory as one of an older version; the
            present content of `names` is then taken for ours.
        overwrite: Whether the user allowed to replace files of any origin except inputs.

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
    path: str | Path,
    data: bytes,
    *,
    inputs: Iterable[str | Path] = (),
    image_roots: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Write one file of a format without room for a mark to a place that the user named.

    An existing file is left alone if it already has this content, and is replaced only with
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


def refuse_input(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is one of the command's inputs, under whatever name.

    Raises:
        UserError: They are the same file or directory.
    """
    for source in inputs:
        for name in (output, source):
            if "\0" in str(name):
                raise UserError(f"{str(name)!r}: no file can have this name", code="not_a_file")
        same = os.path.realpath(output) == os.path.realpath(source)
        if not same and os.path.exists(output) and os.path.exists(source):
            same = os.path.samefile(output, source)
        if same:
            raise UserError(
                f"{output}: is read by this command and would be replaced by its output; choose "
                "another output",
                code="not_ours",
            )


def set_aside(path: Path, name: Path | None = None) -> Path:
    """Rename a file or directory that must not be lost to `NAME.kept-N`, and return its new path.

    N is the smallest number that is free; NAME is that of `name`, or of `path` itself.
    """
    name, number = name or path, 1
    while os.path.lexists(kept := name.with_name(f"{name.name}.kept-{number}")):
        number += 1
    if path.is_dir() and not path.is_symlink():
        rename_folder(path, kept, last=MANIFEST)
    else:
        os.rename(path, kept)
    return kept


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
