"""Run the project's commands for a study, each in a process of its own."""

import subprocess
import sys

from vlm_sft.errors import UserError
from vlm_sft.utils.malloc import fast_malloc_environment


def run_python(*arguments: str) -> None:
    """Run Python with these arguments, where the user sees what it prints.

    Raises:
        UserError: The command failed; it has said why.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=fast_malloc_environment(), check=False)
    if done.returncode:
        shown = " ".join(arguments[:2])
        raise UserError(f"python {shown} ended with code {done.returncode}; its reason is above")
