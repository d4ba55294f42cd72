"""Show records as the model will see them: `python -m vlm_sft.show CONFIG.yaml`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.assemble import load_language
from vlm_sft.config import DataConfig, DataFile, LanguageModelConfig, RunConfig, load_config
from vlm_sft.data.masking import Renderer
from vlm_sft.data.tokenizer import load_tokenizer
from vlm_sft.errors import UserError, error_line, run_command
from vlm_sft.inspection.records import NO_LIMIT, Choice, Inspected, Inspection, files_named
from vlm_sft.inspection.records_page import RecordsPage
from vlm_sft.inspection.statistics import Statistics
from vlm_sft.inspection.terminal import as_text, output, pager_command, print_tables
from vlm_sft.inspection.tokens import as_json, spell
from vlm_sft.model.vision import build_vision_tower

ABOUT = """\
Show records as the model will see them, with the trained tokens marked, and what becomes of each
under the configuration's length limit and policy. On a terminal they come through a pager."""

EXAMPLES = """\
examples:
  # the records of a configuration, trained tokens between marks
  python -m vlm_sft.show configs/tiny/stage2.yaml --limit 3

  # one record by its id, as JSON (ids, labels, tokens; one placeholder a picture)
  python -m vlm_sft.show configs/tiny/stage2.yaml --record red-circle-1 --json

  # a page to hand to a colleague: pictures, trained tokens, figures, search
  python -m vlm_sft.show configs/tiny/stage2.yaml --html page.html

  # figures alone: outcomes, lengths, supervised share, truncation of each file
  python -m vlm_sft.show configs/tiny/stage2.yaml --statistics

  # what does not fit, from one of several files
  python -m vlm_sft.show configs/tiny/stage2.yaml --source instructions.json --reason too_long

  # any file under any tokenizer and template, without a configuration
  python -m vlm_sft.show --records data.json --tokenizer DIR --template chatml

Without a configuration no length limit holds unless --max-length sets one, and pictures need not
be there. The exit code is 2 when a record that is printed is faulty; --statistics and --html
report faults and exit with 0."""

LLAVA_IMAGE_TOKENS: Final = 576
"""LLaVA-1.5's tokens a picture: 24 x 24 patches of CLIP ViT-L/14 at 336 pixels."""
SHOWN: Final = 5
"""Records printed where no pager is and no limit was given."""
SHOWN_ON_A_PAGE: Final = 200


def main(argv: Sequence[str]) -> int:
    """Print or write records with what is trained in them; 2 when a printed record is faulty."""
    args = _parse(argv)
    inspection = _inspection(args)
    choice = Choice(args.record, args.reason, args.longer_than, args.shorter_than)
    if args.html or args.statistics:
        return _survey(args, inspection, choice)
    return _print_json(args, inspection, choice) if args.json else _print(args, inspection, choice)


def _survey(args: argparse.Namespace, inspection: Inspection, choice: Choice) -> int:
    """Read everything for the figures; write the page, print the tables."""
    statistics = Statistics(inspection)
    page = RecordsPage(inspection, args.limit or SHOWN_ON_A_PAGE, choice.words())
    for found in inspection.records(progress=True):
        statistics.add(found)
        if args.html and choice.takes(found):
            page.add(found)
    if args.html:
        if not page.num_matching:
            _say_none(inspection, choice, statistics.total.records)
        page.write(args.html, statistics)
        size = Path(args.html).stat().st_size / 1e6
        shown = f"{page.num_shown:,} of {page.num_matching:,} records"
        print(f"{args.html}: {shown}, {size:.1f} MB", file=sys.stderr)
    if args.statistics and args.json:
        print(json.dumps(statistics.as_json(), ensure_ascii=False))
    elif args.statistics:
        with output(_pager(args), no_color=args.no_color) as console:
            print_tables(console, statistics.tables())
    return 0


def _print(args: argparse.Namespace, inspection: Inspection, choice: Choice) -> int:
    pager = _pager(args)
    limit = args.limit or (sys.maxsize if pager or args.record else SHOWN)
    looked_at = shown = faulty = 0
    more = False
    with output(pager, no_color=args.no_color) as console:
        for found in inspection.records():
            looked_at += 1
            if not choice.takes(found):
                continue
            if shown == limit:
                more = True
                break
            spelled = spell(found, inspection.renderer, inspection.num_image_tokens)
            # A terminal wraps at words; a file keeps each line whole.
            console.print(as_text(found, spelled), soft_wrap=not console.is_terminal)
            shown += 1
            faulty += found.outcome.error is not None
    if not shown:
        _say_none(inspection, choice, looked_at)
    if more:
        print(f"{shown:,} records shown; there are more, see --limit", file=sys.stderr)
    if faulty:
        print(f"error: {faulty:,} of {shown:,} records shown are faulty", file=sys.stderr)
    return 2 if faulty else 0


def _print_json(args: argparse.Namespace, inspection: Inspection, choice: Choice) -> int:
    limit = args.limit or sys.maxsize
    looked_at = shown = faulty = 0
    for found in inspection.records():
        looked_at += 1
        if not choice.takes(found):
            continue
        shown += 1
        faulty += not _print_line(found, inspection)
        if shown == limit:
            break
    if not shown:
        _say_none(inspection, choice, looked_at)
    return 2 if faulty else 0


def _print_line(found: Inspected, inspection: Inspection) -> bool:
    """Print a record as JSON, or its fault on stderr; whether it is faultless."""
    if found.outcome.error is not None:
        print(error_line(found.outcome.error), file=sys.stderr)
        return False
    print(json.dumps(as_json(found, inspection.renderer), ensure_ascii=False))
    return True


def _say_none(inspection: Inspection, choice: Choice, looked_at: int) -> None:
    """Say that no record was chosen; an id that is nowhere is an error."""
    names = ", ".join(file.path for file in inspection.files)
    if choice.record_id is not None and choice == Choice(choice.record_id):
        raise UserError(f"--record {choice.record_id}: no record with this id in {names}")
    chosen = f" is chosen by {choice.words()}" if choice.words() else " is there"
    print(f"no record{chosen}, of {looked_at:,} in {names}", file=sys.stderr)


def _pager(args: argparse.Namespace) -> list[str]:
    return pager_command() if sys.stdout.isatty() and not args.no_pager else []


def _inspection(args: argparse.Namespace) -> Inspection:
    inspection = _of_config(args) if args.config is not None else _of_records(args)
    if args.source is None:
        return inspection
    files = files_named(inspection.files, args.source)
    return Inspection(
        files,
        inspection.renderer,
        inspection.config,
        inspection.num_image_tokens,
        inspection.look_for_pictures,
    )


def _of_config(args: argparse.Namespace) -> Inspection:
    _refuse_together(args)
    config = load_config(args.config, args.overrides)
    files = config.data.eval if args.eval else config.data.train
    if not files:
        raise UserError(f"--eval: {args.config} names no held-out files in data.eval")
    renderer = load_language(config).renderer
    if args.image_tokens is not None:
        return Inspection(files, renderer, config.data, args.image_tokens)
    try:
        return Inspection(files, renderer, config.data, _image_tokens(config))
    except UserError as error:
        if args.html or args.statistics:
            raise UserError(f"{error}; or give --image-tokens N") from None
        print(
            f"note: {error}; so {LLAVA_IMAGE_TOKENS} image tokens a picture are counted and no "
            "record is too long; --image-tokens N tells the true number",
            file=sys.stderr,
        )
        unlimited = config.data.model_copy(update={"max_length": NO_LIMIT})
        return Inspection(files, renderer, unlimited, LLAVA_IMAGE_TOKENS)


def _image_tokens(config: RunConfig) -> int:
    """What a picture becomes, asked of the tower itself."""
    tower = config.model.vision_tower
    if tower.name is not None:
        print(
            f"building the vision tower {tower.name} to count its tokens a picture; "
            "--image-tokens N leaves that out",
            file=sys.stderr,
        )
    return build_vision_tower(tower).num_tokens


def _of_records(args: argparse.Namespace) -> Inspection:
    if args.eval:
        raise UserError("--eval: belongs to CONFIG.yaml; with --records, name the held-out file")
    missing = [f"--{name}" for name in ("records", "tokenizer") if getattr(args, name) is None]
    if missing:
        raise UserError(f"give CONFIG.yaml, or --records and --tokenizer (missing: {missing[0]})")
    tokenizer = load_tokenizer(LanguageModelConfig(name=args.tokenizer))
    renderer = Renderer.from_name(
        args.template or "auto",
        tokenizer,
        default_system=args.system,
        recipe=args.recipe or "fixed",
    )
    file = DataFile(path=args.records, format=args.format or "auto", image_root=args.image_root)
    config = DataConfig(
        train=[file],
        max_length=args.max_length or NO_LIMIT,
        length_policy=args.length_policy or "error",
    )
    image_tokens = args.image_tokens or LLAVA_IMAGE_TOKENS
    return Inspection([file], renderer, config, image_tokens, look_for_pictures=False)


def _refuse_together(args: argparse.Namespace) -> None:
    """What a configuration says is not said twice."""
    names = ("records", "format", "image_root", "tokenizer", "template", "system", "recipe")
    for name in (*names, "max_length", "length_policy"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option}: give CONFIG.yaml or --records, not both; change a configuration's "
                "settings with key.path=value"
            )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = _parser().parse_intermixed_args(argv)
    for name, least in {"limit": 1, "image_tokens": 1, "max_length": 1, "longer_than": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    if args.html is not None and args.json and not args.statistics:
        raise UserError("--json and --html: give one of them, or --statistics beside them")
    if args.html is not None and Path(args.html).is_dir():
        raise UserError(f"--html {args.html}: this is a folder; give the page's file name")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_sft.show",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changed settings")
    add = parser.add_argument_group("what is read").add_argument
    add("--eval", action="store_true", help="held-out files of the configuration")
    add("--source", metavar="NAME", help="only this file of the configuration, by path or name")
    asked = f"asked of the configuration's tower; with --records {LLAVA_IMAGE_TOKENS}, LLaVA-1.5's"
    add("--image-tokens", type=int, metavar="N", help=f"a picture's tokens (default: {asked})")
    add = parser.add_argument_group("without a configuration").add_argument
    add("--records", metavar="FILE", help="a file of records, without CONFIG.yaml")
    add("--format", choices=["auto", "llava", "messages", "alpaca"])
    add("--image-root", metavar="DIR", help="where relative picture names start")
    add("--tokenizer", metavar="DIR", help="a folder, a hub name, or 'bytes'")
    add("--template", help="a name, a YAML file, or auto (default)")
    add("--system", help="system text for records that have none")
    add("--recipe", choices=["fixed", "llava-1.5"], help="LLaVA's quirks (default: fixed)")
    add("--max-length", type=int, metavar="N", help="longest sequence (default: no limit)")
    add("--length-policy", choices=["error", "drop_turns", "skip"], help="default: error")
    add = parser.add_argument_group("which records are shown").add_argument
    add("--record", metavar="ID", help="only the record with this id")
    add("--reason", metavar="CODE", help="only those of this reason, e.g. too_long, empty_answer")
    add("--longer-than", type=int, metavar="N", help="tokens with image tokens, before turns drop")
    add("--shorter-than", type=int, metavar="N", help="likewise")
    default = f"{SHOWN}; in a pager and with --json all; on a page {SHOWN_ON_A_PAGE}"
    add("--limit", type=int, metavar="N", help=f"at most this many (default: {default})")
    add = parser.add_argument_group("how").add_argument
    add("--html", metavar="FILE", help="write one self-contained page")
    add("--statistics", action="store_true", help="figures of all records instead of records")
    add("--json", action="store_true", help="one JSON object a line; with --statistics one in all")
    add("--no-pager", action="store_true", help="print to the terminal itself")
    add("--no-color", action="store_true", help="no colours (marks stay)")
    return parser


if __name__ == "__main__":
    run_command(main)
