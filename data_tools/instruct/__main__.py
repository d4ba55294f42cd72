"""Build instruction data from COCO's annotations, stage by stage.

Every command takes the run's YAML file (configs/instruct/) and may be given again: what is there is
not made or paid for twice.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

EXAMPLES = """examples:
  python -m data_tools.instruct plan configs/instruct/rules.yaml        # count, tokens, money
  python -m data_tools.instruct run configs/instruct/rules.yaml        # every stage in turn
  python -m data_tools.instruct generate my.yaml teacher.concurrency=64 limits.usd=20
  python -m data_tools.instruct verify my.yaml                         # free, on the answers there
  python -m data_tools.instruct explain my.yaml 000000033471-detail-0
"""

OVERWRITE: Final = "--overwrite"
"""Option of every stage: replace files in `output_dir` that were changed since."""

STAGES = {
    "index": ("index", "read and check the annotations"),
    "plan": ("plan.command", "choose images, write the requests, estimate tokens and money"),
    "generate": ("generate.command", "ask the teacher what has no answer yet"),
    "verify": ("verify.command", "read the answers and check their claims against the annotations"),
    "clean": ("clean.command", "take out duplicates, balance answers and types"),
    "export": ("export", "write the training files"),
    "report": ("report.command", "one HTML page of what was made, and of what was not"),
}


def main(argv: Sequence[str]) -> int:
    """Run the stage `argv` names; returns the exit code."""
    arguments = parser().read(argv[:2])  # what follows is overrides and the stage's options
    overrides = [word for word in argv[2:] if _is_override(word)]
    options = [word for word in argv[2:] if not _is_override(word)]
    overwrite = arguments.command != "explain" and OVERWRITE in options
    if overwrite:
        options.remove(OVERWRITE)
    from data_tools.instruct.config import InstructConfig
    from data_tools.instruct.run_folder import own_for
    from vlm_sft.config import loading as settings

    config = settings.load(InstructConfig, arguments.config, overrides)
    # `plan` indexes by itself: to begin with `index` would read and tell everything twice.
    commands = list(STAGES)[1:] if arguments.command == "run" else [arguments.command]
    if len(commands) > 1 and options:
        raise UserError(
            f"run takes no options, found {options[0]!r}: they belong to the stages; give "
            "KEY=VALUE overrides here, or run the stages one by one"
        )
    if arguments.command != "explain":
        own_for(config, Path(arguments.config), commands, overwrite=overwrite)
    for command in commands:
        stage = import_module(f"data_tools.instruct.{_module_of(command)}")
        stage.command(config, options)
    if arguments.command == "run":
        _repeat_refused(Path(config.output_dir))
    return 0


def _repeat_refused(output_dir: Path) -> None:
    """Print again at the end how many images the guard refused; the plan's lines are far above."""
    from data_tools.instruct.plan.command import refused_line
    from data_tools.instruct.run_folder import RunFolder
    from vlm_sft.utils.console import echo

    if (line := refused_line(RunFolder(output_dir))) is not None:
        echo(line, file=sys.stdout)


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _module_of(command: str) -> str:
    return "explain" if command == "explain" else STAGES[command][0]


def parser() -> CommandParser:
    """Return the parser of the stage and its configuration."""
    stages = "\n".join(f"  {name:<9} {text}" for name, (_, text) in STAGES.items())
    parser = CommandParser(
        "python -m data_tools.instruct",
        f"{__doc__}\ncommands:\n{stages}\n  run       all of these in turn\n"
        "  explain   one sample: what was shown, asked, answered and found\n\n"
        "Files in output_dir that were edited since they were written are replaced only with "
        "--overwrite.",
        EXAMPLES,
        takes_settings=True,
        usage="%(prog)s COMMAND CONFIG [KEY=VALUE ...] [options of the command]",
    )
    commands = [*STAGES, "run", "explain"]
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of those above")
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    return parser


if __name__ == "__main__":
    run_command(main)
