"""The commands: every module that `python -m` runs, and what happens before it is imported."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Final, NoReturn

COMMANDS: Final = {
    "vlm_sft": "run a command of vlm-sft",
    "vlm_sft.init": "write the configurations of a new model",
    "vlm_sft.stage1": "train the projector on image-caption pairs",
    "vlm_sft.stage2": "train the projector and the language model on conversations",
    "vlm_sft.check": "find out before a run what it would fail on",
    "vlm_sft.plan": "estimate memory, speed and duration of a run",
    "vlm_sft.show": "show records with their trained tokens",
    "vlm_sft.chat": "ask a checkpoint about images",
    "vlm_sft.evaluate": "measure a checkpoint on questions with known answers",
    "vlm_sft.sample": "sample several answers to each question, and keep the best as data",
    "vlm_sft.serve": "serve a checkpoint through an OpenAI-compatible API",
    "vlm_sft.score": "score answers that are in a file",
    "vlm_sft.export": "write a checkpoint for other programs",
    "vlm_sft.export.reload": "compare an export with its origin; started by the export",
    "vlm_sft.export.gguf.run_llama_cpp": "ask llama.cpp about an export; started by the export",
    "vlm_sft.report": "write the report of a run as an HTML page",
    "vlm_sft.config": "print a resolved configuration, or the reference of all settings",
    "vlm_sft.errors": "print the table of error codes",
    "data_tools": "run a command of vlm-sft data",
    "data_tools.build_coco": "build records from COCO annotations",
    "data_tools.instruct": "build instruction data, stage by stage",
    "data_tools.instruct.verify.codes": "print the table of its codes",
    "data_tools.make_scenes": "compose scenes with known content",
    "data_tools.mix": "mix record files",
    "data_tools.overlap": "report evaluation images that were trained on",
    "data_tools.pope": "write POPE questions about the existence of objects",
    "data_tools.review": "review samples by eye on a local page",
    "data_tools.select": "select records by scores, beside a random part of the same size",
    "data_tools.split": "hold out records whose images no training record has",
    "data_tools.verify": "check records of others (--records)",
}
"""What each command does, by the name that `python -m` takes."""

SCRIPT: Final = "vlm-sft"
"""Name of the installed script, which runs `vlm_sft.__main__`."""

SUBCOMMANDS: Final = {
    module.partition(".")[2]: about
    for module, about in COMMANDS.items()
    if module.startswith("vlm_sft.") and not module.startswith("vlm_sft.export.")
}
"""What each command of `vlm-sft` does, by its name; `vlm-sft NAME` runs `vlm_sft.NAME`."""


def prepare_command(package: str) -> None:
    """Prepare for a command of `package` if this process was started to run one.

    Called while the package is imported, which Python does before it runs a module of it. Ctrl-C
    then ends the process with one line. A module that is not a command is refused: it would
    otherwise run, do nothing, and exit with 0.

    Args:
        package: The package that is being imported.
    """
    if not sys.argv:
        return
    if os.path.basename(sys.argv[0]) == SCRIPT:
        if package == "vlm_sft":  # `vlm-sft data` imports data_tools when it is already running
            _start_command()
        return
    # `sys.argv[0]` is `-m` until Python has found the module that it is to run.
    module = _requested_module() if sys.argv[0] == "-m" else ""
    if module.split(".")[0] != package:
        return
    if module in COMMANDS:
        _start_command()
        return
    from vlm_sft.utils.console import echo  # imports rich, which commands do not need to start

    known = ", ".join(command for command in COMMANDS if command.startswith(f"{package}."))
    echo(f"error: {module} is not a command; the commands are {known}")
    sys.exit(2)


def _start_command() -> None:
    """Make Ctrl-C end the process with one line until `run_command` handles it, and exit fast."""
    atexit.register(_end_process)  # registered first, so called after all other handlers
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


_codes: Final[list[int]] = []


def exit_command(code: int) -> NoReturn:
    """Exit from a command: as `sys.exit`, but without the seconds in which Python frees torch."""
    _codes.append(code)
    sys.exit(code)


def _end_process() -> None:
    """End the process with the code of `exit_command`, if that was called.

    Threads have been joined, and all later handlers called. What is left is to free a million
    objects one by one, which the operating system does at once. So nothing may depend on the end
    of the interpreter: files are closed by those who opened them.
    """
    if not _codes:
        return
    code = _codes[-1]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # of what a thread or handler printed; `run_command` had flushed
            code = code or 2
            with suppress(OSError):
                os.write(2, f"error: {error.strerror}\n".encode())
        except (ValueError, AttributeError):  # closed or missing
            pass
    os._exit(code)


def raise_on_ctrl_c() -> None:
    """Make Ctrl-C raise `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_at_once(_signal: int, _frame: FrameType | None) -> None:
    """Handle SIGINT before any work has started: print one line and exit with 130."""
    with suppress(OSError, ValueError, AttributeError):  # stdout is closed, full or missing
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b"stopped by Ctrl-C before the command started\n")
    os._exit(130)


def _requested_module() -> str:
    """Return the module name after `-m` on the interpreter's own command line."""
    for position, argument in enumerate(sys.orig_argv):
        if argument == "-m":
            return "".join(sys.orig_argv[position + 1 : position + 2])
        if argument.startswith("-m"):
            return argument[2:]
    return ""
