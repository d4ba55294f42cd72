"""Print the error codes: `vlm-sft errors VS332`, or all of them as Markdown."""

import difflib
from collections.abc import Sequence

from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.errors.codes import ALL, CODES, ErrorCode, page

EXAMPLES = """\
examples:
  vlm-sft errors VS332
  vlm-sft errors image_missing
  vlm-sft errors > docs/errors.md"""


def main(argv: Sequence[str]) -> int:
    """Print one error, or `docs/errors.md`, and return the exit code."""
    wanted = parser().read(argv).code
    if wanted is None:
        print(page(), end="")
        return 0
    code = _find(wanted)
    print(f"{code} {code.name}\n{code.meaning}\n{code.remedy}")
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    about = "Print what an error means and what to do, or all errors as Markdown."
    parser = CommandParser("vlm-sft errors", about, EXAMPLES)
    help = "code or name of an error, e.g. VS332 (default: all)"
    parser.add_argument("code", metavar="CODE", nargs="?", help=help)
    return parser


def _find(text: str) -> ErrorCode:
    """Return the error of a code, a number or a name; case and dashes do not matter."""
    name = text.strip().lower().replace("-", "_")
    digits = name.removeprefix("vs")
    if digits.isascii() and digits.isdigit():
        found = [code for code in ALL if code.number == int(digits)]
        hint = f"the codes are {ALL[0]} to {ALL[-1]}; `vlm-sft errors` prints all"
    else:
        found = [CODES[name]] if name in CODES else []
        near = difflib.get_close_matches(name, CODES, n=1)
        hint = f"did you mean {near[0]}?" if near else "`vlm-sft errors` prints all"
    if not found:
        raise UserError(f"CODE {text}: no such error; {hint}")
    return found[0]


if __name__ == "__main__":
    run_command(main)
