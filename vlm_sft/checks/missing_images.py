"""Say which images of a file of records are missing: one by one, or many in one sentence."""

import os
from pathlib import Path
from typing import Final

from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.filtering import missing_images
from vlm_sft.errors import RecordError
from vlm_sft.utils.escape import escape_control_line
from vlm_sft.utils.image_paths import nearest_existing, shown_name

FEW: Final = 3
"""Missing images that are told one by one; of more, this many are examples."""


class MissingImages:
    """The records of a file whose images are missing.

    Args:
        file: The file of records.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._first: list[tuple[RecordError, Path]] = []
        self._count = 0

    def add(self, record: Conversation, error: RecordError) -> None:
        """Add a record that has an `image_missing` error."""
        self._count += 1
        if len(self._first) < FEW:
            self._first.append((error, missing_images(record.images)[0]))

    def sentences(self, total: int) -> list[str]:
        """Return a sentence for each record, or one for all if there are more than three.

        Args:
            total: Number of the file's records.
        """
        if self._count <= FEW:
            return [f"bad record: {error.code}: {error}" for error, _ in self._first]
        root = os.path.abspath(self._file.images_start_in())
        paths = [path for _, path in self._first]
        names = ", ".join(shown_name(os.path.relpath(path, root)) for path in paths)
        place = f"the folder {escape_control_line(root, 300)}"
        if not os.path.isdir(root):
            place += ", which does not exist"
        hint = nearest_existing(paths[0] if os.path.isdir(root) else root)
        return [
            f"bad records: {self._first[0][0].code}: {self._file.path}: {self._count:,} of "
            f"{total:,} records name an image that does not exist, e.g. {names}; searched in "
            f"{place}{hint}; set image_root of this file to the folder where these names start"
        ]
