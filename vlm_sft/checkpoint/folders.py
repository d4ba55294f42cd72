"""Write, replace and delete checkpoint folders so that a kill at any moment loses none.

A folder is written under a hidden temporary name, synced, and renamed. The order is what makes it
safe, both against `kill -9` and against a power cut:

1. write all files and sync them, so that their content is on the disk;
2. write the manifest with their sha256 and sync it: the folder is now complete;
3. rename the folder to its final name and sync the parent directory, so that the name lasts.

A kill leaves one of these, and `sweep` clears it at the next start:

* `.step-N.XXXXXXXX.tmp`: a folder that was being written or deleted. It is deleted.
* `.step-N.replaced` without a `step-N`: the old folder was renamed away and the new one had not yet
  got its name. The old one gets its name back.
* `.step-N.replaced` with a `step-N`: the new folder has its name. The old one is deleted.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from vlm_sft.checkpoint.format import (
    Checkpoint,
    foreign_content,
    has_manifest,
    hash_files,
    read_manifest,
    unlisted_files,
    verify,
    with_checksum,
    write_manifest,
)
from vlm_sft.checkpoint.snapshot import Component, Writer, snapshot_components
from vlm_sft.errors import CheckpointError
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.console import echo as print_line
from vlm_sft.utils.filesystem import (
    files_below,
    give_ordinary_modes,
    link_or_copy,
    naming,
    rename_folder,
    sync,
    sync_folder,
)
from vlm_sft.utils.ownership import (
    MADE_BY,
    MANIFEST,
    MARKER,
    foreign_entries,
    read_marker,
    set_aside,
)
from vlm_sft.utils.process_group import ProcessGroup

Log = Callable[[str], None]

STEP_FOLDER: Final = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
_TEMPORARY: Final = "temporary folder"
_REPLACED: Final = ".replaced"
_TEMPORARY_NAME: Final = re.compile(
    rf"\.(final|rehearsal|{STEP_FOLDER.pattern})\.[0-9a-f]{{8}}\.tmp|\.rehearsal\.tmp"
)
_REPLACED_NAME: Final = re.compile(rf"\.(final|{STEP_FOLDER.pattern}){re.escape(_REPLACED)}")


def write_checkpoint(
    folder: Path,
    components: Mapping[str, Component],
    fields: Mapping[str, Any],
    group: ProcessGroup | None = None,
) -> None:
    """Snapshot the components and write them; see `write_folder`."""
    group = group or ProcessGroup()
    write_folder(folder, snapshot_components(components, group), fields, group)


def write_folder(
    folder: Path,
    writers: Sequence[Writer],
    fields: Mapping[str, Any],
    group: ProcessGroup,
    log: Log = print_line,
) -> None:
    """Write a complete checkpoint folder: all files, then the manifest, then the rename.

    All ranks call this. A checkpoint of the same name is replaced; anything else of that name is
    kept under another name, which is logged.

    Args:
        folder: The final name.
        writers: The functions that write this rank's share of the components.
        fields: What the manifest holds besides the files.
        group: The ranks that write.
        log: Called with warnings.
    """
    building = group.rank0_then_broadcast(lambda: begin_temporary(folder))
    try:
        group.all_ranks(lambda: _write_files(writers, building))
        group.rank0_then_broadcast(lambda: _complete(building, folder, fields, log))
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise


def copy_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    components: Mapping[str, Component],
    *,
    log: Log = print_line,
) -> Checkpoint:
    """Make `folder` a complete copy of a checkpoint, by hard links where the disk supports them.

    Only files that the manifest lists are copied. Shards of several ranks are consolidated.

    Args:
        checkpoint: A verified checkpoint.
        folder: A checkpoint there is replaced; anything else there is kept under another name.
        components: The checkpoint's components, which consolidate their shards.
        log: Called with a warning about what was kept.

    Raises:
        CheckpointError: The copy does not verify.
        OSError: The disk is full or failed.
    """
    building = begin_temporary(folder)
    try:
        for name in [*checkpoint.manifest["files"], MANIFEST]:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(checkpoint.folder / name, building / name)
        with naming(building):
            consolidated = any([c.consolidate(building) for c in components.values()])
        if consolidated:
            # Unlink before writing: the name is a hard link to the step checkpoint's manifest.
            (building / MANIFEST).unlink()
            give_ordinary_modes(building)
            sync_tree(building)
            manifest = {**checkpoint.manifest, "files": hash_files(building)}
            write_text(building / MANIFEST, with_checksum(manifest))
        _remove_marker(building)
        move_into_place(building, folder, log)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return verify(folder)


def begin_temporary(folder: Path) -> Path:
    """Create a hidden, marked folder next to `folder`; `sweep` deletes it after a kill."""
    building = _temporary_name(folder)
    building.mkdir(parents=True)
    write_text(building / MARKER, json.dumps({MADE_BY: "vlm_sft", "kind": _TEMPORARY}))
    return building


def remove(folder: Path) -> None:
    """Delete a checkpoint folder.

    It is renamed first: a kill in the middle of the deletion then leaves a temporary folder, never
    a partial checkpoint under its final name.
    """
    trash = _temporary_name(folder)
    rename_folder(folder, trash, last=MANIFEST)
    delete_tree(trash)


def delete_tree(folder: Path) -> None:
    """Delete a folder of this toolkit, its marker and manifest last.

    After a kill, `sweep` recognizes the rest of the folder by one of the two.
    """
    for name in os.listdir(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name not in (MANIFEST, MARKER):
            path.unlink()
    shutil.rmtree(folder)


def move_into_place(building: Path, folder: Path, log: Log) -> None:
    """Rename a complete `building` to `folder`, replacing what is there.

    A directory cannot be replaced by one rename, so there is a moment without a `folder`. A kill at
    that moment leaves the old folder under its `.replaced` name, from which `sweep` restores it.
    """
    old = folder.with_name(f".{folder.name}{_REPLACED}")
    if os.path.lexists(folder):
        if os.path.lexists(old):
            _discard(old, folder, log)
        rename_folder(folder, old, last=MANIFEST)
    rename_folder(building, folder, last=MANIFEST)
    sync_folder(folder.parent)  # only now does the name survive a power cut
    if os.path.lexists(old):
        _discard(old, folder, log)


def sweep(parent: Path, log: Log) -> None:
    """Clear what a kill left in a folder of checkpoints; see the module's docstring.

    Only folders whose name and content are of this toolkit are touched.
    """
    for leftover in parent.glob(".*.tmp"):
        if _TEMPORARY_NAME.fullmatch(leftover.name) and _is_leftover(leftover):
            delete_tree(leftover)
    for old in parent.glob(f".*{_REPLACED}"):
        if not _REPLACED_NAME.fullmatch(old.name):
            continue
        folder = old.with_name(old.name[1 : -len(_REPLACED)])
        if os.path.lexists(folder):
            _discard(old, folder, log)
        else:
            rename_folder(old, folder, last=MANIFEST)


def sync_tree(folder: Path) -> None:
    """Sync every file and directory below a folder, and the folder itself."""
    for path in files_below(folder):
        with path.open("rb") as file:
            sync(file.fileno(), path)
    for below in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(below)
    sync_folder(folder)


def _write_files(writers: Sequence[Writer], building: Path) -> None:
    for write in writers:
        with _write_errors(building):
            write(building)


def _complete(building: Path, folder: Path, fields: Mapping[str, Any], log: Log) -> None:
    give_ordinary_modes(building)
    files = hash_files(building)
    sync_tree(building)
    # The manifest comes last: where it is, all files it lists are on the disk.
    write_manifest(building, fields, files)
    _remove_marker(building)
    move_into_place(building, folder, log)


def _remove_marker(building: Path) -> None:
    (building / MARKER).unlink()
    sync_folder(building)


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    """Turn what safetensors raises about a write into an `OSError` or a `CheckpointError`."""
    try:
        with naming(place):
            yield
    except SafetensorError as error:
        raise CheckpointError(f"{place}: cannot be written: {error}", code="save_failed") from None


def _discard(old: Path, folder: Path, log: Log) -> None:
    """Delete what was replaced at `folder`, or rename it visibly if a save did not write it."""
    foreign = foreign_content(old)
    if not foreign:
        # A network disk keeps the names of open files; `sweep` tries again at the next start.
        with suppress(OSError):
            delete_tree(old)
        return
    kept = set_aside(old, folder)
    log(f"warning: what was in {folder} before is now in {kept}: {foreign}")


def _is_leftover(folder: Path) -> bool:
    """Return whether a temporary folder is empty, marked, or a checkpoint of this toolkit."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not foreign_entries(folder):
        return True
    marker = read_marker(folder)
    marked = marker is not None and marker.get("kind") == _TEMPORARY
    return marked or (has_manifest(folder) and not unlisted_files(folder, read_manifest(folder)))


def _temporary_name(folder: Path) -> Path:
    """Return a hidden sibling of `folder` that no other process uses."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent / f".{folder.name}.{os.urandom(4).hex()}.tmp"
