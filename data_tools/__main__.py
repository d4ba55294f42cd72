"""The data commands: `vlm-sft data COMMAND ...` or `python -m data_tools COMMAND ...`."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

from data_tools.instruct.__main__ import main as run_stage
from data_tools.instruct.stages import COMMANDS, parser, parsers
from vlm_sft.commands import registry
from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command

TOOLS: Final = {
    module.removeprefix("data_tools."): about
    for module, about in registry.COMMANDS.items()
    if module.startswith("data_tools.")
    and module.count(".") == 1
    and module != "data_tools.instruct"
}
"""The commands that take no configuration of a run; `vlm-sft data NAME` runs `data_tools.NAME`."""


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names and return its exit code."""
    if not argv or argv[0] not in {**COMMANDS, **TOOLS}:
        parser(TOOLS).read(argv[:1])  # handles --help and --version, and refuses everything else
        return 2
    name, *words = argv
    # `verify` is a stage of a run, and with --records the command for records of others.
    of_records = any(word.partition("=")[0] == "--records" for word in words)
    if name in TOOLS and (name not in COMMANDS or of_records):
        return int(_module(name).main(words))
    return run_stage(argv)


def all_parsers() -> Mapping[str, CommandParser]:
    """Return the parser of each command's own arguments."""
    return {**{name: _module(name).parser() for name in TOOLS}, **parsers()}


def _module(name: str) -> Any:
    return import_module(
        f"data_tools.{name}{'.__main__' if name in ('mix', 'review', 'select') else ''}"
    )


if __name__ == "__main__":
    run_command(main)
