"""Checkpoints: folders of safetensors and JSON that are complete and proven, or absent."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from vlm_sft.errors import CheckpointError, ConfigError, UserError
from vlm_sft.errors.codes import CODE_OF_FACT
from vlm_sft.train.environment import environment_difference, recorded_environment
from vlm_sft.train.fsdp import fill, is_sharded, own_part, process_of, whole
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.console import say as console_say
from vlm_sft.utils.crash import crash_point
from vlm_sft.utils.filesystem import (
    files_below,
    free_bytes,
    give_ordinary_modes,
    link_or_copy,
    naming,
    rename_folder,
    sync,
    sync_folder,
    warn_once,
)
from vlm_sft.utils.libraries import installed_version
from vlm_sft.utils.ownership import (
    MADE_BY,
    MANIFEST,
    MARKER,
    foreign_entries,
    is_system_file,
    read_marker,
    set_aside,
)
from vlm_sft.utils.reading import NotARegularFile, open_regular, parse_json, read_text

FORMAT = 2
"""Version of the folder's layout; another one is refused. In 2 the manifest is sealed."""

EDITABLE_BYTES = 64 << 20
"""Files up to this size may have been edited by hand; larger ones hold weights."""

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = ("vlm-sft", "torch", "transformers", "accelerate", "peft", "safetensors")
LIBRARIES_WHERE_USED = ("bitsandbytes",)
LOADED_SUFFIXES = frozenset(
    {".json", ".safetensors", ".bin", ".pt", ".model", ".jinja", ".txt", ".py"}
)
"""Files that transformers, peft and tokenizers look for in a model's directory."""


Writer = Callable[[Path], None]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Component:
    """A piece of a checkpoint that can be held still, written, and read back.

    Attributes:
        capture: Copies what the piece is at this moment and returns what writes that copy into a
            folder, so that writing may go on while training does.
        read: Reads the files back into the live objects, strictly (every name, every shape); None
            for what is only written (configuration, tokenizer).
        tensors: The live tensors that it saves, by the names they get. Where processes share
            them, every process captures and writes, else the first alone.
        unite: Makes one of what several processes wrote, in the folder that is to be `final/`;
            whether there was anything to do.
    """

    capture: Callable[[], Writer]
    read: Callable[[Path], None] | None = None
    tensors: Callable[[], Mapping[str, torch.Tensor]] = dict
    unite: Callable[[Path], bool] = lambda folder: False


@dataclass(frozen=True)
class Together:
    """The processes that write one checkpoint; by default this one alone.

    Attributes:
        process: This one's number.
        gather: What every process gives to it, in the order of their numbers, to all of them.
    """

    process: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def first(self, action: Callable[[], Value]) -> Value:
        """Do something in the first process; its result, or what it raises, in all of them."""
        result: Value | None = None
        error = None
        if self.process == 0:
            result, error = _outcome(action)
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return cast(Value, result)

    def every(self, action: Callable[[], None]) -> None:
        """Do something in every process; what any of them raises is raised in all."""
        _, mine = _outcome(action)
        for error in self.gather(mine):
            if error is not None:
                raise error


def _outcome(action: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return action(), None
    except (UserError, OSError) as error:
        return None, error


def plain_component(write: Writer) -> Component:
    """A piece that never changes during a run and is only written."""
    return Component(lambda: write)


def tensor_component(
    tensors: Callable[[], Mapping[str, torch.Tensor]],
    write: Callable[[Path, Mapping[str, torch.Tensor]], None],
    read: Callable[[Path], None],
) -> Component:
    """A piece made of live tensors; `write` gets whole copies of them in host memory.

    Tensors that processes share are gathered, and the first process writes.
    """

    def capture() -> Writer:
        live = tensors()
        held = host_copies(live)
        if any(process_of(tensor)[0] > 0 for tensor in live.values()):
            return lambda folder: None
        return lambda folder: write(folder, held)

    return Component(capture, read, tensors)


def host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies in host memory that later updates do not touch; tied tensors stay tied.

    Tensors that processes share are gathered: every process must call.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    held = {}
    for name, tensor in tensors.items():
        key = (own_part(tensor).data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = whole(tensor.detach()).to("cpu", copy=True).contiguous()
        held[name] = copies[key]
    return held


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files were found to have the content that they were given."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])


@dataclass
class CheckpointStore:
    """The checkpoints of one run.

    Args:
        output_dir: The run folder; checkpoints lie in `checkpoints/step-N`, the last in `final`.
        components: What a checkpoint is made of, by name.
        facts: Plain values for every manifest (stage, base-model identity, data); a checkpoint
            with other ones is refused.
        explain: How to tell a difference of a fact, from its value then and its value now.
        keep: Step checkpoints left after a save.
        num_bytes: About how large a checkpoint is, for the free-space check; 0 leaves it out.
        say: Where lines for the user go.
        learning: What the run trains, by name; a save without one of them is refused.
        together: The processes that save; each has a store of its own and calls `save`.
    """

    output_dir: Path
    components: Mapping[str, Component]
    facts: Mapping[str, Any] = field(default_factory=dict)
    explain: Mapping[str, Callable[[Any, Any], str]] = field(default_factory=dict)
    keep: int = 2
    num_bytes: int = 0
    say: Callable[[str], None] = print
    learning: Mapping[str, torch.Tensor] = field(default_factory=dict)
    together: Together = field(default_factory=Together)
    _damaged: set[Path] = field(default_factory=set, init=False)
    _kept_for_others: set[Path] = field(default_factory=set, init=False)
    """Folders that were not deleted and of which the user was warned."""

    @property
    def steps_dir(self) -> Path:
        """Where the step checkpoints lie."""
        return self.output_dir / "checkpoints"

    @property
    def final_dir(self) -> Path:
        """Where the finished run's checkpoint lies."""
        return self.output_dir / "final"

    def save(self, position: Mapping[str, Any]) -> Checkpoint:
        """Write `checkpoints/step-N`, prove it, then drop the oldest beyond `keep`.

        Args:
            position: `step` and whatever else says where in the data the run is.

        Raises:
            CheckpointError: Too little free space, something trained would be missing, or what
                was written does not read back.
            OSError: The disk refused; older checkpoints are untouched.
        """
        return self.capture(position)()

    def capture(self, position: Mapping[str, Any]) -> Callable[[], Checkpoint]:
        """Hold still what is to be saved; what comes back does the rest of `save`.

        Raises:
            CheckpointError: Too little free space, or something trained would be missing.
        """
        self.together.first(lambda: require_space(self.output_dir, self.num_bytes))
        self.together.every(lambda: require_all_saved(self.learning, self.components))
        folder = self.steps_dir / step_name(int(position["step"]))
        facts = {**self.facts, **position}
        writers = capture(self.components, self.together)
        crash_point("checkpoint.captured")

        def write() -> Checkpoint:
            write_folder(folder, writers, facts, self.together, self.say)
            return self.together.first(lambda: self._prove_and_prune(folder))

        return write

    def _prove_and_prune(self, folder: Path) -> Checkpoint:
        checkpoint = verify(folder)
        crash_point("checkpoint.verified")
        self._prune(folder)
        crash_point("checkpoint.pruned")
        return checkpoint

    def _prune(self, saved: Path) -> None:
        """Leave `keep` checkpoints up to the one just proven, not counting damaged ones.

        An older folder stays if it is not a checkpoint or holds anything that no save wrote.
        """
        self._damaged.discard(saved)
        folders = self.step_folders()
        folders = folders[folders.index(saved) :]
        good = [f for f in folders if f not in self._damaged and has_manifest(f)]
        for old in folders[folders.index(good[: self.keep][-1]) + 1 :]:
            if not (foreign := foreign_content(old)):
                remove(old)
            elif old not in self._kept_for_others:
                self._kept_for_others.add(old)
                self.say(f"warning: {old} was not deleted: {foreign}")

    def finish(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make `final/` a complete copy of `checkpoint`; see `copy_checkpoint`."""
        return copy_checkpoint(
            checkpoint, self.final_dir, self.components, say=self.say, reached=crash_point
        )

    def finished(self) -> Checkpoint | None:
        """The complete `final/` of a finished run, else None; a damaged one is named."""
        if not self.final_dir.exists():
            return None
        try:
            return verify(self.final_dir)
        except CheckpointError as error:
            self.say(f"not used: {error}")
            return None

    def newest(self) -> Checkpoint | None:
        """The newest step checkpoint that is complete; None in a run that has none yet.

        Damaged ones are named and passed over; leftovers of an interrupted save are removed, and
        what it was about to replace is put back.

        Raises:
            CheckpointError: There are checkpoints and all of them are damaged.
        """
        _sweep(self.output_dir, self.say)
        _sweep(self.steps_dir, self.say)
        return self.newest_complete()

    def newest_complete(self) -> Checkpoint | None:
        """Return what `newest` does, without clearing what a kill left.

        Raises:
            CheckpointError: There are checkpoints and all of them are damaged.
        """
        folders = self.step_folders()
        for folder in folders:
            try:
                return verify(folder)
            except CheckpointError as error:
                self._damaged.add(folder)
                self.say(f"passed over: {error}")
        if folders:
            raise CheckpointError(
                f"{self.steps_dir}: none of the {len(folders)} checkpoints is complete (each one's "
                "fault is listed above); copy a complete one back, or move that directory away to "
                "start the run over",
                code="checkpoints_all_damaged",
            )
        return None

    def load(self, checkpoint: Checkpoint) -> None:
        """Read every component back.

        Raises:
            CheckpointError: As `require_same_facts`, or a tensor is missing, too many, or of
                another shape.
        """
        self.require_same_facts(checkpoint)
        for component in self.components.values():
            if component.read is not None:
                component.read(checkpoint.folder)

    def require_same_facts(self, checkpoint: Checkpoint) -> None:
        """Compare what a checkpoint was made from with this run; report other software.

        Raises:
            CheckpointError: The checkpoint is of another stage, model, or data.
        """
        for name, expected in self.facts.items():
            found = checkpoint.manifest.get(name)
            if found == expected:
                continue
            explain = self.explain.get(name)
            if explain is not None and found is not None:
                difference = explain(found, expected)
            else:
                what = name.replace("_", " ")
                difference = f"{what} is {_short(found)}, but this run's is {_short(expected)}"
            raise CheckpointError(
                f"{checkpoint.folder}: {difference}; resume with what the checkpoint was made "
                "from, or choose another output_dir",
                code=CODE_OF_FACT.get(name),
            )
        if changed := software_difference(checkpoint.manifest.get("software", {}), software()):
            self.say(f"{checkpoint.folder} was made by other software ({changed})")
        recorded = checkpoint.manifest.get("environment")
        if recorded is not None and (
            changed := environment_difference(recorded, recorded_environment())
        ):
            self.say(f"{checkpoint.folder} was made with other environment variables ({changed})")

    def step_folders(self) -> list[Path]:
        """Step checkpoints, complete or not, newest first."""
        found = [f for f in self.steps_dir.glob("step-*") if _STEP.fullmatch(f.name) and f.is_dir()]
        return sorted(found, key=lambda folder: int(folder.name[5:]), reverse=True)


def require_within(checkpoint: Checkpoint, total_steps: int) -> None:
    """Refuse to resume from a checkpoint that is beyond the last step.

    Raises:
        ConfigError: With both steps.
    """
    if checkpoint.step > total_steps:
        raise ConfigError(
            f"{checkpoint.folder}: the run is already at step {checkpoint.step}, beyond the "
            f"{total_steps} that train.max_steps and train.epochs ask for; ask for more, or "
            "choose another output_dir",
            code="settings_changed",
        )


def step_name(step: int) -> str:
    """`step-00000100` for step 100."""
    return f"step-{step:08d}"


def write_checkpoint(
    folder: Path,
    components: Mapping[str, Component],
    facts: Mapping[str, Any],
    together: Together | None = None,
) -> None:
    """Write the components as they are now; see `write_folder`."""
    together = together or Together()
    write_folder(folder, capture(components, together), facts, together)


def capture(components: Mapping[str, Component], together: Together) -> list[Writer]:
    """What writes this process's share of all components as they are now."""
    return [
        component.capture()
        for component in components.values()
        if together.process == 0 or is_sharded(component.tensors().values())
    ]


def write_folder(
    folder: Path,
    writers: Sequence[Writer],
    facts: Mapping[str, Any],
    together: Together,
    say: Callable[[str], None] = console_say,
) -> None:
    """Write a complete checkpoint folder: all files, then the manifest, then the rename.

    Everything is on the disk before the folder gets its name. A checkpoint of that name is
    replaced; anything else of that name is kept under another one, and `say` is called.
    """
    building = together.first(lambda: begin_temporary(folder))
    crash_point("checkpoint.begun")
    try:
        together.every(lambda: _write_all(writers, building))
        together.first(lambda: _complete(building, folder, facts, say))
    except BaseException:
        if together.process == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise


def copy_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    components: Mapping[str, Component],
    *,
    say: Callable[[str], None] = console_say,
    reached: Callable[[str], None] = lambda point: None,
) -> Checkpoint:
    """Make `folder` a complete copy of a checkpoint, by hard links where the disk has them.

    The files are those that the manifest names. What several processes wrote in pieces is united.

    Args:
        checkpoint: Verified.
        folder: A checkpoint there is replaced; anything else there is kept under another name.
        components: The checkpoint's, which unite the pieces.
        say: Called with a warning about what was kept.
        reached: Called with the crash points of the end of a run.

    Raises:
        CheckpointError: The copy does not read back.
        OSError: The disk refused.
    """
    building = begin_temporary(folder)
    try:
        for name in [*checkpoint.manifest["files"], MANIFEST]:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(checkpoint.folder / name, building / name)
        with naming(building):
            united = any([component.unite(building) for component in components.values()])
        if united:
            (building / MANIFEST).unlink()  # the link, not the checkpoint's own
            give_ordinary_modes(building)
            _sync_tree(building)
            united_manifest = {**checkpoint.manifest, "files": _hashes(building)}
            write_text(building / MANIFEST, _sealed(united_manifest))
        reached("final.copied")
        _unmark(building)
        _move_into_place(building, folder, say)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    reached("final.renamed")
    final = verify(folder)
    reached("final.verified")
    return final


def software() -> dict[str, str]:
    """Versions of what a run computes with, and the sha256 of this package's own sources."""
    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sources.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    used = [*LIBRARIES, *(name for name in LIBRARIES_WHERE_USED if name in sys.modules)]
    return {**{name: installed_version(name) for name in used}, "code": sources.hexdigest()}


def software_difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What another software made a checkpoint, in words; None if it is the same."""
    changed = [
        f"{name} {then.get(name, 'unknown')[:12]}, now {now[name][:12]}"
        for name in now
        if then.get(name) != now[name]
    ]
    return "; ".join(changed) or None


def begin_temporary(folder: Path) -> Path:
    """Create a hidden, marked folder next to `folder`; `_sweep` deletes what a kill leaves."""
    building = _temporary(folder)
    building.mkdir(parents=True)
    write_text(building / MARKER, json.dumps({MADE_BY: "vlm_sft", "kind": TEMPORARY}))
    return building


def _unmark(building: Path) -> None:
    (building / MARKER).unlink()
    sync_folder(building)


def _write_all(writers: Sequence[Writer], building: Path) -> None:
    for write in writers:
        with _write_errors(building):
            write(building)
        crash_point("checkpoint.component")


def _complete(
    building: Path, folder: Path, facts: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    give_ordinary_modes(building)
    files = _hashes(building)
    _sync_tree(building)
    crash_point("checkpoint.files_synced")
    manifest = {
        "format": FORMAT,
        **facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": software(),
        "environment": recorded_environment(),
        "files": files,
    }
    write_text(building / MANIFEST, _sealed(manifest))
    crash_point("checkpoint.manifest")
    _unmark(building)
    _move_into_place(building, folder, say)


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    """Turn what safetensors raises about a write into an `OSError` or a `CheckpointError`."""
    try:
        with naming(place):
            yield
    except SafetensorError as error:
        raise CheckpointError(f"{place}: cannot be written: {error}", code="save_failed") from None


def require_all_saved(
    learning: Mapping[str, torch.Tensor], components: Mapping[str, Component]
) -> None:
    """Every tensor that learns must be in a checkpoint.

    Raises:
        CheckpointError: Naming the first that no component saves.
    """
    saved = {own_part(t).data_ptr() for c in components.values() for t in c.tensors().values()}
    missing = [name for name, t in learning.items() if own_part(t).data_ptr() not in saved]
    if missing:
        raise CheckpointError(
            f"{missing[0]} learns but no part of a checkpoint saves it ({len(missing)} of "
            f"{len(learning)} such); nothing was written - this is a bug, please report it",
            code="save_incomplete",
        )


def verify(folder: Path) -> Checkpoint:
    """Read the manifest and compare every file, the manifest included, with its hash.

    Files that the manifest does not name are reported and otherwise ignored, unless a library would
    load them together with the checkpoint.

    Raises:
        CheckpointError: No manifest, a newer format, a file missing or changed, or one that would
            be loaded and is not the checkpoint's.
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
        if _is_loaded(Path(name)):
            raise CheckpointError(
                f"{folder}: {name} is not in its manifest and would be loaded with the checkpoint; "
                "move that file out of the directory",
                code="checkpoint_damaged",
            )
        warn_once(f"{folder}: {name} is not part of the checkpoint; the file is ignored")
    for name, path in present.items():
        if name in recorded and _sha256(path) != recorded[name]:
            raise CheckpointError(
                f"{folder}: {name} has changed since it was written (its sha256 differs)",
                code="checkpoint_damaged",
            )
    return Checkpoint(folder, manifest)


def _is_loaded(name: Path) -> bool:
    """Return whether a library looks into a checkpoint for files of such a name."""
    return (
        len(name.parts) > 1
        and not is_system_file(name.name)
        and not name.name.startswith(".")
        and name.suffix in LOADED_SUFFIXES
    )


def verify_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of one file of a checkpoint, whose content is what the manifest says.

    Raises:
        CheckpointError: It is missing or changed.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: {name} is missing; the checkpoint is incomplete", code="checkpoint_damaged"
        )
    if _sha256(path) != manifest["files"].get(name):
        raise CheckpointError(
            f"{folder}: {name} is not what its manifest says; it is damaged",
            code="checkpoint_damaged",
        )
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, without looking at its other files.

    Raises:
        CheckpointError: The folder is no checkpoint, of another format, or the manifest has
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
    manifest.pop("sha256", None)
    if _sealed(manifest) != text:
        raise CheckpointError(
            f"{path}: has changed since it was written (its sha256 differs)",
            code="manifest_damaged",
        )
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest's text, which ends in the sha256 of the text without it."""

    def text(value: Mapping[str, Any]) -> str:
        return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"

    return text({**manifest, "sha256": hashlib.sha256(text(manifest).encode()).hexdigest()})


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, from any device, in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with naming(path):
        save_file(held, str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: The file is missing or not whole.
    """
    try:
        return load_file(str(path))
    except Exception:
        pass  # where the file system cannot map files into memory, plain reading is left
    try:
        return load(path.read_bytes())
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors: {error}", code="checkpoint_damaged"
        ) from None


def copy_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Copy tensors by name into live ones, after checking all names and shapes.

    Raises:
        CheckpointError: A tensor is missing, too many, or of another shape; nothing was copied.
    """
    check_tensors(found, wanted, where)
    for name, target in wanted.items():
        fill(target, found[name])


def check_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Refuse missing and unexpected names and differing shapes, naming tensor and both shapes."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are); it "
            "was made for another model",
            code="tensors_differ",
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{where}: tensor {extra[0]!r} is not in this model ({len(extra)} such); it was made "
            "for another model",
            code="tensors_differ",
        )
    for name, target in wanted.items():
        if found[name].shape != target.shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {_shape(found[name])}, but this model's is "
                f"{_shape(target)}; use the tower, projector_type and language model that it was "
                "trained with",
                code="shapes_differ",
            )


def require_space(place: Path, num_bytes: int) -> None:
    """Refuse to begin a write that the disk has no room for.

    Raises:
        CheckpointError: With the space that is free and the space that is needed.
    """
    free = free_bytes(place)
    if free is not None and free < num_bytes:
        raise CheckpointError(
            f"{place}: {free / 1e9:.1f} GB free, but a checkpoint takes about "
            f"{num_bytes / 1e9:.1f} GB; free some space or choose another output_dir",
            code="disk_full",
        )


def remove(folder: Path) -> None:
    """Delete a folder, renamed first so that a kill never leaves half of it under its name."""
    trash = _temporary(folder)
    rename_folder(folder, trash, last=MANIFEST)
    crash_point("checkpoint.pruning")
    delete_tree(trash)


def delete_tree(folder: Path) -> None:
    """Delete a folder of ours, its marker and manifest last, so that `_sweep` can finish it."""
    for name in os.listdir(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name not in (MANIFEST, MARKER):
            path.unlink()
    shutil.rmtree(folder)


TEMPORARY = "temporary folder"
REPLACED = ".replaced"
_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
_TEMPORARY_NAME = re.compile(
    rf"\.(final|rehearsal|{_STEP.pattern})\.[0-9a-f]{{8}}\.tmp|\.rehearsal\.tmp"
)
_REPLACED_NAME = re.compile(rf"\.(final|{_STEP.pattern}){re.escape(REPLACED)}")


def _move_into_place(building: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Give `building` the name `folder`; at a kill `_sweep` finds the old one or the new one."""
    old = folder.with_name(f".{folder.name}{REPLACED}")
    if os.path.lexists(folder):
        if os.path.lexists(old):
            _discard(old, folder, say)
        rename_folder(folder, old, last=MANIFEST)
        crash_point("checkpoint.replaced")
    rename_folder(building, folder, last=MANIFEST)
    crash_point("checkpoint.renamed")
    sync_folder(folder.parent)
    crash_point("checkpoint.folder_synced")
    if os.path.lexists(old):
        _discard(old, folder, say)


def _discard(old: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Delete what was replaced at `folder`, or keep it under a visible name if it is not ours."""
    foreign = foreign_content(old)
    if not foreign:
        with suppress(OSError):  # a network disk keeps names of open files; `_sweep` comes again
            delete_tree(old)
        return
    kept = set_aside(old, folder)
    say(f"warning: what was in {folder} before is now in {kept}: {foreign}")


def _sweep(parent: Path, say: Callable[[str], None]) -> None:
    """Clear what a kill left: half-made folders go, one that was being replaced gets its name.

    Only folders with a name and a content of our making are touched.
    """
    for leftover in parent.glob(".*.tmp"):
        if _TEMPORARY_NAME.fullmatch(leftover.name) and _is_leftover(leftover):
            delete_tree(leftover)
    for old in parent.glob(f".*{REPLACED}"):
        if not _REPLACED_NAME.fullmatch(old.name):
            continue
        folder = old.with_name(old.name[1 : -len(REPLACED)])
        if os.path.lexists(folder):
            _discard(old, folder, say)
        else:
            rename_folder(old, folder, last=MANIFEST)


def _is_leftover(folder: Path) -> bool:
    """Return whether a temporary folder is empty, marked, or a checkpoint of ours."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not foreign_entries(folder):
        return True
    marker = read_marker(folder)
    marked = marker is not None and marker.get("kind") == TEMPORARY
    return marked or (has_manifest(folder) and not _unlisted(folder, read_manifest(folder)))


def has_manifest(folder: Path) -> bool:
    """Return whether a folder has an undamaged manifest of ours."""
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def foreign_content(folder: Path) -> str:
    """Return, in words, what a checkpoint folder has that no save wrote; "" if nothing.

    That is a folder without a valid manifest, a file that the manifest does not list, or a file of
    up to `EDITABLE_BYTES` that was changed since.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a checkpoint folder"
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "it has no valid manifest of a checkpoint"
    if unlisted := _unlisted(folder, manifest):
        return f"{unlisted[0]} is not in its manifest"
    for name, digest in manifest["files"].items():
        path = folder / name
        if path.is_file() and path.stat().st_size <= EDITABLE_BYTES and _sha256(path) != digest:
            return f"{name} was changed after it was saved"
    return ""


def _unlisted(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    known = {MANIFEST, MARKER, *manifest["files"]}
    names = (str(path.relative_to(folder)) for path in files_below(folder))
    return [n for n in names if n not in known and not is_system_file(Path(n).name)]


def _temporary(folder: Path) -> Path:
    """A hidden sibling that no other use has; `_sweep` clears what a kill leaves of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent / f".{folder.name}.{os.urandom(4).hex()}.tmp"


def _sync_tree(folder: Path) -> None:
    for path in files_below(folder):
        with path.open("rb") as file:
            sync(file.fileno(), path)
    for below in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(below)
    sync_folder(folder)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in files_below(folder)
        if path != folder / MARKER
    }


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
