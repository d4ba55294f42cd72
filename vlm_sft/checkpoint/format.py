"""The layout of a checkpoint folder: its manifest, and the verification against it.

`manifest.json` holds the step, what the run trained from, and the sha256 of every other file; its
last key is the sha256 of the manifest itself. A folder without a valid manifest is no checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vlm_sft.checkpoint.provenance import recorded_environment, software
from vlm_sft.errors import CheckpointError
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.filesystem import files_below, warn_once
from vlm_sft.utils.image_paths import nearest_existing
from vlm_sft.utils.ownership import MANIFEST, MARKER, is_system_file
from vlm_sft.utils.reading import NotARegularFile, open_regular, parse_json, read_text

FORMAT: Final = 2
"""Version of the folder's layout; other versions are refused. Since 2 the manifest has a sha256."""

EDITABLE_BYTES: Final = 64 << 20
"""Files up to this size may have been edited by hand; larger ones hold weights."""

LOADED_SUFFIXES: Final = frozenset(
    {".json", ".safetensors", ".bin", ".pt", ".model", ".jinja", ".txt", ".py"}
)
"""Suffixes of files that transformers, peft and tokenizers look for in a model's directory."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files have been verified.

    Attributes:
        folder: `RUN/final` or `RUN/checkpoints/step-N`.
        manifest: The content of `manifest.json`, without its own sha256.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return int(self.manifest["step"])


def step_name(step: int) -> str:
    """Return the folder name of a step: `step-00000100` for step 100."""
    return f"step-{step:08d}"


def require_checkpoint(
    folder: Path, where: str = "", advice: str = "give a checkpoint, e.g. RUN/final"
) -> None:
    """Refuse a path that is not a directory, before anything heavy is imported.

    Raises:
        CheckpointError: `where` (the setting or option) comes before the path, `advice` after it.
    """
    if not folder.is_dir():
        saved = sorted(folder.parent.glob("checkpoints/step-*/" + MANIFEST))
        if saved and folder.name == "final":
            advice = (
                f"the run is not finished: repeat its command, or give {saved[-1].parent}, its "
                "newest checkpoint"
            )
        raise CheckpointError(
            f"{where}{folder}: no such folder{nearest_existing(folder)}; {advice}",
            code="no_checkpoint",
        )


def verify(folder: Path) -> Checkpoint:
    """Read the manifest and compare the sha256 of every file, including the manifest itself.

    A file that the manifest does not list is ignored with a warning, unless a library would load it
    together with the checkpoint.

    Raises:
        CheckpointError: There is no manifest or one of another format, a file is missing or has
            changed, or an unlisted file would be loaded.
    """
    manifest = read_manifest(folder)
    recorded: dict[str, str] = manifest["files"]
    present = {str(path.relative_to(folder)): path for path in files_below(folder)}
    present.pop(MANIFEST, None)
    if missing := sorted(recorded.keys() - present.keys()):
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing; the checkpoint is incomplete",
            code="checkpoint_damaged",
        )
    for name in sorted(present.keys() - recorded.keys()):
        # For example, an adapter_config.json in language_model/ makes transformers load an adapter.
        if _would_be_loaded(Path(name)):
            raise CheckpointError(
                f"{folder}: {name} is not in its manifest and would be loaded with the checkpoint; "
                "move that file out of the directory",
                code="checkpoint_damaged",
            )
        warn_once(f"{folder}: {name} is not part of the checkpoint; the file is ignored")
    for name, path in present.items():
        if name in recorded and sha256(path) != recorded[name]:
            raise CheckpointError(
                f"{folder}: {name} has changed since it was written (its sha256 differs)",
                code="checkpoint_damaged",
            )
    return Checkpoint(folder, manifest)


def verify_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Return the path of one file of a checkpoint after comparing its sha256 with the manifest.

    Raises:
        CheckpointError: The file is missing or has changed.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: {name} is missing; the checkpoint is incomplete", code="checkpoint_damaged"
        )
    if sha256(path) != manifest["files"].get(name):
        raise CheckpointError(
            f"{folder}: {name} differs from the sha256 in the manifest; the checkpoint is damaged",
            code="checkpoint_damaged",
        )
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify a checkpoint's manifest without reading its other files.

    Raises:
        CheckpointError: The folder is no checkpoint or one of another format, or the manifest has
            changed since it was written.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        manifest = parse_json(text)
    except NotARegularFile as error:
        raise CheckpointError(str(error), code=error.reason) from None
    except OSError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST}, so this is not a complete checkpoint; give a folder like "
            "RUN/final or RUN/checkpoints/step-00000100",
            code="no_checkpoint",
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{path}: not valid JSON; the checkpoint is damaged", code="manifest_damaged"
        ) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(
            f"{path}: not a checkpoint's manifest; the checkpoint is damaged",
            code="manifest_damaged",
        )
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r}, but this version reads {FORMAT}; use the "
            "version of vlm-sft that wrote it",
            code="checkpoint_format",
        )
    # The text is compared, not the parsed value: a flipped bit in whitespace counts as damage too.
    manifest.pop("sha256", None)
    if with_checksum(manifest) != text:
        raise CheckpointError(
            f"{path}: has changed since it was written (its sha256 differs)",
            code="manifest_damaged",
        )
    return manifest


def write_manifest(
    folder: Path, fields: Mapping[str, Any], files: Mapping[str, str]
) -> dict[str, Any]:
    """Write `manifest.json` and sync it; return its content.

    Args:
        folder: The checkpoint's folder, complete but for the manifest.
        fields: The step and everything else that describes the run.
        files: The sha256 of every file, by its path in the folder.
    """
    manifest = {
        "format": FORMAT,
        **fields,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": software(),
        "environment": recorded_environment(),
        "files": dict(files),
    }
    write_text(folder / MANIFEST, with_checksum(manifest))
    return manifest


def with_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest whose last key is the sha256 of the text without that key."""

    def text(value: Mapping[str, Any]) -> str:
        return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"

    return text({**manifest, "sha256": hashlib.sha256(text(manifest).encode()).hexdigest()})


def has_manifest(folder: Path) -> bool:
    """Return whether a folder has a manifest of this version that has not changed."""
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def foreign_content(folder: Path) -> str:
    """Describe what a checkpoint folder holds that no save wrote; "" if there is nothing.

    That is a folder without a valid manifest, a file that the manifest does not list, or a file of
    up to `EDITABLE_BYTES` that has changed since it was written.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a checkpoint folder"
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "it has no valid manifest of a checkpoint"
    if unlisted := unlisted_files(folder, manifest):
        return f"{unlisted[0]} is not in its manifest"
    for name, digest in manifest["files"].items():
        path = folder / name
        if path.is_file() and path.stat().st_size <= EDITABLE_BYTES and sha256(path) != digest:
            return f"{name} was changed after it was saved"
    return ""


def unlisted_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the files that neither the manifest lists nor a file manager leaves."""
    known = {MANIFEST, MARKER, *manifest["files"]}
    names = (str(path.relative_to(folder)) for path in files_below(folder))
    return [n for n in names if n not in known and not is_system_file(Path(n).name)]


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in files_below(folder)
        if path != folder / MARKER
    }


def sha256(path: Path) -> str:
    """Return the sha256 (hex) of a regular file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _would_be_loaded(name: Path) -> bool:
    """Return whether a library looks for files of this name in a checkpoint's subfolders."""
    return (
        len(name.parts) > 1
        and not is_system_file(name.name)
        and not name.name.startswith(".")
        and name.suffix in LOADED_SUFFIXES
    )
