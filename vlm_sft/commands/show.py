"""Print records, their figures, or a page of them."""

import argparse
import sys
from pathlib import Path

from vlm_sft.config.schema import DataConfig, DataFile, LanguageModelConfig, RunConfig
from vlm_sft.data.build import load_language
from vlm_sft.data.text_encoder import load_tokenizer
from vlm_sft.data.tokenize import Renderer
from vlm_sft.errors import UserError, error_line
from vlm_sft.inspection.html import RecordsPage
from vlm_sft.inspection.limits import LLAVA_IMAGE_TOKENS, SHOWN, SHOWN_ON_A_PAGE
from vlm_sft.inspection.records import NO_LIMIT, Choice, Inspected, Inspection, files_named
from vlm_sft.inspection.statistics import Statistics
from vlm_sft.inspection.terminal import as_text, output, pager_command, print_tables
from vlm_sft.inspection.tokens import as_json, spell
from vlm_sft.model.vision_tower import build_vision_tower
from vlm_sft.utils.console import say, say_json


def run(args: argparse.Namespace, config: RunConfig | None) -> int:
    """Print or write records with what is trained in them; 2 when a printed record is faulty."""
    inspection = _inspection(args, config)
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
        say(f"{args.html}: {shown}, {size:.1f} MB")
    if args.statistics and args.json:
        say_json(statistics.as_json())
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
        say(f"{shown:,} records shown; there are more, see --limit")
    if faulty:
        say(f"error: {faulty:,} of {shown:,} records shown are faulty")
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
        say(error_line(found.outcome.error))
        return False
    say_json(as_json(found, inspection.renderer))
    return True


def _say_none(inspection: Inspection, choice: Choice, looked_at: int) -> None:
    """Say that no record was chosen; an id that is nowhere is an error."""
    names = ", ".join(file.path for file in inspection.files)
    if choice.record_id is not None and choice == Choice(choice.record_id):
        raise UserError(f"--record {choice.record_id}: no record with this id in {names}")
    chosen = f" is chosen by {choice.words()}" if choice.words() else " is there"
    say(f"no record{chosen}, of {looked_at:,} in {names}")


def _pager(args: argparse.Namespace) -> list[str]:
    return pager_command() if sys.stdout.isatty() and not args.no_pager else []


def _inspection(args: argparse.Namespace, config: RunConfig | None) -> Inspection:
    inspection = _of_records(args) if config is None else _of_config(args, config)
    if args.source is None:
        return inspection
    files = files_named(inspection.files, args.source)
    return Inspection(
        files,
        inspection.renderer,
        inspection.config,
        inspection.num_image_tokens,
        inspection.look_for_images,
    )


def _of_config(args: argparse.Namespace, config: RunConfig) -> Inspection:
    files = config.data.eval if args.eval else config.data.train
    renderer = load_language(config).renderer
    if args.image_tokens is not None:
        return Inspection(files, renderer, config.data, args.image_tokens)
    try:
        return Inspection(files, renderer, config.data, _image_tokens(config))
    except UserError as error:
        if args.html or args.statistics:
            raise UserError(f"{error}; or give --image-tokens N") from None
        say(
            f"note: {error}; so {LLAVA_IMAGE_TOKENS} image tokens an image are counted and no "
            "record is too long; --image-tokens N tells the true number"
        )
        unlimited = config.data.model_copy(update={"max_length": NO_LIMIT})
        return Inspection(files, renderer, unlimited, LLAVA_IMAGE_TOKENS)


def _image_tokens(config: RunConfig) -> int:
    """What an image becomes, asked of the tower itself."""
    tower = config.model.vision_tower
    if tower.name is not None:
        say(
            f"building the vision tower {tower.name} to count its tokens an image; "
            "--image-tokens N leaves that out"
        )
    return build_vision_tower(tower).num_tokens


def _of_records(args: argparse.Namespace) -> Inspection:
    tokenizer = load_tokenizer(LanguageModelConfig(name=args.tokenizer), "--tokenizer")
    renderer = Renderer.from_name(
        args.template or "auto",
        tokenizer,
        default_system=args.system,
        recipe="fixed" if args.llava_quirks in (None, "none") else args.llava_quirks,
    )
    file = DataFile(
        path=args.records,
        format=args.format or "auto",
        image_root=args.image_root,
        follow_symlinks=args.follow_symlinks,
    )
    config = DataConfig(
        train=[file],
        max_length=args.max_length or NO_LIMIT,
        length_policy=args.length_policy or "error",
    )
    image_tokens = args.image_tokens or LLAVA_IMAGE_TOKENS
    return Inspection([file], renderer, config, image_tokens, look_for_images=False)
