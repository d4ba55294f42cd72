"""Review samples by eye: accept, reject or edit them on a local page, with the keyboard.

DIR is the folder of a run whose answers were verified; --records names any file that training reads
instead. Decisions are appended to DIR/review (or --out), one file a reviewer, and go on where they
were at the next start. `clean` and `select` read them (their setting `decisions`). --agreement
compares reviewers instead of starting the page.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlm_sft.commands.parser import (
    CommandParser,
    add_columns_option,
    heavy_imports,
    number,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from data_tools.review.agreement import Agreement
    from data_tools.review.sources import Item, Source

KIND: Final = "review"
"""Kind of output in the marker of the folder of decisions."""

EXAMPLES: Final = """examples:
  vlm-sft data review runs/instruct --reviewer alice
  vlm-sft data review runs/instruct --reviewer bob --part 2/2 --shared 0.2 --order random
  vlm-sft data review runs/instruct --agreement
  vlm-sft data review --records llava.json --image-root images --out reviewed"""

_LISTED: Final = 50


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, or print the agreement; return the exit code."""
    arguments = parser().read(argv)
    out = _out(arguments)
    for option in ("records", "instances", "captions"):
        if (path := getattr(arguments, option)) is not None and option != "records":
            require_file(f"--{option}", path)

    from data_tools.review.agreement import agreements
    from data_tools.review.decisions import ReviewerLog, read_decisions, require_reviewer
    from data_tools.review.server import Review, make_server
    from vlm_sft.utils.console import echo
    from vlm_sft.utils.ownership import own_directory

    if arguments.agreement:
        found = agreements(read_decisions(out), seed=arguments.seed)
        if not found:
            raise UserError(f"{out}: no two reviewers have decided about a common sample")
        for one in found:
            echo(_in_words(one), file=sys.stdout)
        return 0
    reviewer = require_reviewer(arguments.reviewer)
    source = _source(arguments)
    order = order_of(
        source.items, arguments.part.number, arguments.part.count, arguments.shared,
        seed=arguments.seed, shuffled=arguments.order == "random",
    )  # fmt: skip
    if not order:
        raise UserError(f"{source.name}: there is no sample to review", code="no_records")
    own_directory(out, KIND, setting="--out")
    log = ReviewerLog(out, reviewer)
    review = Review(source, log, order)
    server, address = make_server(review, arguments.port)
    with heavy_imports():  # now, and not while the page waits for its first image
        from vlm_sft.data import images  # noqa: F401
    if review.changed:
        echo(f"not applied: decisions about {review.changed:,} samples that have changed since")
    echo(f"{review.done:,} of {len(order):,} samples are reviewed; decisions go to {log.path}")
    echo(f"review as {reviewer}: {address} (Ctrl-C ends)", file=sys.stdout)
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        echo(f"{review.done:,} of {len(order):,} samples are reviewed")
    finally:
        server.server_close()
        log.close()
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    from data_tools.instruct.generate.shard import ALL_REQUESTS, Shard

    parser = CommandParser("vlm-sft data review", __doc__, EXAMPLES)
    add = parser.add_argument
    add("run", metavar="DIR", nargs="?", type=Path, help="folder of a run of `vlm-sft data`")
    add("--records", type=Path, metavar="FILE", help="records in any format that training reads")
    add_columns_option(add, "--records")
    add("--image-root", type=Path, metavar="DIR", help="where the image names start from")
    follow = "allow symbolic links that leave --image-root"
    add("--follow-symlinks", action="store_true", help=follow)
    boxes = "COCO's instances_*.json: draw boxes on --records, and check claims"
    add("--instances", type=Path, metavar="FILE", help=boxes)
    add("--captions", type=Path, metavar="FILE", help="COCO's captions_*.json, to check claims")
    add("--out", type=Path, metavar="DIR", help="folder of the decisions (default: DIR/review)")
    who = "your name, which is that of your file of decisions (default: me)"
    add("--reviewer", default="me", metavar="NAME", help=who)
    how = "as in the file, or at random by --seed"
    add("--order", choices=["file", "random"], default="file", help=how)
    add("--seed", type=whole_number(0), default=0, help="of order, parts and intervals")
    part = "review only part i of n of the samples, one part a reviewer"
    add("--part", type=Shard.parse, default=ALL_REQUESTS, metavar="i/n", help=part)
    both = "share of the samples that is in every part, to measure agreement (default: 0)"
    add("--shared", type=number(0, 1), default=0.0, metavar="SHARE", help=both)
    add("--port", type=whole_number(0, 65535), default=0, help="default: a free one")
    agree = "print how far reviewers agree about samples that two of them have decided about"
    add("--agreement", action="store_true", help=agree)
    return parser


def order_of(
    items: "Sequence[Item]", part: int, parts: int, shared: float, *, seed: int, shuffled: bool
) -> list[int]:
    """Return the numbers of the samples that a reviewer is asked about.

    It depends on seed and ids alone: another start, or more samples in the file, moves none of them
    to another part.

    Args:
        items: All samples.
        part: Which part, from 1.
        parts: Number of parts.
        shared: Share that is in every part.
        seed: Of all choices.
        shuffled: Whether the order is random.
    """
    from data_tools.digests import hashed

    own = [
        place
        for place, item in enumerate(items)
        if hashed(seed, "shared", item.id) < shared * 2**64
        or hashed(seed, "part", item.id) % parts == part - 1
    ]
    if shuffled:
        own.sort(key=lambda place: hashed(seed, "order", items[place].id))
    return own


def _out(arguments: Any) -> Path:
    """Return the folder of the decisions.

    Raises:
        UserError: Arguments are missing, or do not belong together.
    """
    if arguments.agreement and arguments.out is not None:
        return Path(arguments.out)
    if (arguments.run is None) == (arguments.records is None):
        raise UserError("give DIR, the folder of a run, or --records FILE")
    if arguments.records is not None and arguments.out is None:
        raise UserError("--records needs --out DIR, the folder of the decisions")
    if arguments.run is not None and (arguments.instances or arguments.captions):
        raise UserError("--instances and --captions belong to --records; a run has its own")
    if arguments.image_root is not None:
        require_folder("--image-root", arguments.image_root)
    if arguments.run is not None:
        require_folder("DIR", arguments.run)
    return Path(arguments.out or arguments.run / "review")


def _source(arguments: Any) -> "Source":
    from data_tools.review.sources import RecordFile, RunSamples
    from vlm_sft.config.schema import ColumnNames, DataFile

    if arguments.records is None:
        return RunSamples(arguments.run, arguments.image_root)
    file = DataFile(
        path=str(arguments.records),
        columns=ColumnNames.of_option(arguments.columns),
        image_root=None if arguments.image_root is None else str(arguments.image_root),
        follow_symlinks=arguments.follow_symlinks,
    )
    return RecordFile(file, arguments.instances, arguments.captions)


def _in_words(found: "Agreement") -> str:
    """Return what `--agreement` prints about two reviewers."""
    from data_tools.review.agreement import CHOICES

    one, other = found.names
    total = int(found.counts.sum())
    lines = [
        f"{one} and {other}: {total:,} samples in common, same decision about {found.share:.1%}",
        f"Cohen's kappa {found.kappa:.3f} [{found.low:.3f}, {found.high:.3f}] (95 %, resampled)",
        "",
        f"{one} \\ {other}".ljust(24) + "".join(f"{choice:>9}" for choice in CHOICES),
    ]
    for choice, row in zip(CHOICES, found.counts, strict=True):
        lines.append(choice.ljust(24) + "".join(f"{count:>9,}" for count in row))
    if found.differing:
        lines += ["", f"{len(found.differing):,} samples with different decisions:"]
    for name, first, second in found.differing[:_LISTED]:
        lines.append(f"  {json.dumps(name, ensure_ascii=False)}: {first.words}; {second.words}")
    if len(found.differing) > _LISTED:
        lines.append(f"  and {len(found.differing) - _LISTED:,} more")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_command(main)
