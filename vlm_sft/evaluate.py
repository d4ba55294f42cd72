"""Evaluate a model on questions with known answers and on captions.

A suite (SUITE.yaml) lists tasks, which any model answers: a checkpoint, an exported folder, or a
server (--base-url). `evaluate compare` and `evaluate export` have a --help of their own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_template_option,
    heavy_imports,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.evaluation.conditions import IMAGE_CONDITIONS, ImageCondition
from vlm_sft.utils.output_files import require_output_file

EXAMPLE = """examples:
  vlm-sft evaluate runs/stage2/final suite.yaml --out evaluation
  vlm-sft evaluate suite.yaml --base-url http://127.0.0.1:8000/v1 --model llava --out evaluation-2
  vlm-sft evaluate compare evaluation evaluation-2
  vlm-sft evaluate export suite.yaml --to lmms-eval --out lmms_tasks
  vlm-sft evaluate runs/stage2/final --probes held_out/existence.json \\
      held_out/counting.json --images held_out/images --captions held_out/captions.json \\
      --out results.json

A suite has `tasks:`, each with `name`, `kind`, `files`, `images`, and more: docs/evaluation.md.

A file of questions is a JSON list or JSON Lines, in this format or in POPE's:
  {"id": "1", "image": "a.jpg", "question": "Is there a dog?", "answer": "yes"}
  {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
"""

PROBE_OPTIONS: Final = (
    "probes", "right_only", "images", "follow_symlinks", "captions", "answers", "conditions",
    "max_images", "seed", "overwrite",
)  # fmt: skip
"""Options that a suite replaces by its settings."""


def main(argv: Sequence[str]) -> int:
    """Evaluate, print a table, write `--out`; return the exit code."""
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    if argv[:1] == ["export"]:
        return export(argv[1:])
    arguments = parser().read(argv)
    if arguments.base_url is not None and arguments.suite is None:
        arguments.checkpoint, arguments.suite = None, arguments.checkpoint
    if arguments.suite is not None or arguments.base_url is not None:
        return _evaluate_suite(arguments)
    if arguments.checkpoint is not None and arguments.checkpoint.suffix in (".yaml", ".yml"):
        raise UserError(f"missing: CHECKPOINT before {arguments.checkpoint}, or --base-url URL")
    return _evaluate_probes(arguments)


def _evaluate_suite(arguments: argparse.Namespace) -> int:
    if arguments.suite is None:
        raise UserError("--base-url: missing: SUITE.yaml, whose questions the server is asked")
    given = [name for name in PROBE_OPTIONS if getattr(arguments, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option}: is not for suites; the suite's tasks have such settings")
    if arguments.out is None:
        raise UserError("missing: --out DIR, the folder of the evaluation")
    if (arguments.checkpoint is None) == (arguments.base_url is None):
        raise UserError("give either CHECKPOINT or --base-url URL --model NAME, and SUITE.yaml")
    if (arguments.base_url is None) != (arguments.model is None):
        raise UserError("--base-url and --model: give both, or neither")
    from vlm_sft.commands.inputs import require_model_source
    from vlm_sft.evaluation.suites.config import load_suite

    if arguments.checkpoint is not None:
        require_model_source(arguments.checkpoint)
    suite = load_suite(arguments.suite)
    for path in suite.input_paths():
        require_file(f"{arguments.suite}: files:", path)
    for folder in suite.image_roots():
        require_folder(f"{arguments.suite}: images:", folder)
    with heavy_imports():
        from vlm_sft.commands.suites import run_suite
    return run_suite(suite, arguments)


def _evaluate_probes(arguments: argparse.Namespace) -> int:
    usage = f"`{parser().prog} --help` shows examples"
    if arguments.checkpoint is None:
        raise UserError(f"missing: CHECKPOINT; {usage}")
    if arguments.images is None:
        raise UserError(f"missing: --images; {usage}")
    arguments.out = arguments.out or Path("results.json")
    arguments.answers = arguments.answers or "likeliest"
    arguments.conditions = arguments.conditions or list(IMAGE_CONDITIONS)
    arguments.seed = arguments.seed or 0
    _require_fitting(arguments)
    from vlm_sft.commands.inputs import require_model_source
    from vlm_sft.evaluation.question_files import read_rows

    for path in arguments.probes:
        require_file("--probes", path)
    if arguments.captions is not None:
        require_file("--captions", arguments.captions)
    require_folder("--images", arguments.images)
    require_model_source(arguments.checkpoint)
    captions = [arguments.captions] if arguments.captions else []
    arguments.out = require_output_file(
        arguments.out,
        inputs=[arguments.checkpoint, *arguments.probes, *captions],
        image_roots=[arguments.images],
        command="evaluate",
        overwrite=arguments.overwrite,
    )
    for path in arguments.probes:
        read_rows(path)
    with heavy_imports():
        from vlm_sft.commands.evaluate import run
    return run(arguments)


def compare(argv: Sequence[str]) -> int:
    """Print the paired differences of results of suites; return the exit code."""
    arguments = compare_parser().read(argv)
    out = arguments.out
    if out is not None:
        results = [arguments.first, *arguments.others]
        out = require_output_file(
            out, inputs=results, command="evaluate compare", overwrite=arguments.overwrite
        )
    from vlm_sft.commands.suites import run_compare

    return run_compare(
        arguments.first, arguments.others, seed=arguments.seed, as_json=arguments.json, out=out,
        stream=sys.stdout,
    )  # fmt: skip


def export(argv: Sequence[str]) -> int:
    """Write a suite for another evaluation library; return the exit code."""
    arguments = export_parser().read(argv)
    from vlm_sft.evaluation.suites.config import load_suite

    suite = load_suite(arguments.suite)
    for path in suite.input_paths():
        require_file(f"{arguments.suite}: files:", path)
    with heavy_imports():
        from vlm_sft.commands.suites import run_export
    return run_export(suite, arguments.suite, to=arguments.to, out=arguments.out)


def compare_parser() -> CommandParser:
    """Return the parser of `evaluate compare`."""
    example = """example:
  vlm-sft evaluate compare evaluation-a evaluation-b/results.json --out difference.json

Every question that both have answered is compared with itself; intervals resample images."""
    parser = CommandParser("vlm-sft evaluate compare", "Compare results of a suite.", example)
    add = parser.add_argument
    add("first", type=Path, metavar="RESULTS", help="results.json of a suite, or its folder")
    add("others", type=Path, nargs="+", metavar="RESULTS", help="results to compare with the first")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--out", type=Path, metavar="FILE", help="also write the differences to this JSON file")
    add("--overwrite", action="store_true", help="replace --out even if another program wrote it")
    seed = "seed of the bootstrap intervals (default: 0)"
    add("--seed", type=whole_number(0), default=0, metavar="N", help=seed)
    return parser


def export_parser() -> CommandParser:
    """Return the parser of `evaluate export`."""
    example = """examples:
  vlm-sft evaluate export suite.yaml --to lmms-eval --out lmms_tasks
  vlm-sft evaluate export suite.yaml --to vlmevalkit --out LMUData"""
    about = "Write a suite's questions for another evaluation library."
    parser = CommandParser("vlm-sft evaluate export", about, example)
    add = parser.add_argument
    add("suite", type=Path, metavar="SUITE.yaml", help="the suite")
    add("--to", choices=["lmms-eval", "vlmevalkit"], required=True, help="the library")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write: new or empty")
    return parser


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft evaluate", __doc__, EXAMPLE)
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add("suite", type=Path, nargs="?", metavar="SUITE.yaml", help="tasks to evaluate")
    add("--base-url", metavar="URL", help="ask an OpenAI-compatible server instead of CHECKPOINT")
    add("--model", metavar="NAME", help="name of the server's model")
    add(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the server's key (default: OPENAI_API_KEY)",
    )
    add(
        "--concurrency",
        type=whole_number(1, 256),
        default=8,
        metavar="N",
        help="questions that a server is asked at a time (default: 8)",
    )
    add(
        "--batch-size",
        type=whole_number(1, 65_536),
        default=32,
        metavar="N",
        help="with a suite: questions that go through the model together (default: 32)",
    )
    add(
        "--probes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of questions with known answers; each has its own rows in the table",
    )
    add(
        "--right-only",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of questions that are asked only with the right image",
    )
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the image names in --probes and --captions",
    )
    add(
        "--follow-symlinks",
        action="store_true",
        help="allow symbolic links that leave --images",
    )
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="file of records with one image each, to compare losses",
    )
    add(
        "--answers",
        choices=["likeliest", "free_form"],
        help="choose the most likely of the possible answers (default), or generate text and take "
        "the last possible answer in it; a text without one is wrong",
    )
    add(
        "--conditions",
        type=_conditions,
        metavar=",".join(IMAGE_CONDITIONS),
        help="images to show with each question: its own, a blank one, another question's "
        "(default: all three)",
    )
    few = "use only the first N images of each file (default: all)"
    add("--max-images", type=whole_number(1), metavar="N", help=few)
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="with a suite: folder of the evaluation, in which it goes on if it was interrupted; "
        "without: JSON file of the results (default: results.json)",
    )
    replace = "replace --out even if this command did not write it"
    add("--overwrite", action="store_true", help=replace)
    add(
        "--seed",
        type=whole_number(0),
        metavar="N",
        help="seed of the bootstrap and of the shuffled images (default: 0)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    return parser


def _conditions(text: str) -> list[ImageCondition]:
    names = text.split(",")
    if any(name not in IMAGE_CONDITIONS for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(IMAGE_CONDITIONS)}")
    return [condition for condition in IMAGE_CONDITIONS if condition in names]


def _require_fitting(arguments: argparse.Namespace) -> None:
    arguments.probes += arguments.right_only
    if not arguments.probes and not arguments.captions:
        raise UserError("nothing to evaluate; give --probes FILE, --captions FILE or both")
    stems = [path.stem for path in arguments.probes]
    if twice := next((name for name in stems if stems.count(name) > 1), None):
        raise UserError(f"--probes: two files are named {twice}; rename one or evaluate it alone")


if __name__ == "__main__":
    run_command(main)
