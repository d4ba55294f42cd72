"""Mark output directories, and recognize the directories and checkpoints of this toolkit.

The rule here, in `output_files` and in `owned_files`: nothing that this toolkit did not write is
replaced or deleted, and no output is one of the command's own inputs. A directory is ours if it has
the marker file that `own_directory` writes, a checkpoint if it has its manifest, a file if it has
the mark of its format (`output_files`) or a recorded digest (`owned_files`).
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.filesystem import rename_folder, require_writable, temporary_sibling
from vlm_sft.utils.reading import read_text

MARKER: Final = ".vlm_sft.json"
"""Name of the file that marks a directory as an output of this toolkit."""

MANIFEST: Final = "manifest.json"
"""Name of the file that makes a directory a checkpoint."""

TRAINING_RUN: Final = "training run"
CACHE: Final = "cache"

MADE_BY: Final = "made_by"
"""First key of a JSON output; its value begins with `vlm_sft` and the command."""

SYSTEM_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".nfs"})
"""Names that file managers and file systems create in any directory."""

_MARKER_TEMPORARY: Final = re.compile(
    rf"\.{{1,2}}{re.escape(MARKER)}(\.[a-z0-9_]{{8,12}}\.tmp){{1,2}}"
)
"""Names of a marker that is being written: a temporary file, which is itself written to another."""

_MAX_MANIFEST_BYTES: Final = 64 << 20


def is_system_file(name: str) -> bool:
    """Return whether a file manager or file system creates files of this name."""
    return name in SYSTEM_FILES or name.startswith(("._", ".nfs"))


def made_by(command: str) -> str:
    """Return the value of `MADE_BY` in the JSON output of `command`."""
    return f"vlm_sft {command}"


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
        kind: The kind of its content in one or two words, such as "training run".
        inputs: Files and directories that the command reads; none of them may be `path`.
        adopt: Whether to mark a directory that already holds files, because the caller has
            recognized the output of an older version or the user passed `--overwrite`.
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
        UserError: The directory holds files and no marker, has the marker of another kind or a
            file of the marker's name that is not ours, is a file, is inside a checkpoint, or is one
            of the inputs.
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
    # The names are read before the marker: another process may be marking and filling the
    # directory, and its files must not be taken for foreign ones.
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
        path: Must not exist, or be a directory that is empty except for system files.
        inputs: Files and directories that the command reads.

    Returns:
        The absolute path.

    Raises:
        UserError: It is something else, a link, a mount point, an input, or inside a checkpoint.
        OSError: Its parent directory accepts no new files.
    """
    refuse_input(path, inputs)
    refuse_in_checkpoint(path)
    place = Path(os.path.abspath(path))
    if place.is_symlink():
        raise UserError(
            f"{path}: is a symbolic link; give the directory it points to, or a new one",
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


def foreign_entries(path: Path, known: Iterable[str] = ()) -> list[str]:
    """Return the names in a directory that are neither in `known` nor system files.

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
        UserError: A file there would invalidate the checkpoint or replace a part of it.
    """
    place = Path(os.path.realpath(output))
    for folder in (place, *place.parents):
        kept = folder.name in ("checkpoints", "final", "best") and is_run(folder.parent)
        if kept or is_checkpoint(folder):
            raise UserError(
                f"{output}: is inside {folder}, where a training run keeps checkpoints; nothing "
                "was changed. Choose another place",
                code="not_ours",
            )


def refuse_input(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is one of the command's inputs, even under another name.

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
    """Rename a file or directory that must not be lost to `NAME.kept-N`; return the new path.

    Args:
        path: The file or directory.
        name: Gives NAME; None: `path` itself. N is the smallest number that is not in use.
    """
    name, number = name or path, 1
    while os.path.lexists(kept := name.with_name(f"{name.name}.kept-{number}")):
        number += 1
    if path.is_dir() and not path.is_symlink():
        rename_folder(path, kept, last=MANIFEST)
    else:
        os.rename(path, kept)
    return kept


def _mark(path: Path, kind: str) -> None:
    """Write a marker file, unless another process has written one in the meantime."""
    marker = path / MARKER
    temporary = temporary_sibling(marker)
    write_json(temporary, {MADE_BY: "vlm_sft", "kind": kind})
    try:
        # A link never replaces an existing marker, in which digests may be recorded by now.
        os.link(temporary, marker)
    except OSError:
        if read_marker(path) is None and not _has_foreign_marker(path):
            os.replace(temporary, marker)
    finally:
        temporary.unlink(missing_ok=True)


def _has_foreign_marker(path: Path) -> bool:
    """Return whether a file of the marker's name has content that is not ours."""
    marker = path / MARKER
    if not os.path.lexists(marker) or read_marker(path) is not None:
        return False
    return not marker.is_file() or marker.stat().st_size > 0


def _examples(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
