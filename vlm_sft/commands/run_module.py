"""Run another command of the toolkit in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence

from vlm_sft.errors import UserError


def run_module(module: str, arguments: Sequence[str]) -> None:
    """Run `python -m MODULE ARGUMENTS`, so that no state of one command is left for the next.

    Raises:
        UserError: It failed; it has said why.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        command = " ".join(["python -m", module, *arguments])
        raise UserError(f"stopped, because this command failed: {command}")
