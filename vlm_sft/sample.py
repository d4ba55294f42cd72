"""Sample N answers to each question of training data, and keep the best (rejection sampling).

Writes into --out: samples.jsonl (every sample; a repeated command goes on), train.jsonl (the best
answer of each question, as records that stage 2 trains on), preferences.jsonl (a better and a worse
answer each, as TRL reads them), receipts.jsonl (what came of each question) and results.json.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_columns_option,
    add_template_option,
    heavy_imports,
    number,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

EXAMPLES: Final = """examples:
  vlm-sft sample runs/stage2/final questions.json --n 8 --score exact --out best
  vlm-sft sample runs/stage2/final llava.json --n 4 --score verifier --out best \\
      --annotations instances_train2017.json captions_train2017.json --images train2017
  vlm-sft sample runs/stage2/final mine.json --score judge --out best \\
      --judge-url http://127.0.0.1:8000/v1 --judge-model NAME
  vlm-sft sample runs/stage2/final train.json --score exact --out rounds --rounds 3 \\
      --train stage2.yaml --held-out suite.yaml

scores:
  exact     the sample says what the record's answer says (yes/no, counts, short texts; of a text
            with reasons, what follows `answer:` or `answer is`)
  verifier  no claim of the sample contradicts COCO's boxes and captions (--annotations), and they
            support at least one; the more the better
  judge     a judge model's grade, at least --min-grade
  length    the shortest sample (--longest: the longest); all are acceptable

A sample that was cut at --max-tokens is never acceptable."""


def main(argv: Sequence[str]) -> int:
    """Sample, choose and write; return the exit code."""
    arguments = parser().read(argv)
    _require_fitting(arguments)
    from vlm_sft.commands.inputs import require_model_source, require_records

    require_records("DATA", arguments.data)
    if arguments.answers is not None:
        require_file("--answers", arguments.answers)
    if arguments.images is not None:
        require_folder("--images", arguments.images)
    for path in [*arguments.annotations, *filter(None, (arguments.train, arguments.held_out))]:
        require_file("--annotations, --train and --held-out:", path)
    require_model_source(arguments.checkpoint)
    verifier = _verifier(arguments)
    with heavy_imports():
        from vlm_sft.commands.sample import run
        from vlm_sft.commands.sample_rounds import run_rounds
    if arguments.rounds is None:
        run(arguments, arguments.checkpoint, arguments.out, verifier)
        return 0
    return run_rounds(arguments, verifier)


def _verifier(arguments: argparse.Namespace) -> Any:
    """Return the grader of `--score verifier`, which compares with COCO's annotations."""
    if arguments.score != "verifier":
        return None
    # By name: the trainer does not know the data tools.
    return import_module("data_tools.verify_samples").verifier(*arguments.annotations)


def _require_fitting(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: Names the option that is missing or that has no effect.
    """
    if (arguments.score == "verifier") != bool(arguments.annotations):
        raise UserError("--score verifier and --annotations INSTANCES CAPTIONS: give both or none")
    if (arguments.score == "judge") != (arguments.judge_url is not None):
        raise UserError("--score judge and --judge-url URL: give both or none")
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        raise UserError("--judge-url and --judge-model: give both, or neither")
    if arguments.longest and arguments.score != "length":
        raise UserError("--longest: is for --score length")
    if arguments.verdict != "first" and arguments.score != "exact":
        raise UserError("--verdict: is for --score exact")
    together = [arguments.rounds, arguments.train, arguments.held_out]
    if any(value is None for value in together) and any(value is not None for value in together):
        raise UserError("--rounds, --train CONFIG.yaml and --held-out SUITE.yaml: give all or none")
    if arguments.keep_train_data and arguments.rounds is None:
        raise UserError("--keep-train-data: is for --rounds")


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft sample", __doc__, EXAMPLES)
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    data = "records that training reads, or hf://datasets/...; every answer is sampled again"
    add("data", metavar="DATA", help=data)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the samples")
    names = ["verifier", "exact", "judge", "length"]
    add("--score", choices=names, required=True, help="how samples are graded, see below")
    count = "samples per question (default: 8)"
    add("--n", type=whole_number(1, 4096), default=8, metavar="N", help=count)
    add("--temperature", type=number(0.01, 100), default=1.0, metavar="T", help="default: 1")
    mass = "draw only from the most likely tokens with this total probability (default: 1)"
    add("--top-p", type=number(0, 1, above=True), default=1.0, metavar="P", help=mass)
    longest = "longest sample (default: 256)"
    add("--max-tokens", type=whole_number(1), default=256, metavar="N", help=longest)
    batch = "samples that go through the model together (default: 32)"
    add("--batch-size", type=whole_number(1, 65_536), default=32, metavar="N", help=batch)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed (default: 0)")
    folder = "folder of the image names in DATA (default: that of DATA)"
    add("--images", type=Path, metavar="DIR", help=folder)
    answers = "VQA: the file with the answers to the questions of DATA"
    add("--answers", type=Path, metavar="FILE", help=answers)
    name = "VQA: name of the image of an image_id, e.g. {image_id}.jpg"
    add("--image-name", metavar="TEXT", help=name)
    add_columns_option(add, "DATA")
    links = "allow symbolic links that leave --images"
    add("--follow-symlinks", action="store_true", help=links)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    coco = "verifier: COCO's instances_*.json and captions_*.json"
    add("--annotations", type=Path, nargs=2, default=[], metavar="FILE", help=coco)
    verdict = "exact: the first or last yes, no or number of a sample counts (default: first)"
    add("--verdict", choices=["first", "last"], default="first", help=verdict)
    add("--longest", action="store_true", help="length: prefer the longest sample")
    _add_judge_options(parser)
    _add_round_options(parser)
    return parser


def _add_judge_options(parser: CommandParser) -> None:
    add = parser.add_argument_group("judge", "for --score judge").add_argument
    add("--judge-url", metavar="URL", help="an OpenAI-compatible server: http://127.0.0.1:8000/v1")
    add("--judge-model", metavar="NAME", help="the judge's name at that server")
    least = "lowest grade of an acceptable sample, from 1 to 10 (default: 8)"
    add("--min-grade", type=number(1, 10), default=8.0, metavar="GRADE", help=least)
    own = "folder with an own single_reference.txt"
    add("--judge-prompts", type=Path, metavar="DIR", help=own)
    key = "environment variable with the API key (default: no key is sent)"
    add("--judge-key-variable", metavar="NAME", help=key)
    prices = "prices of a million tokens of prompts and replies"
    add("--usd-per-million", type=number(0), nargs=2, metavar=("IN", "OUT"), help=prices)
    most = "most that the judge's replies may cost"
    add("--max-usd", type=number(0, above=True), metavar="USD", help=most)
    add("--concurrency", type=whole_number(1), default=4, metavar="N", help="requests at a time")


def _add_round_options(parser: CommandParser) -> None:
    add = parser.add_argument_group(
        "rounds", "sample, train on the best, and sample again from the new model"
    ).add_argument
    add("--rounds", type=whole_number(1, 100), metavar="K", help="number of rounds")
    config = "configuration of stage 2; each round trains it on that round's best samples"
    add("--train", type=Path, metavar="CONFIG.yaml", help=config)
    suite = "suite that every round's model is evaluated on"
    add("--held-out", type=Path, metavar="SUITE.yaml", help=suite)
    both = "train on the data of --train as well"
    add("--keep-train-data", action="store_true", help=both)


if __name__ == "__main__":
    run_command(main)
