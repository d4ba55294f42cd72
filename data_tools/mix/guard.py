"""Images of evaluations, by COCO's numeric id."""

import re
from pathlib import Path
from typing import Final

from data_tools.instruct.config import GuardConfig
from data_tools.instruct.contamination import read_ids

_COCO_FILE: Final = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})")


def coco_id(path: Path) -> int | None:
    """The id in a file name of COCO's form, twelve digits; None for other names."""
    match = _COCO_FILE.fullmatch(path.stem)
    return int(match[1]) if match else None


def guarded_ids(config: GuardConfig) -> frozenset[int]:
    """The ids that the lists name.

    Raises:
        UserError: As `guard.read_ids`.
    """
    found: frozenset[int] = frozenset()
    for evaluation, files in config.lists.items():
        for name in [files] if isinstance(files, str) else files:
            found |= read_ids(Path(name), evaluation)
    return found
