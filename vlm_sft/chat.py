"""Ask a checkpoint about images, once or in a chat."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_template_option,
    heavy_imports,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import as_text
from vlm_sft.inference.limits import TEMPERATURES, is_temperature
from vlm_sft.utils.image_paths import image_argument

EXAMPLES = """examples:
  vlm-sft chat runs/stage2/final --image cat.jpg --prompt "What is this?"
  vlm-sft chat runs/stage2/final --image a.jpg --image b.jpg
commands of the interactive chat:
  /image FILE   show an image with the next question
  /reset        clear the conversation and its images
  /quit         quit (or Ctrl-D)
"""


def main(argv: Sequence[str]) -> int:
    """Answer `--prompt`, or start a chat; returns the exit code."""
    arguments = parser().read(argv)
    from vlm_sft.commands.inputs import require_images, require_model_source

    arguments.image = [image_argument(name) for name in arguments.image]
    if arguments.prompt is not None:
        arguments.prompt = as_text(arguments.prompt, "--prompt")
    require_images(arguments.image)
    require_model_source(arguments.checkpoint)
    with heavy_imports():
        from vlm_sft.commands.chat import run
    return run(arguments)


def temperature(text: str) -> float:
    """Return a temperature that logits of every dtype can be divided by."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a number") from None
    if not is_temperature(value):
        raise argparse.ArgumentTypeError(f"expected {TEMPERATURES}")
    return value


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft chat", __doc__, EXAMPLES)
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image for the first question; may be repeated",
    )
    add("--prompt", metavar="TEXT", help="answer this question and exit")
    add(
        "--max-new-tokens",
        type=whole_number(1, 10**6),
        default=256,
        metavar="N",
        help="maximum length of an answer in tokens (default: 256)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 (default) takes the most likely token; 0.01 to 100 samples",
    )
    add(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        metavar="N",
        help="seed of the sampling",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    return parser


if __name__ == "__main__":
    run_command(main)
