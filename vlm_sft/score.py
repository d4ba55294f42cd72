"""Score answers that are in a file, whichever program or model wrote them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import CommandParser, require_file, whole_number
from vlm_sft.commands.run_command import run_command
from vlm_sft.evaluation.scores.registry import KINDS
from vlm_sft.utils.output_files import require_output_file

_EXAMPLES: Final = """examples:
  vlm-sft score pope --answers answers.jsonl --truth coco_pope_random.json
  vlm-sft score caption --answers captions.json --truth captions_val2014.json --json
  vlm-sft score vqa --answers results.json --truth v2_mscoco_val2014_annotations.json --out vqa.json

Files are a JSON list, JSON Lines, or an object of answers by id. An answer has an id (question_id,
id or image_id) and a text (answer, text, caption, prediction, response or output):
  {"question_id": 1, "text": "Yes, there is."}
Rows of --truth have the same ids and
@TRUTH@
A question without an answer counts as wrong."""


def main(argv: Sequence[str]) -> int:
    """Score, print a table or JSON, write `--out`; return the exit code."""
    arguments = parser().read(argv)
    require_file("--answers", arguments.answers)
    for path in arguments.truth:
        require_file("--truth", path)
    out = arguments.out
    if out is not None:
        out = require_output_file(
            out,
            inputs=[arguments.answers, *arguments.truth],
            image_roots=[],
            command="score",
            overwrite=arguments.overwrite,
        )
    from vlm_sft.commands.score import run
    from vlm_sft.evaluation.scores.results import Options

    return run(
        arguments.kind,
        arguments.answers,
        arguments.truth,
        Options(seed=arguments.seed),
        as_json=arguments.json,
        out=out,
        stream=sys.stdout,
    )


def parser() -> CommandParser:
    """Return the command's parser."""
    width = max(map(len, KINDS))
    kinds = "\n".join(f"  {name:<{width}}  {kind.summary}" for name, kind in KINDS.items())
    truth = "\n".join(f"  {name:<{width}}  {kind.truth}" for name, kind in KINDS.items())
    examples = _EXAMPLES.replace("@TRUTH@", truth)
    parser = CommandParser("vlm-sft score", f"{__doc__}\n\nkinds:\n{kinds}", examples)
    add = parser.add_argument
    add("kind", choices=list(KINDS), metavar="KIND", help="what is scored, one of those above")
    add("--answers", type=Path, required=True, metavar="FILE", help="the answers")
    add(
        "--truth",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the true answers; the rows of several files count together",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the scores, with a row per question, to this JSON file",
    )
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
