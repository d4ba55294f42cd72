"""Foreign text made safe to look at, on a terminal or a page."""

from typing import Final

_REORDERING: Final = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
"""Line separators and marks that change the order in which other letters are shown."""

_VISIBLE: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) != "\n"},
    **{code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_REORDERING, 0xFEFF, 0xFFFE, 0xFFFF)},
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},
}


def visible(text: str) -> str:
    """Text in which nothing commands a terminal or reorders a line; line ends stay.

    Control characters become their pictures (`␛`); marks that change the order of letters, and
    what no file can hold, become escapes with their number.
    """
    return text.translate(_VISIBLE)
