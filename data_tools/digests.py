"""Digests of files, and numbers that depend on a seed and on names alone."""

import hashlib
from pathlib import Path

from vlm_sft.utils.reading import open_regular


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex; the file is read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hashed(*parts: object) -> int:
    """Return a number below 2^64 that depends on the parts alone, on every machine and version."""
    text = "/".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
