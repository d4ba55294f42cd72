"""Check that a damaged checkpoint is detected before the first step and the previous one used."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.checkpoint.store import CheckpointStore


@dataclass
class Found:
    """The numbers of damages tried and detected.

    Attributes:
        tried: Damages tried.
        seen: Of those, the ones reported and skipped in favor of the previous checkpoint.
        missed: A sentence for each of the others.
    """

    tried: int = 0
    seen: int = 0
    missed: list[str] = field(default_factory=list)


def flips(run: Path, count: int, *, seed: int) -> Iterator[Found]:
    """Flip one random bit of a random file of the newest checkpoint, `count` times."""
    draw = random.Random(seed)
    files = _newest_files(run)
    found = Found()
    for _ in range(count):
        path = draw.choice(files)
        whole = path.read_bytes()
        place = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        _try(run, path, bytes(damaged), f"bit {place} of {path.name} flipped", found)
        yield found


def truncations(run: Path) -> Iterator[Found]:
    """Cut every file of the newest checkpoint at every 4 KiB, at 1 byte less and to nothing."""
    found = Found()
    for path in _newest_files(run):
        size = path.stat().st_size
        for length in sorted({*range(0, size, 4096), size // 2, size - 1}):
            cut = path.read_bytes()[:length]
            _try(run, path, cut, f"{path.name} cut at {length} of {size}", found)
            yield found


def losses(run: Path) -> Iterator[Found]:
    """Delete each file of the newest checkpoint, and add one that does not belong there."""
    found = Found()
    for path in _newest_files(run):
        _try(run, path, None, f"{path.name} gone", found)
        yield found
    stranger = _newest_files(run)[0].parent / "stranger.safetensors"
    _try(run, stranger, b"x", "a file too many", found)
    stranger.unlink(missing_ok=True)
    yield found


def _try(run: Path, path: Path, content: bytes | None, what: str, found: Found) -> None:
    """Damage one file, look for the newest checkpoint, and restore the file."""
    logged: list[str] = []
    store = CheckpointStore(run, {}, log=logged.append)
    newest, before = store.step_folders()[:2]
    whole = path.read_bytes() if path.exists() else None
    _put(path, content)
    found.tried += 1
    chosen: object = None
    try:
        chosen = store.newest()
    except Exception as error:  # any exception means that the fallback failed
        chosen = error
    finally:
        _put(path, whole)
    folder = getattr(chosen, "folder", None)
    if folder == before and len(logged) == 1 and newest.name in logged[0]:
        found.seen += 1
    else:
        found.missed.append(f"{what}: {folder or chosen!r}, {logged}")


def _put(path: Path, content: bytes | None) -> None:
    write: Callable[[], object] = path.unlink if content is None else lambda: _write(path, content)
    write()


def _write(path: Path, content: bytes | None) -> None:
    assert content is not None
    path.unlink(missing_ok=True)  # never through a hard link into another checkpoint
    path.write_bytes(content)


def _newest_files(run: Path) -> list[Path]:
    newest = CheckpointStore(run, {}).step_folders()[0]
    return sorted(path for path in newest.rglob("*") if path.is_file())
