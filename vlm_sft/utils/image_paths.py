"""Resolve image names inside their image root, and suggest the intended file for a missing name.

An image name must resolve to a path inside its image root. `..` and absolute names that leave the
root are always refused. Symbolic links below the root that leave it are refused unless
`follow_symlinks` is set; the root itself may be a link, or be reached through one.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from vlm_sft.errors import ImageError
from vlm_sft.utils.escape import escape_control_line, shortened

MAX_NAME: Final = 4096
"""Longest name of an image in characters; Linux's PATH_MAX."""

_TAR: Final = ".tar"

_MAX_ENTRIES: Final = 200_000
"""Maximum directory entries that are compared with a missing name."""
_MAX_SIMILAR: Final = 2_000
"""Maximum directory entries for the fuzzy search, which compares every pair of names."""
_MAX_SUBDIRECTORIES: Final = 200
_FORMS: Final[tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...]] = ("NFC", "NFD", "NFKC", "NFKD")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def image_path(root: str | Path, name: str, *, follow_symlinks: bool = False) -> Path:
    """Return the absolute path of the image `name` below `root`; it need not exist.

    Raises:
        ImageError: `image_path`: the name is a URL, or leads out of `root` by `..`, as an absolute
            path or through a symbolic link that `follow_symlinks` does not allow.
    """
    shown = shown_name(name)
    name = _without_scheme(name, shown)
    if len(name) > MAX_NAME or "\0" in name:
        problem = "has a NUL character" if "\0" in name else f"is longer than {MAX_NAME} characters"
        raise ImageError("image_path", f"the image name {shown} {problem}; no file has such a name")
    folder = os.path.abspath(root)
    path = os.path.normpath(os.path.join(folder, name))
    if not any(_is_inside(path, place) for place in (folder, _real_directory(folder))):
        message = f"the image {shown} is outside of the image root {root}"
        raise ImageError("image_path", f"{message}; set `image_root` or move the image")
    if not follow_symlinks:
        _refuse_links_outside(path, folder, shown)
    return Path(path)


def image_argument(name: str) -> Path:
    """Return the path of an image named on the command line; the file need not exist.

    Raises:
        ImageError: `image_path`: the name is a URL.
    """
    return Path(_without_scheme(name, shown_name(name))).expanduser()


def _without_scheme(name: str, shown: str) -> str:
    """Return the path of a `file:` URL, or the name; any other URL is refused."""
    if _SCHEME.match(name) is None:
        return name
    scheme = name.partition(":")[0].lower()
    if scheme == "file":
        url = urlsplit(name)
        if url.netloc not in ("", "localhost"):
            message = f"the image {shown} is on another computer; give the path of a local file"
            raise ImageError("image_path", message)
        return unquote(url.path)
    message = f"the image {shown} is a URL; images are not downloaded, give the path of a file"
    raise ImageError("image_path", message)


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _refuse_links_outside(path: str, folder: str, shown: str) -> None:
    parent, base = os.path.split(path)
    real_parent, real_folder = _real_directory(parent), _real_directory(folder)
    real = os.path.join(real_parent, base)
    try:
        if os.path.islink(real):
            real = os.path.realpath(real)
    except (OSError, ValueError):
        return  # opening the file will report the error
    if not _is_inside(real, real_folder):
        message = (
            f"the image {shown} is, or is reached through, a symbolic link to "
            f"{escape_control_line(real, 300)}, outside of the image root {folder}; if that is "
            "intended, allow it with "
            "`follow_symlinks: true` (in the configuration, next to `image_root`) or "
            "--follow-symlinks (on the command line)"
        )
        raise ImageError("image_path", message)


@lru_cache(maxsize=4096)
def _real_directory(path: str) -> str:
    return os.path.realpath(path)


def shown_name(name: str) -> str:
    """Return a name quoted for a message: on one line, of bounded length."""
    return repr(shortened(name, 200))


def current_directory_hint(path: str | Path) -> str:
    """Return the current directory as a hint for a relative path; empty for an absolute path."""
    if os.path.isabs(path):
        return ""
    return f" (relative to the current directory {escape_control_line(os.getcwd(), 300)})"


def split_member(path: Path) -> tuple[Path, str] | None:
    """Return the tar file and the name of the member that a path leads to, or None."""
    text = os.fspath(path)
    position = text.find(_TAR + os.sep)
    while position != -1:
        end = position + len(_TAR)
        if os.path.isfile(text[:end]):
            return Path(text[:end]), text[end + 1 :]
        position = text.find(_TAR + os.sep, end)
    return None


# --- suggestions for a missing file


def missing_image(path: str | Path) -> str:
    """Return the message for a missing image file: where it was searched, and what is near.

    Args:
        path: The complete path, as `image_path` returns it.
    """
    inside = split_member(Path(os.path.abspath(path)))
    if inside is not None:
        tar, name = inside
        place = escape_control_line(str(tar), 300)
        return f"no image file {shown_name(name)} in the tar file {place}; pack it again"
    folder, name = os.path.split(os.path.abspath(path))
    place = f"the folder {escape_control_line(folder, 300)}"
    if not os.path.isdir(folder):
        place += ", which does not exist"
    return (
        f"no image file {shown_name(name)} in {place}{nearest_existing(path)}; the names of a "
        "record's images start from its `image_root`, by default the directory of the file"
    )


def nearest_existing(path: str | Path, *, folder: bool = False) -> str:
    """Return a hint that names the most similar existing file; empty if there is none.

    Two names can look identical and differ in Unicode form, case or kind of slash. The hint begins
    with `; ` and is appended to a message: `; 'a.JPG' exists, which differs in case`.

    Args:
        path: The missing path.
        folder: Whether only another folder can have been meant, not a file or `path` itself, as by
            a name that may be one of a model hub.
    """
    try:
        missing = Path(os.path.abspath(path))
        found = _nearest(missing)
        if folder and (missing.exists() or not (found and missing.with_name(found[0]).is_dir())):
            return ""
    except (OSError, ValueError):
        return ""
    if found is None:
        return ""
    name, difference = found
    return f"; {shown_name(name)} exists, which differs in {difference}"


def looked_for(path: str | Path) -> str:
    """Return where a missing path was looked for and what is near, to append to a message."""
    absolute = os.path.abspath(path)
    if os.path.isfile(absolute):
        hint = ", which is a file"
    elif os.path.isdir(absolute):
        hint = ", which is a folder"
    elif os.path.islink(absolute):
        hint = ", which is a symbolic link to nothing"
    else:
        hint = nearest_existing(absolute)
    return f" (looked for {escape_control_line(absolute, 300)}){hint}"


def _nearest(path: Path) -> tuple[str, str] | None:
    """Return the similar name relative to the last existing directory, and how it differs."""
    ancestor = path.parent
    while not ancestor.is_dir():
        if ancestor == ancestor.parent:
            return None
        ancestor = ancestor.parent
    rest = path.relative_to(ancestor).parts
    parts = [part for name in rest for part in name.split("\\") if part]
    if (same := _equal_ignoring_case(ancestor, parts)) is not None:
        return "/".join(same), _difference("/".join(rest), "/".join(same))
    for skipped in range(1, len(parts)):
        if (ancestor.joinpath(*parts[skipped:])).is_file():
            return "/".join(parts[skipped:]), f"the extra folder {'/'.join(parts[:skipped])!r}"
    for folder in _subdirectories(ancestor):
        if ancestor.joinpath(folder, *parts).is_file():
            return "/".join((folder, *parts)), f"the missing folder {folder!r}"
    similar = _similar(ancestor, parts)
    if similar is None or len(parts) == 1:
        return similar
    found = "/".join((similar[0], *parts[1:]))
    return (found, similar[1]) if ancestor.joinpath(found).is_file() else None


def _equal_ignoring_case(folder: Path, parts: list[str]) -> list[str] | None:
    """Return the existing path that differs only in case, Unicode form or outer spaces."""
    found: list[str] = []
    for part in parts:
        names = _names_by_key(str(folder), folder.stat().st_mtime_ns).get(_key(part))
        if not names:
            return None
        found.append(part if part in names else names[0])
        folder = folder / found[-1]
        if len(found) < len(parts) and not folder.is_dir():
            return None
    return found


@lru_cache(maxsize=16)
def _names_by_key(folder: str, _changed: int) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name in _entries(folder):
        table.setdefault(_key(name), []).append(name)
    return table


def _entries(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number == _MAX_ENTRIES:
                return
            yield entry.name


def _key(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _difference(requested: str, found: str) -> str:
    """Return how two names with the same key differ."""
    kinds: list[str] = []
    if "\\" in requested:
        kinds.append("backslashes instead of slashes")
        requested = requested.replace("\\", "/")
    if requested.strip() != requested or found.strip() != found:
        kinds.append("leading or trailing spaces")
    requested, found = requested.strip(), found.strip()
    one, other = (unicodedata.normalize("NFKC", text) for text in (requested, found))
    if one.casefold() == other.casefold() and one != other:
        kinds.append("upper and lower case")
    if requested.casefold() != found.casefold():
        forms = " and ".join(_form(text) for text in (requested, found))
        kinds.append(f"Unicode form ({forms})")
    return " and ".join(kinds) or "spelling"


def _form(text: str) -> str:
    return next((form for form in _FORMS if unicodedata.is_normalized(form, text)), "mixed")


def _subdirectories(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found: list[str] = []
        for number, entry in enumerate(entries):
            if number == _MAX_ENTRIES or len(found) == _MAX_SUBDIRECTORIES:
                break
            if entry.is_dir():
                found.append(entry.name)
    return sorted(found)


def _similar(folder: Path, parts: list[str]) -> tuple[str, str] | None:
    names = [n for ns in _names_by_key(str(folder), folder.stat().st_mtime_ns).values() for n in ns]
    stem, extension = os.path.splitext(parts[0])
    for name in names[:_MAX_ENTRIES]:
        if os.path.splitext(name)[0] == stem and name != parts[0]:
            return name, f"the extension ({extension or 'none'} and {Path(name).suffix or 'none'})"
    if len(names) > _MAX_SIMILAR:
        return None
    # A name with another number is another image, not a misspelled one.
    names = [name for name in names if _numbers(name) == _numbers(parts[0])]
    near = difflib.get_close_matches(parts[0][:200], names, n=1, cutoff=0.8)
    return (near[0], "spelling") if near else None


def _numbers(name: str) -> list[str]:
    """Return the numbers in a name without leading zeros."""
    return [digits.lstrip("0") for digits in re.findall(r"[0-9]+", name)]
