"""Escape control, bidirectional and invisible characters of untrusted text before showing it."""

from typing import Final

_REORDERING: Final = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
"""Line separators and bidirectional marks, which change the order of the characters on screen."""

_INVISIBLE: Final = (0x200B, *range(0x2060, 0x2066), *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFC))
"""Characters without a glyph, with which two different texts look identical."""

_TAGS: Final = range(0xE0000, 0xE0080)
"""Unicode tag characters: invisible copies of ASCII that can hide a second text in the first."""

_ESCAPES: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) != "\n"},
    **{code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_REORDERING, *_INVISIBLE, 0xFEFF, 0xFFFE, 0xFFFF)},
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},
    **{code: f"\\U{code:08x}" for code in _TAGS},
}

INVISIBLE_CODES: Final = tuple(_ESCAPES)
"""Code points that `escape_control` replaces."""

MAX_SHOWN: Final = 4_000
"""Longest message in characters; the middle of a longer one is cut out."""


def escape_control(text: str) -> str:
    r"""Return `text` with every character escaped that a terminal would interpret or hide.

    Control characters become their symbols (`␛`). Bidirectional marks, invisible characters and
    code points that UTF-8 cannot encode become escapes such as `\u202e`. Newlines are kept.
    """
    return text.translate(_ESCAPES)


def encodable(text: str) -> str:
    """Return `text` with U+FFFD for surrogates, which JSON can hold but no UTF-8 file.

    A pair of them becomes its character.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def escape_control_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return `text` escaped, on one line (`␊` for a newline), in at most `limit` characters."""
    return shortened(escape_control(shortened(text, limit)).replace("\n", "\u240a"), limit)


def shortened(text: str, limit: int = MAX_SHOWN) -> str:
    """Return `text`, with its middle cut out if it is longer than `limit` (>= 64) characters."""
    if len(text) <= limit:
        return text
    note = f" … [{len(text):,} characters] … "
    # Three quarters of the room for the beginning, one quarter for the end.
    kept = limit - len(note)
    return text[: kept - kept // 4] + note + text[len(text) - kept // 4 :]
