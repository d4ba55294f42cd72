"""Mix sources of records into one training file, in wanted shares, under unique ids.

Reads LLaVA JSON, messages, Alpaca and Parquet as the trainer does, and writes `train.jsonl`
(messages), `card.json` and `card.md`.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vlm_sft.commands.parser import CommandParser, add_overrides, heavy_imports
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from data_tools.mix.config import MixConfig

KIND: Final = "mixture"
"""Kind of output in the marker of the directory."""
OUTPUTS: Final = ("train.jsonl", "card.json", "card.md")

EXAMPLES = """examples:
  vlm-sft data mix configs/instruct/mix.yaml
  vlm-sft data mix my-mix.yaml total=100000 replay_share=0.06 when_short=upsample
"""


def main(argv: Sequence[str]) -> int:
    """Write the mixture and return the exit code."""
    arguments = parser().read(argv)

    from data_tools.mix.config import MixConfig
    from vlm_sft.config import loading as settings
    from vlm_sft.utils.console import echo
    from vlm_sft.utils.owned_files import owned_open, write_owned, write_owned_json

    config = settings.load(MixConfig, arguments.config, arguments.overrides)
    output = _own(config, arguments.config, overwrite=arguments.overwrite)
    with heavy_imports():
        from data_tools.mix.card import markdown, mixture_card, table
        from data_tools.mix.quotas import quotas
        from data_tools.mix.read import read_sources
        from data_tools.mix.write import choose, common_root, mixed_records

    split = config.cannot_tell_share is not None
    sources = read_sources(config)
    available = {source.config.name: source.available(split=split) for source in sources}
    wanted = quotas(config, available)
    times = [choose(source, wanted[source.config.name], split=split) for source in sources]
    root = common_root(config, sources)
    with owned_open(output) as file:
        for record in mixed_records(sources, times, root):
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    card = mixture_card(config, sources, wanted, times, root, output)
    write_owned_json(output.with_name("card.json"), card)
    write_owned(output.with_name("card.md"), markdown(card).encode())
    echo(table(card), file=sys.stdout)
    echo(
        f"\n{output} and card.md; ids are `source/id`, images are relative to image_root {root}",
        file=sys.stdout,
    )
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        "vlm-sft data mix", __doc__, EXAMPLES, settings="data_tools.mix.config:MixConfig"
    )
    parser.add_argument("config", metavar="MIX.yaml", help="the sources and their shares")
    add_overrides(parser, "total=1000")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files in output_dir that were edited or that this command did not write",
    )
    return parser


def _own(config: "MixConfig", given: str, *, overwrite: bool) -> Path:
    """Check that the output files may be written and are not inputs; return the training file."""
    from vlm_sft.utils.owned_files import own_output
    from vlm_sft.utils.ownership import read_marker

    folder = Path(config.output_dir)
    inputs = [given, *_inputs(config)]
    card_file = folder / "card.json"
    if not overwrite and read_marker(folder) is None and _is_card(card_file):
        raise UserError(
            f"{folder}: was written by an older version, which did not record what it wrote, so "
            "that edited files cannot be recognized; choose a new output_dir, or replace its "
            "files with --overwrite",
            code="not_ours",
        )
    for source in config.sources:
        path = Path(source.path).resolve()
        if path.is_dir() and folder.resolve().is_relative_to(path):
            raise UserError(
                f"output_dir {folder}: lies in the folder of source {source.name} ({source.path}), "
                "whose records would change by it; choose another output_dir",
                code="not_ours",
            )
    roots = [s.image_root or str(Path(s.path).parent) for s in config.sources]
    own_output(folder, KIND, OUTPUTS, inputs=inputs, image_roots=roots, overwrite=overwrite)
    return folder / "train.jsonl"


def _inputs(config: "MixConfig") -> Iterator[str]:
    """Yield every file and folder that the mixture is read from."""
    for source in config.sources:
        yield from (name for name in (source.path, source.receipts, source.image_root) if name)
    for files in config.guard.lists.values():
        yield from [files] if isinstance(files, str) else files


def _is_card(path: Path) -> bool:
    from vlm_sft.utils.reading import read_json

    try:
        found = read_json(path)
    except (OSError, UserError):
        return False
    return isinstance(found, dict) and {"sources", "evaluation_guard", "file"} <= found.keys()


if __name__ == "__main__":
    run_command(main)
