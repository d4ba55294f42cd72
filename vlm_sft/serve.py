"""Serve a checkpoint through an OpenAI-compatible HTTP API."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_template_option,
    heavy_imports,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.libraries import import_extra

EXAMPLES: Final = """examples:
  vlm-sft serve runs/stage2/final
  vlm-sft serve runs/stage2/final --ui
  vlm-sft serve runs/stage2/final --ui --compare runs/stage2_lora/final
  vlm-sft serve runs/stage2/final --host 0.0.0.0 --port 8080 --api-key-env SERVER_KEY

With the openai package:
  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(model="final", messages=[{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
      {"type": "text", "text": "What is this?"}]}])

For many users on a GPU, export the checkpoint and serve it with vLLM or SGLang (docs/serving.md).
"""


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; return the exit code."""
    arguments = parser().read(argv)
    from vlm_sft.commands.inputs import require_model_source

    require_model_source(arguments.checkpoint)
    if arguments.compare is not None:
        require_model_source(arguments.compare)
    if arguments.image_dir is not None:
        require_folder("--image-dir", arguments.image_dir)
        arguments.image_dir = arguments.image_dir.resolve()
    for name in ("fastapi", "uvicorn"):
        import_extra(name, "serve")
    with heavy_imports():
        from vlm_sft.commands.serve import run
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run(arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft serve", __doc__, EXAMPLES)
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    add("--port", type=whole_number(1, 65535), default=8000, metavar="N", help="default: 8000")
    add(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the key that requests must carry (default: no key)",
    )
    add("--ui", action="store_true", help="serve a chat page at /")
    add(
        "--compare",
        type=Path,
        metavar="CHECKPOINT2",
        help="serve a second model too; the page shows both answers side by side",
    )
    add("--served-name", metavar="NAME", help="the model's name (default: the checkpoint's folder)")
    add(
        "--max-batch",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="responses that are generated together (default: 16)",
    )
    add(
        "--max-queue",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="waiting requests; one more gets status 429 (default: 128)",
    )
    add(
        "--max-tokens",
        type=whole_number(1),
        default=1024,
        metavar="N",
        help="longest response in tokens (default: 1024)",
    )
    add(
        "--max-images",
        type=whole_number(0),
        default=8,
        metavar="N",
        help="images of a request (default: 8)",
    )
    add(
        "--max-pixels",
        type=whole_number(1),
        default=50_000_000,
        metavar="N",
        help="pixels of an image (default: 50,000,000)",
    )
    add(
        "--max-body-mb",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="size of a request in MB (default: 32)",
    )
    add(
        "--max-memory-mb",
        type=whole_number(1),
        default=1024,
        metavar="N",
        help="size of all requests and their images together in MB; more get status 429 "
        "(default: 1024)",
    )
    add(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="allow requests to name images below this folder as file://NAME (default: none)",
    )
    add(
        "--allow-remote-images",
        type=_hosts,
        default=(),
        metavar="HOSTS",
        help="hosts from which images may be fetched, separated by commas: example.org,"
        "*.example.com; private addresses are refused (default: none)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    return parser


def _hosts(text: str) -> tuple[str, ...]:
    """Parse a list of hosts: names, names with a port, or `*.` and a domain."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"(\*|(\*\.)?[A-Za-z0-9.-]+)(:\d+)?", name):
            raise argparse.ArgumentTypeError(
                "expected hosts like example.org or *.example.com, separated by commas"
            )
    return names


if __name__ == "__main__":
    run_command(main)
