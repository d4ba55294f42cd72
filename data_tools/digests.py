"""Files known by their content."""

import hashlib
from pathlib import Path

from vlm_sft.utils.reading import open_regular


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, read piece by piece.

    Raises:
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
