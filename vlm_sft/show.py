"""Show records as the model will see them: `python -m vlm_sft.show CONFIG.yaml`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from vlm_sft.config import DataFile, LanguageModelConfig, load_config
from vlm_sft.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.formats import read_records
from vlm_sft.data.masking import Rendered, Renderer
from vlm_sft.data.tokenizer import load_tokenizer
from vlm_sft.errors import RecordError, UserError, run_command

EXAMPLES = """\
examples:
  # the first records of a configuration, trained tokens highlighted
  python -m vlm_sft.show configs/tiny/stage2.yaml --limit 3

  # one record by its id, as JSON (ids, labels, tokens; one placeholder a picture)
  python -m vlm_sft.show configs/tiny/stage2.yaml --record 7 --json

  # any file under any tokenizer and template, without a configuration
  python -m vlm_sft.show --records data.json --tokenizer DIR --template chatml
"""

_VISIBLE: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) != "\n"},
    **{code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)},
}
"""Pictures of the characters that a terminal would obey."""


def main(argv: Sequence[str]) -> int:
    """Print records with what is trained in them; 2 when a shown record is faulty."""
    args = _parse(argv)
    files, renderer = _sources(args)
    console = Console(no_color=args.no_color or None, highlight=False)
    shown = faulty = 0
    for record in _wanted(files, args.record):
        if shown + faulty >= args.limit:
            break
        rendered = _render(record, renderer)
        if isinstance(rendered, RecordError):
            print(f"error: {rendered}", file=sys.stderr)
            faulty += 1
            continue
        assert isinstance(record, Conversation)
        shown += 1
        if args.json:
            print(json.dumps(as_json(record, rendered, renderer), ensure_ascii=False))
        else:
            console.print(as_text(record, rendered, renderer), soft_wrap=True)
    if args.record is not None and not shown + faulty:
        raise UserError(
            f"--record {args.record}: no record with this id in "
            + ", ".join(file.path for file in files)
        )
    return 2 if faulty else 0


def as_json(record: Conversation, rendered: Rendered, renderer: Renderer) -> dict[str, Any]:
    """One record for other programs.

    `input_ids` hold one `image_token_id` a picture; `labels` are -100 where nothing is trained;
    `tokens` are the vocabulary's own spellings.
    """
    return {
        "id": record.id,
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "tokens": [_token(i, renderer) for i in rendered.input_ids],
        "num_images": rendered.num_images,
        "image_token_id": IMAGE_TOKEN_ID,
    }


def as_text(record: Conversation, rendered: Rendered, renderer: Renderer) -> Text:
    """One record for a terminal: trained text bold between ⟦ and ⟧, control tokens in colour.

    Control characters stand as their pictures (␛), so that data cannot command the terminal.
    """
    trained = sum(label != IGNORE_INDEX for label in rendered.labels)
    text = Text()
    text.append(f"── {record.id} ".translate(_VISIBLE), style="bold")
    text.append(
        f"({record.where}; {len(rendered.input_ids)} tokens, {trained} trained, "
        f"{rendered.num_images} picture{'' if rendered.num_images == 1 else 's'})\n",
        style="dim",
    )
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    for is_trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        ids = [token_id for token_id, _ in group]
        if is_trained:
            text.append("⟦", style="bold green")
        for piece, is_control in _spelled(ids, renderer):
            style = "cyan" if is_control else ("bold black on green" if is_trained else "dim")
            text.append(piece.translate(_VISIBLE), style=style)
        if is_trained:
            text.append("⟧", style="bold green")
    return text.append("\n")


def _spelled(ids: Sequence[int], renderer: Renderer) -> Iterator[tuple[str, bool]]:
    control = set(renderer.encoder.control_ids.values()) | {IMAGE_TOKEN_ID}
    for is_control, group in groupby(ids, key=control.__contains__):
        if is_control:
            yield from ((_token(i, renderer), True) for i in group)
        else:
            yield renderer.encoder.decode(list(group)), False


def _token(token_id: int, renderer: Renderer) -> str:
    if token_id == IMAGE_TOKEN_ID:
        return IMAGE_PLACEHOLDER
    return str(renderer.tokenizer.convert_ids_to_tokens(token_id))


def _render(record: Conversation | RecordError, renderer: Renderer) -> Rendered | RecordError:
    if isinstance(record, RecordError):
        return record
    try:
        return renderer.render(record)
    except RecordError as error:
        return error


def _wanted(
    files: Sequence[DataFile], record_id: str | None
) -> Iterator[Conversation | RecordError]:
    for file in files:
        for record in read_records(file):
            own = record.id if isinstance(record, Conversation) else record.record_id
            if record_id is None or own == record_id:
                yield record


def _sources(args: argparse.Namespace) -> tuple[Sequence[DataFile], Renderer]:
    if args.config is not None:
        _refuse_together(args)
        config = load_config(args.config, args.overrides)
        tokenizer = load_tokenizer(config.model.language_model)
        renderer = Renderer.from_name(
            config.data.template, tokenizer, default_system=config.data.system
        )
        return (config.data.eval if args.eval else config.data.train), renderer
    if args.eval:
        raise UserError("--eval: belongs to CONFIG.yaml; with --records, name the held-out file")
    missing = [f"--{name}" for name in ("records", "tokenizer") if getattr(args, name) is None]
    if missing:
        raise UserError(f"give CONFIG.yaml, or --records and --tokenizer (missing: {missing[0]})")
    tokenizer = load_tokenizer(LanguageModelConfig(name=args.tokenizer))
    files = [DataFile(path=args.records, format=args.format or "auto", image_root=args.image_root)]
    return files, Renderer.from_name(args.template or "auto", tokenizer, default_system=args.system)


def _refuse_together(args: argparse.Namespace) -> None:
    """What a configuration says is not said twice."""
    for name in ("records", "format", "image_root", "tokenizer", "template", "system"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option}: give CONFIG.yaml or --records, not both; change a configuration's "
                "settings with key.path=value"
            )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_sft.show",
        description="Show records as the model will see them, with the trained tokens marked.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changed settings")
    parser.add_argument("--eval", action="store_true", help="held-out files of the configuration")
    parser.add_argument("--records", metavar="FILE", help="a file of records, without CONFIG.yaml")
    parser.add_argument("--format", choices=["auto", "llava", "messages", "alpaca"])
    parser.add_argument("--image-root", metavar="DIR", help="where relative picture names start")
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder, a hub name, or 'bytes'")
    parser.add_argument("--template", help="a name, a YAML file, or auto (default)")
    parser.add_argument("--system", help="system text for records that have none")
    parser.add_argument("--record", metavar="ID", help="only the record with this id")
    parser.add_argument("--limit", type=int, help="at most this many (default: 5; --json: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--no-color", action="store_true", help="no colours (marks stay)")
    args = parser.parse_intermixed_args(argv)
    if args.limit is None:
        args.limit = sys.maxsize if args.json or args.record else 5
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    return args


if __name__ == "__main__":
    run_command(main)
