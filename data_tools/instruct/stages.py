"""The stages of a run and the command line of each; imports nothing heavy."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from data_tools.instruct.generate.shard import ALL_REQUESTS, Shard
from data_tools.instruct.grow.operators import GROUPS, OPERATORS
from vlm_sft.commands.parser import CommandParser, add_overrides, group_parser, whole_number

PROG: Final = "vlm-sft data"

_SETTINGS: Final = "data_tools.instruct.config:InstructConfig"
_YAML: Final = "configs/instruct/rules.yaml"


def _no_options(parser: CommandParser) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """A stage, or another command on the folder of a run.

    Attributes:
        summary: What it does, in one line.
        about: What more the help text says.
        examples: Arguments of example calls.
        module: Below `data_tools.instruct`, with the function `command(config, **options)`; empty
            for `run`.
        add_options: Adds the command's own options and arguments to its parser.
    """

    summary: str
    about: str
    examples: tuple[str, ...]
    module: str = ""
    add_options: Callable[[CommandParser], None] = _no_options


def _plan_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--show",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="print the first N requests in full",
    )


def _generate_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--shard",
        type=Shard.parse,
        default=ALL_REQUESTS,
        metavar="i/n",
        help="ask only the requests of part i of n (from 1), for several machines",
    )


def _verify_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--file",
        type=Path,
        metavar="LLAVA.json",
        help="check the LLaVA records in this file (.json or .jsonl) instead of the answers; "
        "results are written to OUTPUT_DIR/checked/NAME/",
    )


def _explain_options(parser: CommandParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of a sample or of its request")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the image with its boxes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the explanation as a page")
    parser.add_argument("--prompt", action="store_true", help="show system text and seed examples")


OPERATOR_NAMES: Final = (*OPERATORS, *GROUPS)


def _operators(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in OPERATOR_NAMES]:
        known = ", ".join(OPERATOR_NAMES)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {known}")
    return names


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return share


def _grow_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--operators",
        type=_operators,
        required=True,
        metavar="NAME,...",
        help=f"what to make of each sample: some of {', '.join(OPERATOR_NAMES)}",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the new run"
    )
    parser.add_argument(
        "--number",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="requests per sample and operator (default: 1)",
    )
    parser.add_argument("--language", metavar="NAME", help="language of `translate`, e.g. German")
    parser.add_argument(
        "--unanswerable",
        type=_share,
        metavar="SHARE",
        help="share of the questions of `refuse` that the image cannot answer (default: 0.5)",
    )
    parser.add_argument(
        "--seed-tasks",
        type=Path,
        metavar="FILE",
        help="seed tasks of `self-instruct` in place of ours: a JSON list of objects with `id` "
        "and `question`",
    )


STAGES: Final = {
    "index": Stage(
        "read and check the annotations",
        "Writes images.jsonl and index.json. `plan` does this too where it is necessary.",
        (_YAML,),
        "index",
    ),
    "plan": Stage(
        "choose images, write the requests, estimate tokens and cost",
        "Sends nothing. Writes requests.jsonl, templates.json, config.yaml and plan.json.",
        (_YAML, f"{_YAML} images.count=100 --show 3"),
        "plan.command",
        _plan_options,
    ),
    "generate": Stage(
        "ask the teacher all requests that have no answer yet",
        "Repeat the command to continue; no answer is paid for twice. Exit codes: 3 if more "
        "requests failed\nthan teacher.failures_allowed or the server is down, 4 at a cap of "
        "`limits`, 130 or 143 after\nCtrl-C or SIGTERM.",
        (_YAML, "my.yaml teacher.concurrency=64 limits.usd=20", "--shard 2/8 my.yaml"),
        "generate.command",
        _generate_options,
    ),
    "verify": Stage(
        "check the claims of all answers against the annotations",
        "Costs nothing (except for requests to verify.judge, once) and may be repeated, e.g. with "
        "other\nsettings of `verify`. Writes samples.jsonl, rejected.jsonl and verification.json."
        "\n\nRecords of others are checked without a configuration by\n"
        "`vlm-sft data verify --records LLAVA.json --instances I [--captions C] --images DIR "
        "--out DIR`\n(LLaVA's form, in .json, .jsonl or .parquet; `vlm-sft data verify --help "
        "--records` has more).",
        (_YAML, "my.yaml verify.unseen_objects=keep", "my.yaml --file llava_instruct_150k.json"),
        "verify.command",
        _verify_options,
    ),
    "clean": Stage(
        "drop duplicates, balance answers and types",
        "Writes kept.jsonl, dropped.jsonl and cleaning.json.",
        (_YAML, "my.yaml clean.max_per_image=4"),
        "clean.command",
    ),
    "export": Stage(
        "write the training files",
        "Writes the folder export: the training files, a receipt for each record, and export.json.",
        (_YAML, "my.yaml export.formats=[llava] export.image_prefix=train2017/"),
        "export",
    ),
    "report": Stage(
        "write an HTML page about the run: what was made, and what was not",
        "Writes the folder report.",
        (_YAML,),
        "report.command",
    ),
}

COMMANDS: Final = {
    **STAGES,
    "run": Stage(
        "run all of these in turn",
        "Ends with a table of the outcomes of images and requests. Stops after `generate` if "
        "that\nends with an exit code other than 0.",
        (_YAML, "my.yaml limits.usd=20"),
    ),
    "grow": Stage(
        "plan a run that makes new samples from the accepted ones of this run",
        "Operators:\n"
        + "\n".join(f"  {name:<14}{operator.summary}" for name, operator in OPERATORS.items())
        + "\n"
        + "\n".join(f"  {name:<14}one of {', '.join(of)}" for name, of in GROUPS.items())
        + "\nSends nothing: `generate`, `verify`, `clean`, `export` and "
        "`report` of DIR/config.yaml do the rest,\nwith the same limits, checks and receipts.",
        (
            "my.yaml --operators deepen,breadth --out grown teacher.model=NAME",
            "my.yaml --operators evolve --number 2 --out evolved teacher.model=NAME",
            "my.yaml --operators translate --language German --out german teacher.model=NAME",
        ),
        "grow.command",
        _grow_options,
    ),
    "explain": Stage(
        "show one sample: what was shown, asked, answered and checked",
        "Prints to the terminal, or writes a page or an image.",
        ("my.yaml 000000033471-detail-0", "my.yaml 000000033471-detail-0 --html sample.html"),
        "explain",
        _explain_options,
    ),
}
"""All commands, in the order of the help text."""

_ABOUT: Final = """\
Build instruction data from COCO annotations, stage by stage.

Every command that takes the YAML file of a run (see configs/instruct/) can be repeated: existing
results are neither made nor paid for twice."""


def parser(others: Mapping[str, str] = MappingProxyType({})) -> CommandParser:
    """Return the parser of the name of a command; `others` are commands besides these."""
    about = {name: stage.summary for name, stage in COMMANDS.items()}
    for name, summary in others.items():
        about[name] = f"{about[name]},\n{'':15}or {summary}" if name in about else summary
    examples = "\n".join(
        f"  {PROG} {name} {COMMANDS[name].examples[0]}" for name in ("plan", "run", "explain")
    )
    parser = group_parser(PROG, _ABOUT, about, f"examples:\n{examples}")
    assert parser.description is not None
    parser.description += (
        f"\n\n`{PROG} COMMAND --help` describes a command; `vlm-sft config reference --data` "
        "lists all settings."
    )
    return parser


def parsers() -> dict[str, CommandParser]:
    """Return the parser of each command's own arguments."""
    return {name: _parser_of(name, stage) for name, stage in COMMANDS.items()}


def _parser_of(name: str, stage: Stage) -> CommandParser:
    about = f"{stage.summary[0].upper()}{stage.summary[1:]}.\n\n{stage.about}"
    examples = "\n".join(f"  {PROG} {name} {arguments}" for arguments in stage.examples)
    parser = CommandParser(f"{PROG} {name}", about, f"examples:\n{examples}", settings=_SETTINGS)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the YAML file of the run")
    stage.add_options(parser)
    add_overrides(parser, "images.count=100")
    replaced = "FILE if it was" if name == "explain" else "files in output_dir that were"
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace {replaced} edited or not written by this command",
    )
    return parser
