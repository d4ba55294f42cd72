"""Resolve the name of an image below its folder, and explain a name that leads nowhere.

The rule: an image's name must lead to a place inside its image root. `..` and absolute names may
not leave it, whatever the settings. Symbolic links below the root may not leave it either, unless
`follow_symlinks` allows them; the root itself may be a link or lie behind one.
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
from vlm_sft.utils.escape import shortened, visible_line

MAX_NAME: Final = 4096
"""Longest name of an image in characters; Linux's PATH_MAX."""

_MAX_ENTRIES: Final = 200_000
"""Entries of a directory that are compared with a missing name."""
_MAX_SIMILAR: Final = 2_000
"""Entries up to which the most similar name is looked for; a slow comparison."""
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
    """Return the path of an image that is named on the command line, without looking for it.

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
            message = f"the image {shown} lies on another computer; give a file's name"
            raise ImageError("image_path", message)
        return unquote(url.path)
    message = f"the image {shown} is a URL; nothing is downloaded, give a file's name"
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
        return  # opening it reports what is wrong
    if not _is_inside(real, real_folder):
        message = (
            f"the image {shown} is, or lies behind, a symbolic link to {visible_line(real, 300)}, "
            f"outside of the image root {folder}; if that is intended, allow it with "
            "`follow_symlinks: true` (in the configuration, next to `image_root`) or "
            "--follow-symlinks (on the command line)"
        )
        raise ImageError("image_path", message)


@lru_cache(maxsize=4096)
def _real_directory(path: str) -> str:
    return os.path.realpath(path)


def shown_name(name: str) -> str:
    """Return a name as messages quote it: on one line, of bounded length."""
    return repr(shortened(name, 200))


def current_directory_hint(path: str | Path) -> str:
    """Return where a relative path was looked for, as ` (looked for in /home/me)`, else nothing."""
    if os.path.isabs(path):
        return ""
    return f" (relative to the current directory {visible_line(os.getcwd(), 300)})"


# --- a name that leads nowhere


def nearest_existing(path: str | Path) -> str:
    """Explain a missing file by the most similar one that exists; nothing if there is none.

    Two names can look identical and differ in Unicode form, case or kind of slash. The sentence
    begins with `; ` so that it can end a message: `; 'a.JPG' exists, which differs in case`.
    """
    try:
        found = _nearest(Path(os.path.abspath(path)))
    except (OSError, ValueError):
        return ""
    if found is None:
        return ""
    name, difference = found
    return f"; {shown_name(name)} exists, which differs in {difference}"


def _nearest(path: Path) -> tuple[str, str] | None:
    """Return the similar name, from where it differs on, and in what it differs."""
    ancestor = path.parent
    while not ancestor.is_dir():
        if ancestor == ancestor.parent:
            return None
        ancestor = ancestor.parent
    rest = path.relative_to(ancestor).parts
    parts = [part for name in rest for part in name.split("\\") if part]
    if (same := _spelled_otherwise(ancestor, parts)) is not None:
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


def _spelled_otherwise(folder: Path, parts: list[str]) -> list[str] | None:
    """Return names of existing entries that are equal but for case, Unicode form and spaces."""
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


def _difference(asked: str, found: str) -> str:
    """Return what two names that have the same key differ in."""
    kinds: list[str] = []
    if "\\" in asked:
        kinds.append("backslashes instead of slashes")
        asked = asked.replace("\\", "/")
    if asked.strip() != asked or found.strip() != found:
        kinds.append("spaces at an end")
    asked, found = asked.strip(), found.strip()
    one, other = (unicodedata.normalize("NFKC", text) for text in (asked, found))
    if one.casefold() == other.casefold() and one != other:
        kinds.append("upper and lower case")
    if asked.casefold() != found.casefold():
        forms = " and ".join(_form(text) for text in (asked, found))
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
    # Another number is another image, not a misspelled one.
    names = [name for name in names if _numbers(name) == _numbers(parts[0])]
    near = difflib.get_close_matches(parts[0][:200], names, n=1, cutoff=0.8)
    return (near[0], "spelling") if near else None


def _numbers(name: str) -> list[str]:
    """Return the numbers in a name without leading zeros."""
    return [digits.lstrip("0") for digits in re.findall(r"[0-9]+", name)]
