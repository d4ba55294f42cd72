"""Score answers that are in a file, whichever program or model wrote them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import CommandParser, require_file, whole_number
from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.output_files import require_output_file

KINDS: Final = {
    "pope": "yes/no answers: accuracy, precision, recall, F1, share of yes, under four readings",
    "caption": "captions: CIDEr-D, BLEU-1 to BLEU-4, ROUGE-L against COCO's reference captions",
    "vqa": "VQAv2's accuracy against ten human answers",
    "gqa": "equality with the true answer, without case and final period",
    "multiple_choice": "letters or option texts, with the share of each position",
    "counting": "exact counts, mean absolute error",
    "grounding": "boxes by intersection over union (IoU)",
}
"""What each kind of score compares."""

EXAMPLES: Final = """examples:
  vlm-sft score pope --answers answers.jsonl --truth coco_pope_random.json
  vlm-sft score caption --answers captions.json --truth captions_val2014.json --json
  vlm-sft score vqa --answers results.json --truth v2_mscoco_val2014_annotations.json --out vqa.json

Files are a JSON list, JSON Lines, or an object of answers by id. An answer has an id (question_id,
id or image_id) and a text (answer, text, caption, prediction, response or output):
  {"question_id": 1, "text": "Yes, there is."}
Rows of --truth have the same ids and
  pope             "label": "yes" or "no"; optionally "image"
  caption          "image_id" and "caption", several rows per image (COCO's captions_*.json)
  vqa              "answers": the human answers (VQAv2's annotations)
  gqa              "answer"
  multiple_choice  "choices": ["a dog", ...] and "answer": a letter, a text, or a number from 0
  counting         "answer": 3
  grounding        "box": [left, top, right, bottom], or COCO's "bbox"
A question without an answer counts as wrong."""


def main(argv: Sequence[str]) -> int:
    """Score, print a table or JSON, write `--out`; return the exit code."""
    arguments = parser().read(argv)
    require_file("--answers", arguments.answers)
    require_file("--truth", arguments.truth)
    out = arguments.out
    if out is not None:
        out = require_output_file(
            out,
            inputs=[arguments.answers, arguments.truth],
            image_roots=[],
            command="score",
            overwrite=arguments.overwrite,
        )
    from vlm_sft.commands.score import run

    return run(
        arguments.kind,
        arguments.answers,
        arguments.truth,
        seed=arguments.seed,
        as_json=arguments.json,
        out=out,
        stream=sys.stdout,
    )


def parser() -> CommandParser:
    """Return the command's parser."""
    width = max(map(len, KINDS))
    kinds = "\n".join(f"  {name:<{width}}  {text}" for name, text in KINDS.items())
    parser = CommandParser("vlm-sft score", f"{__doc__}\n\nkinds:\n{kinds}", EXAMPLES)
    add = parser.add_argument
    add("kind", choices=list(KINDS), metavar="KIND", help="what is scored, one of those above")
    add("--answers", type=Path, required=True, metavar="FILE", help="the answers")
    add("--truth", type=Path, required=True, metavar="FILE", help="the true answers")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--out", type=Path, metavar="FILE", help="also write the scores to this JSON file")
    add("--overwrite", action="store_true", help="replace --out even if another program wrote it")
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of the bootstrap intervals, which resample images (default: 0)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
