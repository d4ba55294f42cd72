"""Write the configurations of a new model: `python -m vlm_sft.init --data FILE`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.parser import (
    CommandParser,
    add_columns_option,
    heavy_imports,
    number,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.planning.gpus import GPUS, require_known

ABOUT = f"""\
Write complete configurations for stage 1, stage 2 and an evaluation suite into a new folder, for
your data, your models and your device. The planner chooses full fine-tuning, LoRA or QLoRA, the
micro-batch, activation checkpointing and the sequence length so that both stages fit. What is not
given is asked for on a terminal; --yes takes the defaults. Nothing is downloaded, and no existing
file is replaced.

Known GPUs: {", ".join(GPUS)}."""

EXAMPLES = """\
examples:
  vlm-sft init --data photos/questions.csv
  vlm-sft init --data table.csv --columns image=file,question=q,answer=a --images photos
  vlm-sft init --data questions.csv --captions captions.csv --gpu 4090 --out my --yes
  vlm-sft init --data questions.json --from-checkpoint llava-hf/llava-1.5-7b-hf --gpu a100-80 --yes
  vlm-sft init --data questions.csv --tower models/clip --llm models/qwen --gpu cpu --yes
  vlm-sft init --examples

Data is a file or folder of any format in docs/data-formats.md. Without --captions, stage 1 trains
the projector on the data itself; with --projector or --from-checkpoint there is no stage 1."""


def main(argv: Sequence[str]) -> int:
    """Write the configurations and print the next commands; return 0."""
    arguments = parser().read(argv)
    if arguments.examples:
        return _copy_examples(arguments)
    require_known(arguments.gpu)
    _require_fitting(arguments)
    from vlm_sft.commands.inputs import require_model_name, require_records, require_template

    for option in ("tower", "llm", "tokenizer", "from_checkpoint"):
        if getattr(arguments, option) is not None:
            require_model_name(f"--{option.replace('_', '-')}", getattr(arguments, option))
    if arguments.template is not None:
        require_template("--template", arguments.template)
    for option in ("data", "captions", "eval"):
        if getattr(arguments, option) is not None:
            require_records(f"--{option}", getattr(arguments, option))
    with heavy_imports():
        from vlm_sft.commands.init import run
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run(arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft init", ABOUT, EXAMPLES)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="records of stage 2: questions and answers")
    add("--captions", metavar="PATH", help="captions for stage 1 (default: --data)")
    add("--eval", metavar="PATH", help="held-out records, for the validation loss and the suite")
    add_columns_option(add, "--data, --eval")
    add("--images", metavar="DIR", help="folder of relative image names (default: each file's)")
    add(
        "--task",
        choices=["answer", "describe"],
        help="what the suite measures: short answers by equality, or long ones by CIDEr-D and "
        "ROUGE-L (default: each answer by its length)",
    )
    add = parser.add_argument_group("models").add_argument
    add("--tower", metavar="NAME", help="vision tower: a folder (also of timm) or hub name")
    add("--llm", metavar="NAME", help="language model: a folder or hub name")
    add("--tokenizer", metavar="NAME", help="tokenizer, if it is not the language model's")
    add("--template", metavar="NAME", help="chat template of stage 2 (default: the tokenizer's)")
    add("--from-checkpoint", metavar="NAME", help="finished LLaVA to fine-tune, for all parts")
    add("--projector", metavar="RUN/final", help="projector of an earlier stage 1 with these parts")
    add("--start-from", metavar="RUN/final", help="earlier full fine-tuning to continue from")
    add = parser.add_argument_group("device").add_argument
    add("--gpu", metavar="NAME", help="GPU, or cpu (default: this machine's GPU, else its CPU)")
    add(
        "--gpu-memory",
        type=number(1, 10_000),
        metavar="GIB",
        help="GPU of this memory, instead of --gpu",
    )
    add("--gpus", type=whole_number(1), default=1, metavar="N", help="number of GPUs (default: 1)")
    add(
        "--method",
        choices=["auto", "full", "lora", "qlora"],
        default="auto",
        help="of stage 2 (default: the first of full, lora, qlora that fits)",
    )
    add(
        "--assume",
        metavar="RECORDS,TOKENS,SUPERVISED",
        help="plan for such records without tokenizing the data, see `vlm-sft plan`",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("vlm"), metavar="DIR", help="folder (default: vlm)")
    add(
        "--examples",
        action="store_true",
        help="instead copy the configurations that the documentation names to ./configs",
    )
    add("--yes", action="store_true", help="ask nothing: take the defaults")
    return parser


def _copy_examples(arguments: argparse.Namespace) -> int:
    defaults = vars(parser().read(["--examples"]))
    given = [name for name, value in vars(arguments).items() if value != defaults[name]]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option}: --examples copies the examples and takes no other option")
    from vlm_sft.commands.examples import copy_examples

    return copy_examples(Path("configs"))


def _require_fitting(arguments: argparse.Namespace) -> None:
    if arguments.gpu is not None and arguments.gpu_memory is not None:
        raise UserError("--gpu and --gpu-memory: give one of them")
    starts = [
        name
        for name in ("projector", "start_from", "from_checkpoint", "captions")
        if getattr(arguments, name) is not None
    ]
    if len(starts) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in starts[:2])
        raise UserError(f"{first} and {second}: each says where the projector comes from; give one")
    if arguments.from_checkpoint is not None:
        for name in ("tower", "llm", "tokenizer"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name}: --from-checkpoint names all parts; remove one of them")
    if arguments.start_from is not None and arguments.method in ("lora", "qlora"):
        raise UserError("--start-from is for full fine-tuning; remove --method")


if __name__ == "__main__":
    run_command(main)
