"""Named places where a test can end the process at once, as a power cut or `kill -9` would.

`VLM_SFT_CRASH_AT=checkpoint.renamed` ends the process with SIGKILL the first time it gets there,
`checkpoint.file:3` the third time. Nothing happens without that variable.
"""

import os
import signal

VARIABLE = "VLM_SFT_CRASH_AT"

CRASH_POINTS = (
    "rehearsal.written",
    "rehearsal.wiped",
    "resume.verified",
    "resume.loaded",
    "step.gradient",
    "step.updated",
    "step.recorded",
    "checkpoint.captured",
    "checkpoint.begun",
    "checkpoint.component",
    "checkpoint.files_synced",
    "checkpoint.manifest",
    "checkpoint.replaced",
    "checkpoint.renamed",
    "checkpoint.folder_synced",
    "checkpoint.verified",
    "checkpoint.pruning",
    "checkpoint.pruned",
    "final.copied",
    "final.renamed",
    "final.verified",
)

_reached: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Die here if the environment says so.

    Raises:
        ValueError: `name` is none of `CRASH_POINTS`, which is a fault of this program.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    if name not in CRASH_POINTS:
        raise ValueError(f"{name} is not among CRASH_POINTS")
    place, _, count = wanted.partition(":")
    _reached[name] = _reached.get(name, 0) + 1
    if place == name and _reached[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
