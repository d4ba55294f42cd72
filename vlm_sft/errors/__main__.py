"""Print all error codes as Markdown: `vlm-sft errors > docs/errors.md`."""

from collections.abc import Sequence

from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors.codes import page

EXAMPLES = "example:\n  vlm-sft errors > docs/errors.md"


def main(argv: Sequence[str]) -> int:
    """Print `docs/errors.md` and return the exit code."""
    parser().read(argv)
    print(page(), end="")
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    about = "Print all error codes with their meanings and remedies, as Markdown."
    return CommandParser("vlm-sft errors", about, EXAMPLES)


if __name__ == "__main__":
    run_command(main)
