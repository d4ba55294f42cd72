"""Score answers that are in a file, whichever program or model wrote them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import CommandParser, number, require_file, whole_number
from vlm_sft.commands.run_command import run_command
from vlm_sft.evaluation.scores.registry import KINDS
from vlm_sft.utils.output_files import require_output_file

_EXAMPLES: Final = """examples:
  vlm-sft score pope --answers answers.jsonl --truth coco_pope_random.json
  vlm-sft score caption --answers captions.json --truth captions_val2014.json --json
  vlm-sft score vqa --answers results.json --truth v2_mscoco_val2014_annotations.json --out vqa.json
  vlm-sft score chair --answers said.json --truth instances_val2014.json captions_val2014.json
  vlm-sft score alpaca --answers mine.json --others base=base.json --truth questions.jsonl \\
      --judge-url http://127.0.0.1:8000/v1 --judge-model NAME --judge-log replies.jsonl

Files are a JSON list, JSON Lines, or an object of answers by id. An answer has an id (question_id,
id or image_id) and a text (answer, text, caption, prediction, response or output):
  {"question_id": 1, "text": "Yes, there is."}
or, for mt-bench, "turns": [text, ...].
Rows of --truth have the same ids and
@TRUTH@
A question without an answer counts as wrong."""


def main(argv: Sequence[str]) -> int:
    """Score, print a table or JSON, write `--out`; return the exit code."""
    arguments = parser().read(argv)
    require_file("--answers", arguments.answers)
    for path in arguments.truth:
        require_file("--truth", path)
    for path in _other_files(arguments.others):
        require_file("--others", path)
    out = arguments.out
    if out is not None:
        out = require_output_file(
            out,
            inputs=[arguments.answers, *arguments.truth, *_other_files(arguments.others)],
            image_roots=[],
            command="score",
            overwrite=arguments.overwrite,
        )
    from vlm_sft.commands.score import options_of, run

    return run(
        arguments.kind,
        arguments.answers,
        arguments.truth,
        options_of(arguments),
        as_json=arguments.json,
        out=out,
        stream=sys.stdout,
    )


def _other_files(others: Sequence[str]) -> list[Path]:
    return [Path(other.partition("=")[2]) for other in others]


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
    add(
        "--verdict",
        choices=["first", "last"],
        default="first",
        help="counting, multiple_choice: which number or option of an answer counts (first)",
    )
    add("--meteor", action="store_true", help="caption: also METEOR (needs Java and pycocoevalcap)")
    _add_judge_options(parser)
    return parser


def _add_judge_options(parser: CommandParser) -> None:
    add = parser.add_argument_group(
        "judge", f"for {', '.join(name for name, kind in KINDS.items() if kind.judged)}"
    ).add_argument
    add("--judge-url", metavar="URL", help="an OpenAI-compatible server: http://127.0.0.1:8000/v1")
    add("--judge-model", metavar="NAME", help="the judge's name at that server")
    add(
        "--judge-log",
        type=Path,
        metavar="FILE",
        help="file of the judge's replies; a repeated command asks only for those it lacks",
    )
    add(
        "--judge-prompts",
        type=Path,
        metavar="DIR",
        help="folder with own single.txt, single_reference.txt or pair.txt",
    )
    add(
        "--judge-key-variable",
        metavar="NAME",
        help="environment variable with the API key (default: no key is sent)",
    )
    add(
        "--usd-per-million",
        type=number(0),
        nargs=2,
        metavar=("IN", "OUT"),
        help="prices of a million tokens of prompts and replies",
    )
    add("--max-usd", type=number(0, above=True), metavar="USD", help="most that the log may cost")
    add("--max-tokens", type=whole_number(1), default=1024, metavar="N", help="longest reply")
    add(
        "--judge-seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="sent with each request; another one asks for new replies (default: 0)",
    )
    add("--concurrency", type=whole_number(1), default=4, metavar="N", help="requests at a time")
    add("--name", default="model", help="name of the model that gave --answers, for arena")
    add(
        "--others",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="alpaca: answers of the baseline; arena: answers of other models",
    )


if __name__ == "__main__":
    run_command(main)
