"""File-system calls that also work where locks, fsync, modes or hard links are unsupported.

Network, FUSE and Windows-backed file systems refuse some calls. Such a call is skipped, with a
warning if that weakens a guarantee. Every other failure is an `OSError` that names the file.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo

Lock = Literal["taken", "held_elsewhere", "unsupported"]

UNSUPPORTED: Final = frozenset(
    {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}
)
"""Error numbers of calls that a file system does not support."""

_HELD_ELSEWHERE: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_CANNOT_RENAME: Final = UNSUPPORTED | {errno.EPERM, errno.EXDEV}
_DISK_FAILED: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})

_warned: set[str] = set()


def warn_once(text: str, *, about: str | None = None) -> None:
    """Print a warning to stderr, once per process.

    Args:
        text: The warning.
        about: Warnings with the same value are printed once; None: `text`.
    """
    about = about or text
    if about not in _warned:
        _warned.add(about)
        echo(f"warning: {text}")


def lock(descriptor: int, path: Path, *, wait: bool) -> Lock:
    """Lock a file against other processes, until it is closed or `unlock` is called.

    Where the file system has no locks, a warning names the directory and nothing is locked.

    Args:
        descriptor: The open file.
        path: Its path, for the warning.
        wait: Wait for the process that holds the lock; otherwise return `held_elsewhere`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return "held_elsewhere"
        warn_once(
            f"{path.parent}: the file system has no file locks ({error.strerror}), so a second "
            "process that writes into this directory is not detected; start only one at a time"
        )
        return "unsupported"
    return "taken"


def unlock(descriptor: int) -> None:
    """Release the lock of `lock`, if any."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def sync(descriptor: int, path: Path) -> None:
    """Wait until an open file is on the disk; warn once where that is unsupported.

    Raises:
        OSError: The disk is full or fails; the error names the file.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from None
        warn_once(
            f"{_permanent_folder(path)}: the file system cannot sync files to the disk "
            f"({error.strerror}); what was written last may be lost when the machine loses power",
            about=f"sync on device {os.fstat(descriptor).st_dev}",
        )


def _permanent_folder(path: Path) -> Path:
    """Return the nearest directory above a file that is no temporary one of this toolkit."""
    temporary = [p for p in path.parents if p.name.startswith(".") and p.name.endswith(".tmp")]
    return temporary[-1].parent if temporary else path.parent


def sync_folder(folder: Path) -> None:
    """Wait until the names in a directory are on the disk; do nothing where that is unsupported.

    Raises:
        OSError: The disk is full or fails; the error names the directory.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _DISK_FAILED:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file name to an `OSError` without one, and turn errors of Rust libraries into one.

    safetensors and tokenizers report a full disk as a text that ends in `(os error 28)`.

    Args:
        path: The file that is read or written in the block.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except UserError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def temporary_sibling(path: Path) -> Path:
    """Return an unused hidden path next to `path`, of a length that file systems accept."""
    name = os.fsencode(path.name)[:100].decode(errors="ignore")
    return path.with_name(f".{name}.{os.urandom(6).hex()}.tmp")


def create_exclusively(path: Path) -> int:
    """Create a file for writing, with the mode given by the umask, and return its descriptor.

    Raises:
        OSError: It exists, or cannot be created.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def give_ordinary_modes(folder: Path) -> None:
    """Give every file below `folder` the mode of a new file there, where that is supported.

    Libraries that write through a private temporary file leave it readable only by its owner.
    """
    probe = temporary_sibling(folder / "mode")
    descriptor = create_exclusively(probe)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    for path in files_below(folder):
        with suppress(OSError):
            if stat.S_IMODE(path.stat().st_mode) != mode:
                os.chmod(path, mode)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield everything below `folder` that is not a directory, sorted by path."""
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a synced copy where links are unsupported.

    Raises:
        OSError: The copy cannot be written; the error names the file.
    """
    try:
        os.link(source, target)
    except OSError:
        with naming(target):
            shutil.copyfile(source, target)
        with target.open("rb") as file:
            sync(file.fileno(), target)


def rename_folder(source: Path, target: Path, *, last: str) -> None:
    """Rename a directory, or move its files one by one where that is unsupported.

    Args:
        source: The directory.
        target: Its new name, which must not exist.
        last: The file that is moved last. A target without it is incomplete, so a kill between two
            files cannot leave a directory that looks complete.

    Raises:
        OSError: The target exists, or a file cannot be moved.
    """
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
    target.mkdir()
    files = sorted(files_below(source), key=lambda path: path == source / last)
    for path in files:
        moved = target / path.relative_to(source)
        moved.parent.mkdir(parents=True, exist_ok=True)
        if path == source / last:
            sync_folder(target)
        os.rename(path, moved)
    shutil.rmtree(source, ignore_errors=True)


@contextmanager
def created_above(path: Path) -> Iterator[None]:
    """Create the missing directories above `path`; remove the empty ones if the block fails.

    Raises:
        OSError: A directory cannot be created.
    """
    parents = (path.parent, *path.parent.parents)
    missing = [folder for folder in parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def existing_above(path: Path) -> Path:
    """Return `path` itself, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


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


def user_cache(name: str) -> Path:
    """Return the folder `vlm_sft/NAME` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "vlm_sft" / name


def free_bytes(place: Path) -> int | None:
    """Return the free space at `place` in bytes; None if the file system does not report it."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total > 0 else None
