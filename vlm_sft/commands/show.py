"""Print records or figures, or write an HTML page."""

import argparse
import sys
from pathlib import Path

from vlm_sft.config.schema import DataConfig, DataFile, LanguageModelConfig, RunConfig
from vlm_sft.data.build import load_chat_tokenizer
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.image_layout import LayoutRule, layout_rule
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError, error_line
from vlm_sft.inspection.limits import LLAVA_IMAGE_TOKENS, MAX_ON_PAGE, MAX_PRINTED
from vlm_sft.inspection.records import NO_LIMIT, Inspected, Inspection, Selection, files_named
from vlm_sft.inspection.records_page import RecordsPage
from vlm_sft.inspection.statistics import Statistics
from vlm_sft.inspection.terminal import as_text, output, pager_command, print_tables
from vlm_sft.inspection.tokens import as_json, view_tokens
from vlm_sft.model.build import build_vision_tower
from vlm_sft.utils.console import echo, echo_json


def run(args: argparse.Namespace, config: RunConfig | None) -> int:
    """Print or write records with their trained tokens; return 2 if a printed one is faulty."""
    inspection = _inspection(args, config)
    selection = Selection(args.record, args.reason, args.longer_than, args.shorter_than)
    if args.html or args.statistics:
        return _read_all(args, inspection, selection)
    if args.json:
        return _print_json(args, inspection, selection)
    return _print(args, inspection, selection)


def _read_all(args: argparse.Namespace, inspection: Inspection, selection: Selection) -> int:
    """Read all records for the figures; write the page, print the tables."""
    statistics = Statistics(inspection)
    page = RecordsPage(inspection, args.limit or MAX_ON_PAGE, str(selection))
    for found in inspection.records(progress=True):
        statistics.add(found)
        if args.html and selection.matches(found):
            page.add(found)
    if args.html:
        if not page.num_matching:
            _report_none(inspection, selection, statistics.total.records)
        page.write(args.html, statistics)
        size = Path(args.html).stat().st_size / 1e6
        shown = f"{page.num_shown:,} of {page.num_matching:,} records"
        echo(f"{args.html}: {shown}, {size:.1f} MB")
    if args.statistics and args.json:
        echo_json(statistics.as_json())
    elif args.statistics:
        with output(_pager(args), no_color=args.no_color) as console:
            print_tables(console, statistics.tables())
    return 0


def _print(args: argparse.Namespace, inspection: Inspection, selection: Selection) -> int:
    pager = _pager(args)
    limit = args.limit or (sys.maxsize if pager or args.record else MAX_PRINTED)
    num_read = shown = faulty = 0
    more = False
    with output(pager, no_color=args.no_color) as console:
        for found in inspection.records():
            num_read += 1
            if not selection.matches(found):
                continue
            if shown == limit:
                more = True
                break
            view = view_tokens(found, inspection.chat_tokenizer, inspection.layout_rule)
            # Text is wrapped at words on a terminal, and not wrapped in a file.
            console.print(as_text(found, view), soft_wrap=not console.is_terminal)
            shown += 1
            faulty += found.result.error is not None
    if not shown:
        _report_none(inspection, selection, num_read)
    if more:
        echo(f"{shown:,} records shown; there are more (--limit N)")
    if faulty:
        echo(f"error: {faulty:,} of {shown:,} records shown are faulty")
    return 2 if faulty else 0


def _print_json(args: argparse.Namespace, inspection: Inspection, selection: Selection) -> int:
    limit = args.limit or sys.maxsize
    num_read = shown = faulty = 0
    for found in inspection.records():
        num_read += 1
        if not selection.matches(found):
            continue
        shown += 1
        faulty += not _print_line(found, inspection)
        if shown == limit:
            break
    if not shown:
        _report_none(inspection, selection, num_read)
    return 2 if faulty else 0


def _print_line(found: Inspected, inspection: Inspection) -> bool:
    """Print a record as JSON, or its error on stderr; return whether it is valid."""
    if found.result.error is not None:
        echo(error_line(found.result.error))
        return False
    echo_json(as_json(found, inspection.chat_tokenizer))
    return True


def _report_none(inspection: Inspection, selection: Selection, num_read: int) -> None:
    """Report that no record is selected; an unknown id is an error."""
    names = ", ".join(file.path for file in inspection.files)
    if selection.record_id is not None and selection == Selection(selection.record_id):
        raise UserError(f"--record {selection.record_id}: no record with this id in {names}")
    criteria = f" matches {selection}" if str(selection) else ""
    echo(f"no record{criteria}; {num_read:,} records in {names}")


def _pager(args: argparse.Namespace) -> list[str]:
    return pager_command() if sys.stdout.isatty() and not args.no_pager else []


def _inspection(args: argparse.Namespace, config: RunConfig | None) -> Inspection:
    inspection = _from_records(args) if config is None else _from_config(args, config)
    if args.source is None:
        return inspection
    files = files_named(inspection.files, args.source)
    return Inspection(
        files,
        inspection.chat_tokenizer,
        inspection.config,
        inspection.layout_rule,
        inspection.look_for_images,
    )


def _from_config(args: argparse.Namespace, config: RunConfig) -> Inspection:
    files = config.data.eval if args.eval else config.data.train
    chat_tokenizer = load_chat_tokenizer(config)
    if args.image_tokens is not None:
        rule = LayoutRule(args.image_tokens)
        return Inspection(files, chat_tokenizer, config.data, rule)
    try:
        return Inspection(files, chat_tokenizer, config.data, _layout_rule(config))
    except UserError as error:
        if args.html or args.statistics:
            raise UserError(f"{error}; or give --image-tokens N") from None
        echo(
            f"note: {error}; {LLAVA_IMAGE_TOKENS} image tokens per image are assumed and no length "
            "limit is applied; give the true number with --image-tokens N"
        )
        unlimited = config.data.model_copy(update={"max_length": NO_LIMIT})
        return Inspection(files, chat_tokenizer, unlimited, LayoutRule(LLAVA_IMAGE_TOKENS))


def _layout_rule(config: RunConfig) -> LayoutRule:
    """Return how images become tokens, by building the vision tower."""
    tower = config.model.vision_tower
    if tower.name is not None:
        echo(
            f"building the vision tower {tower.name} to count its image tokens; "
            "--image-tokens N skips this"
        )
    built = build_vision_tower(tower)
    grid = config.model.token_grid(built.grid)
    return layout_rule(config.model.image_tiling, grid, built.image_spec.size)


def _from_records(args: argparse.Namespace) -> Inspection:
    tokenizer = load_tokenizer(LanguageModelConfig(name=args.tokenizer), "--tokenizer")
    chat_tokenizer = ChatTokenizer.from_name(
        args.template or "auto",
        tokenizer,
        default_system=args.system,
        llava_quirks=args.llava_quirks or "none",
    )
    file = DataFile(
        path=args.records,
        format=args.format or "auto",
        columns=args.columns,
        image_root=args.image_root,
        follow_symlinks=args.follow_symlinks,
    )
    config = DataConfig(
        train=[file],
        max_length=args.max_length or NO_LIMIT,
        length_policy=args.length_policy or "error",
    )
    rule = LayoutRule(args.image_tokens or LLAVA_IMAGE_TOKENS)
    return Inspection([file], chat_tokenizer, config, rule, look_for_images=False)
