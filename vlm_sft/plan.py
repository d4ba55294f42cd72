"""Predict the memory and time of a run: `python -m vlm_sft.plan CONFIG.yaml`."""

from collections.abc import Sequence
from typing import Final

from vlm_sft.commands.parser import (
    CommandParser,
    config_parser,
    heavy_imports,
    number,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.planning.gpus import ASSUMED_EFFICIENCY, GPUS, require_known

ABOUT = f"""\
Plan a run: read the lengths and images of the data, and predict memory by part, the largest
micro-batch, samples/s, hours and the bottleneck, for stage 1, LoRA, QLoRA and full fine-tuning.

Nothing is downloaded and no weights are allocated: the model is built from its configuration, and
its own code runs on tensors without values. Known GPUs: {", ".join(GPUS)}."""

EXAMPLES = """\
examples:
  vlm-sft plan configs/tiny/stage2.yaml
  vlm-sft plan configs/tiny/stage2_lora.yaml --gpu 4090
  vlm-sft plan my.yaml --gpu a100-80 --gpus 8 train.micro_batch_size=8
  vlm-sft plan my.yaml --gpu h200 --json > plan.json

  # before the data is there: 665,298 records of 1,200 tokens, 200 of them supervised
  vlm-sft plan configs/llava-1.5/stage2.yaml --gpu a100-80 --gpus 8 --assume 665298,1200,200

  # compare the prediction with a few real steps on this machine
  vlm-sft plan configs/tiny/stage2.yaml --calibrate

The configuration and the tokenizer of a hub name (not its weights) must be in the local cache. The
shapes of models that configs/ names are known, and --assume needs no tokenizer."""

SAMPLE: Final = 20_000
"""Default of `--sample`: records of each file that are tokenized."""


def main(argv: Sequence[str]) -> int:
    """Print the plan of a configuration; return 0, also if the run would not fit."""
    arguments = parser().read(argv)
    require_known(arguments.gpu)
    if arguments.calibrate and (arguments.gpu not in (None, "cpu") or arguments.gpus != 1):
        raise UserError("--calibrate: trains on this machine's own device; remove --gpu and --gpus")
    from vlm_sft.commands.inputs import ALL_PARTS, read_config

    parts = ALL_PARTS - {"projector"}
    if arguments.assume is not None:  # neither data nor tokenizer is read
        parts = frozenset({"model"})
        if arguments.calibrate:
            raise UserError("--calibrate: trains on the run's own records; remove --assume")
    config = read_config(arguments.config, arguments.overrides, parts, download=arguments.calibrate)
    with heavy_imports():
        from vlm_sft.commands.plan import run
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run(config, arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = config_parser("vlm-sft plan", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("--gpu", metavar="NAME", help="GPU to plan for (default: this machine's, else its CPU)")
    add("--gpus", type=whole_number(1), default=1, metavar="N", help="number of GPUs (default: 1)")
    add(
        "--efficiency",
        type=number(0, 1, above=True),
        default=ASSUMED_EFFICIENCY,
        metavar="SHARE",
        help="share of the matrix-product rate that a step reaches "
        f"(default: {ASSUMED_EFFICIENCY})",
    )
    add(
        "--sample",
        type=whole_number(0),
        default=SAMPLE,
        metavar="N",
        help=f"records of each file to tokenize, drawn at random; 0: all (default: {SAMPLE:,})",
    )
    add(
        "--assume",
        metavar="RECORDS,TOKENS,SUPERVISED[,CROPS]",
        help="read neither data nor tokenizer: assume so many records per epoch, each with this "
        "many tokens (image tokens included), supervised tokens, and image crops (1)",
    )
    add("--json", action="store_true", help="print the plan as one JSON object")
    add(
        "--calibrate",
        action="store_true",
        help="also train a few steps on this machine; needs the weights",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
