"""Remove a secret from untrusted text, in whatever form it is repeated there."""

import base64
import re
from collections.abc import Iterator
from typing import Final

REMOVED: Final = "[key removed]"

_BETWEEN: Final = (
    r"(?:[\s\x00\u00ad\u200b-\u200f\u2060\ufeff]|\\{1,8}(?:[nrtbf\"'/]|u(?:200[b-fB-F]|2060|00[aA][dD])"
    r"|\r?\n)|=\r?\n|\"\s{0,4}[+,]?\s{0,4}\"){0,3}"
)
"""What may separate two characters: line breaks, invisible characters, ends of JSON strings."""


class Remover:
    """Removes one secret: as it is, percent-encoded, escaped as in JSON or HTML, hex or base64.

    Args:
        secret: ASCII without spaces. None or a short one removes nothing.
    """

    def __init__(self, secret: str | None) -> None:
        self._patterns: list[re.Pattern[str]] = []
        if secret is not None and len(secret) >= SHORTEST:
            plain = _BETWEEN.join(_letter(letter) for letter in secret)
            hexadecimal = _BETWEEN.join(secret.encode().hex())
            self._patterns.append(re.compile(f"{plain}|{hexadecimal}", re.IGNORECASE))
            encoded = [_BETWEEN.join(map(_letter, text)) for text in _base64_forms(secret)]
            self._patterns.append(re.compile("|".join(encoded)))

    def from_text(self, text: str) -> str:
        """Return the text with a note in place of the secret."""
        for pattern in self._patterns:
            text = pattern.sub(REMOVED, text)
        return text

    def from_bytes(self, data: bytes) -> bytes:
        """Return bytes of any encoding that keeps ASCII, UTF-16 among them, without the secret."""
        text = data.decode("latin-1")
        cleaned = self.from_text(text)
        return data if cleaned == text else cleaned.encode("latin-1")


SHORTEST: Final = 8
"""Shorter values are not removed: this would damage unrelated text."""


def _letter(letter: str) -> str:
    """Return a pattern for all ways to write a character in JSON, HTML, URLs and MIME."""
    code = ord(letter)
    hexadecimal, octal = f"{code:02x}", f"{code:03o}"
    escaped = (
        rf"\\{{0,8}}{re.escape(letter)}",
        rf"\\{{1,8}}(?:u00{hexadecimal}|u\{{0{{0,6}}{hexadecimal}\}}|x{hexadecimal}|{octal})",
        rf"%(?:25){{0,4}}{hexadecimal}",
        rf"={hexadecimal}",
        rf"&(?:amp;){{0,4}}\#(?:0{{0,6}}{code}|x0{{0,6}}{hexadecimal});?",
    )
    return f"(?:{'|'.join(escaped)})"


def _base64_forms(secret: str) -> Iterator[str]:
    """Yield the base64 characters that the secret certainly has, for each byte alignment."""
    data = secret.encode()
    for before in range(3):
        whole = base64.b64encode(b"\0" * before + data).decode().rstrip("=")
        # The first characters hold bits of the preceding bytes, the last one of the following.
        certain = whole[(0, 2, 3)[before] : len(whole) - (1 if (before + len(data)) % 3 else 0)]
        yield certain
        if certain != (safe := certain.replace("+", "-").replace("/", "_")):
            yield safe
