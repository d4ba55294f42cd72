"""Make text from outside safe to show: nothing in it commands a terminal or reorders a line."""

from typing import Final

_REORDERING: Final = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
"""Line separators and marks that change the order in which other letters are shown."""

_INVISIBLE: Final = (0x200B, *range(0x2060, 0x2066), *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFC))
"""Characters that show nothing, so that two different texts look identical."""

_TAGS: Final = range(0xE0000, 0xE0080)
"""Invisible copies of ASCII, with which a text can carry a second, hidden one."""

_VISIBLE: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) != "\n"},
    **{code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_REORDERING, *_INVISIBLE, 0xFEFF, 0xFFFE, 0xFFFF)},
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},
    **{code: f"\\U{code:08x}" for code in _TAGS},
}

INVISIBLE_CODES: Final = tuple(_VISIBLE)
"""Code points that `visible` replaces."""

MAX_SHOWN: Final = 4_000
"""Longest message in characters; of a longer one the middle is left out."""


def visible(text: str) -> str:
    """Return text in which nothing commands a terminal or reorders a line; line ends stay.

    Control characters become their symbols (`␛`); marks that change the order of letters,
    characters that show nothing, and what no file can hold become escapes with their number.
    """
    return text.translate(_VISIBLE)


def visible_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return `visible` text on one line (`␊` for a line end), shortened to `limit` characters."""
    return shortened(visible(shortened(text, limit)).replace("\n", "\u240a"), limit)


def shortened(text: str, limit: int = MAX_SHOWN) -> str:
    """Return `text`, its middle left out if it is longer than `limit` characters (64 or more)."""
    if len(text) <= limit:
        return text
    note = f" … [{len(text):,} characters] … "
    kept = limit - len(note)
    return text[: kept - kept // 4] + note + text[len(text) - kept // 4 :]
