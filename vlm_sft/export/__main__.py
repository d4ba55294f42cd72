"""Export a checkpoint: `python -m vlm_sft.export CHECKPOINT OUT_DIR --to hf`."""

from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_template_option,
    heavy_imports,
    require_file,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.export.formats import FORMATS
from vlm_sft.utils.constants import MAX_SHARD_SIZE
from vlm_sft.utils.ownership import require_new_directory

EXAMPLES = """\
examples:
  # a folder for transformers' LlavaForConditionalGeneration and AutoProcessor, LoRA merged
  vlm-sft export runs/stage2_lora/final exported --to hf

  # in bfloat16, in files of at most 2 GB
  vlm-sft export runs/stage2_lora/final exported --dtype bfloat16 --max-shard-size 2GB

  # for the original LLaVA code, adapters as adapters
  vlm-sft export runs/stage2_lora/final llava-mine-lora --to llava

  # for llama.cpp: model-q8_0.gguf and mmproj-f16.gguf
  vlm-sft export runs/stage2_lora/final exported --to gguf --outtype q8_0

  # adapters and projector for peft, and the base that they go on
  vlm-sft export runs/stage2_lora/final adapters --to peft
  vlm-sft export runs/stage2_lora/final base --without-adapters

  # to a private repository, with a card that lists results
  vlm-sft export runs/stage2_lora/final exported --results results.json --license apache-2.0 \\
      --push-to-hub me/my-llava --private

  # the first one, with logits compared on another image
  vlm-sft export runs/stage2_lora/final exported --to hf --image dog.jpg
"""


def main(argv: Sequence[str]) -> int:
    """Export a checkpoint, verify the reloaded folder, print the result; return the exit code."""
    arguments = parser().read(argv)
    from vlm_sft.commands.inputs import require_images, require_model_source

    require_model_source(arguments.checkpoint)
    images = [arguments.image] if arguments.image else []
    require_images(images)
    if arguments.results is not None:
        require_file("--results", arguments.results)
    if arguments.push_to_hub is None and (arguments.private or arguments.revision):
        raise UserError("--private and --revision belong to --push-to-hub REPO; add it")
    require_new_directory(arguments.out, inputs=[arguments.checkpoint, *images])
    with heavy_imports():
        from vlm_sft.commands.export import run
    return run(arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        "vlm-sft export",
        "Write a checkpoint in another program's format, reload it and compare the logits.",
        EXAMPLES,
    )
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add("out", type=Path, metavar="OUT_DIR", help="output folder, which must be new or empty")
    formats = "; ".join(f"{name}: {form.about}" for name, form in FORMATS.items())
    add("--to", default="hf", choices=list(FORMATS), help=f"output format ({formats})")
    add(
        "--image",
        type=Path,
        metavar="FILE",
        help="image for the comparison of logits (default: one of the training data)",
    )
    add(
        "--prompt",
        default="What is in the image?",
        metavar="TEXT",
        help="text for the comparison of logits (default: What is in the image?)",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the exported weights (auto: that of the language model)",
    )
    add(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help=f"split larger weights into several files (default: {MAX_SHARD_SIZE})",
    )
    _add_card_options(parser)
    add(
        "--merge",
        action="store_true",
        help="llava: write all weights, also of a run that trained adapters or the projector only",
    )
    add(
        "--without-adapters",
        action="store_true",
        help="hf: leave adapters out instead of merging them; the base for --to peft",
    )
    add(
        "--tower",
        metavar="NAME",
        help="llava: folder or hub name of the vision tower for config.json (default: the model's)",
    )
    add(
        "--outtype",
        default="f16",
        choices=["f16", "q8_0"],
        help="gguf: type of the language model's matrices (default: f16)",
    )
    add(
        "--unverified",
        action="store_true",
        help="gguf: keep files that llama.cpp computes differently, or that were not "
        "compared because it is not installed",
    )
    return parser


def _add_card_options(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--license", metavar="NAME", help="license of the model, for its card (e.g. apache-2.0)")
    add(
        "--attribution",
        metavar="TEXT",
        action="append",
        default=[],
        help="a line for the card on whose models or data it is based; may be repeated",
    )
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="file of evaluate or score, whose numbers the card lists",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="push the folder to this model repository; the token is HF_TOKEN or that of the login",
    )
    add("--private", action="store_true", help="the repository must be private")
    add("--revision", metavar="BRANCH", help="push to this branch instead of main")


if __name__ == "__main__":
    run_command(main)
