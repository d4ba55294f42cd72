"""Run a command: `vlm-sft COMMAND ...` or `python -m vlm_sft COMMAND ...`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from vlm_sft.commands.parser import CommandParser, group_parser
from vlm_sft.commands.registry import SCRIPT, SUBCOMMANDS
from vlm_sft.commands.run_command import run_command

DATA: Final = "data"
COMPLETION: Final = "completion"
COMMANDS: Final = {
    **SUBCOMMANDS,
    DATA: "build instruction data from COCO annotations",
    COMPLETION: "print a completion script for bash or zsh",
}
"""What each command does, in the order of the help text."""

EXAMPLES = """\
examples:
  vlm-sft check configs/tiny/stage1.yaml
  vlm-sft stage1 configs/tiny/stage1.yaml output_dir=runs/mine
  vlm-sft config reference train.packing
  vlm-sft data plan configs/instruct/rules.yaml
  eval "$(vlm-sft completion bash)"

Each command is also a module, e.g. for several GPUs:
  torchrun --nproc-per-node 8 -m vlm_sft.stage1 configs/llava-1.5/stage1.yaml
`vlm-sft data` is the module data_tools."""


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names and return its exit code."""
    if not argv:
        parser().print_help(sys.stderr)
        return 2
    name, *arguments = argv
    if name in SUBCOMMANDS:
        return int(import_module(module_of(name)).main(arguments))
    if name == DATA:
        return int(import_module("data_tools.__main__").main(arguments))
    if name == COMPLETION:
        return _print_completion(arguments)
    parser().read(argv[:1])  # handles --help and --version, and refuses everything else
    return 2


def run() -> None:
    """Run the installed script `vlm-sft`."""
    run_command(main)


def module_of(name: str) -> str:
    """Return the module of a command, with the functions `main` and `parser`."""
    package = name in ("config", "errors", "export")
    return f"vlm_sft.{name}.__main__" if package else f"vlm_sft.{name}"


def parser() -> CommandParser:
    """Return the parser of the script's own options and of the command's name."""
    about = "Turn a vision encoder and a language model into a vision-language model."
    parser = group_parser(SCRIPT, about, COMMANDS, EXAMPLES)
    assert parser.description is not None
    parser.description += f"\n\n`{SCRIPT} COMMAND --help` describes a command."
    return parser


def completion_parser() -> CommandParser:
    """Return the parser of `vlm-sft completion`."""
    parser = CommandParser(
        f"{SCRIPT} {COMPLETION}",
        "Print a script that completes commands, options, files and settings in a shell.",
        'examples:\n  eval "$(vlm-sft completion bash)"    # in ~/.bashrc\n'
        '  vlm-sft completion zsh > "${fpath[1]}/_vlm-sft"',
    )
    parser.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help="bash or zsh")
    return parser


def _print_completion(argv: Sequence[str]) -> int:
    shell = completion_parser().read(argv).shell
    from vlm_sft.commands.completion import completion_script
    from vlm_sft.config.reference import all_settings

    modules = {name: import_module(module_of(name)) for name in SUBCOMMANDS}
    parsers = {
        name: module.parsers() if hasattr(module, "parsers") else module.parser()
        for name, module in modules.items()
    }
    parsers[DATA] = import_module("data_tools.__main__").all_parsers()
    parsers[COMPLETION] = completion_parser()
    settings = {
        DATA: all_settings({DATA: import_module("data_tools.instruct.config").InstructConfig}),
        "mix": all_settings({"mix": import_module("data_tools.mix.config").MixConfig}),
        "select": all_settings({"select": import_module("data_tools.select.config").SelectConfig}),
    }
    print(completion_script(shell, parsers, COMMANDS, settings))
    return 0


if __name__ == "__main__":
    run()
