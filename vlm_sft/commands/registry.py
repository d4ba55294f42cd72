"""Name the modules that `python -m` runs, end them on Ctrl-C, and refuse to run the others."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Final

COMMANDS: Final = {
    "vlm_sft.stage1": "train the projector",
    "vlm_sft.stage2": "train the projector and the language model",
    "vlm_sft.check": "find what a run would fail on",
    "vlm_sft.show": "show records with their trained tokens",
    "vlm_sft.plan": "estimate memory and time",
    "vlm_sft.chat": "talk to a checkpoint",
    "vlm_sft.evaluate": "measure a checkpoint",
    "vlm_sft.export": "write a checkpoint for transformers",
    "vlm_sft.export.reload": "compare an export with its origin, started by the export",
    "vlm_sft.report": "write a run as an HTML page",
    "vlm_sft.errors": "print the table of errors",
    "data_tools.build_coco": "build records from COCO annotations",
    "data_tools.instruct": "have a language model write records",
    "data_tools.instruct.verification.codes": "print the table of its codes",
    "data_tools.make_scenes": "compose scenes with known content",
    "data_tools.mix": "mix record files",
}
"""What each command does, by the name that `python -m` takes."""


def refuse_other_modules(package: str) -> None:
    """End a `python -m MODULE` of this package whose module is no command, with one sentence.

    Python imports a package before it runs a module in it, and `sys.argv[0]` is `-m` meanwhile; a
    module without a command would then run, do nothing and succeed.

    Args:
        package: The package that is imported.
    """
    name = _asked_module() if sys.argv and sys.argv[0] == "-m" else ""
    if name.split(".")[0] != package:
        return
    if name in COMMANDS:
        _end_on_ctrl_c()
        return
    from vlm_sft.utils.console import say  # imports rich, which a command should not wait for

    known = ", ".join(command for command in COMMANDS if command.startswith(f"{package}."))
    say(f"error: {name} is not a command; the commands are {known}")
    sys.exit(2)


def _end_on_ctrl_c() -> None:
    """Have Ctrl-C end a command's imports with one line, until `run_command` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)


def raise_on_ctrl_c() -> None:
    """Have Ctrl-C raise `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_at_once(_signal: int, _frame: FrameType | None) -> None:
    """Handle SIGINT while nothing was started: print one line and end the process with 130."""
    with suppress(OSError, ValueError, AttributeError):  # closed, full or missing
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b"stopped by Ctrl-C before the command started\n")
    os._exit(130)


def _asked_module() -> str:
    """Return the module that Python's own command line names after `-m`."""
    for number, argument in enumerate(sys.orig_argv):
        if argument == "-m":
            return "".join(sys.orig_argv[number + 1 : number + 2])
        if argument.startswith("-m"):
            return argument[2:]
    return ""
