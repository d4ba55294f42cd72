"""Mix sources of records into one training file, in wanted shares, under unique ids.

`python -m data_tools.mix MIX.yaml [KEY=VALUE ...]` reads LLaVA JSON, messages, Alpaca and Parquet
as the trainer does and writes `train.jsonl` (messages), `card.json` and `card.md`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.mixing import card, scan, writing
from data_tools.mixing.config import MixConfig
from data_tools.mixing.quotas import quotas
from vlm_sft import settings
from vlm_sft.atomic import atomic_open, write_json, write_text
from vlm_sft.command_line import CommandParser, add_overrides
from vlm_sft.errors import run_command

EXAMPLES = """examples:
  python -m data_tools.mix configs/instruct/mix.yaml
  python -m data_tools.mix my-mix.yaml total=100000 replay_share=0.06 when_short=upsample
"""


def main(argv: Sequence[str]) -> int:
    """Mix as `argv` says; returns the exit code."""
    arguments = parser().read(argv)
    config = settings.load(MixConfig, arguments.config, arguments.overrides)
    split = config.cannot_tell_share is not None
    sources = scan.scan(config)
    available = {source.config.name: source.available(split) for source in sources}
    wanted = quotas(config, available)
    times = [scan.selected(source, wanted[source.config.name], split) for source in sources]
    root = writing.common_root(config, sources)
    output = Path(config.output_dir) / "train.jsonl"
    with atomic_open(output) as file:
        for record in writing.records(sources, times, root):
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    found = card.rows(sources, wanted, available, times)
    told = card.card(config, sources, times, found, root, output)
    write_json(output.with_name("card.json"), told)
    write_text(output.with_name("card.md"), card.markdown(told))
    print(card.table(found))
    print(f"\n{output} and card.md; ids are `source/id`, pictures start from image_root {root}")
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("python -m data_tools.mix", __doc__, EXAMPLES, takes_settings=True)
    parser.add_argument("config", metavar="MIX.yaml", help="the sources and their shares")
    add_overrides(parser, "total=1000")
    return parser


if __name__ == "__main__":
    run_command(main)
