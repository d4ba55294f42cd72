r"""Write preference pairs as TRL reads them: convert_pairs.py PAIRS.jsonl OUT.jsonl [IMAGE_ROOT].

    python scripts/after_sft/convert_pairs.py pairs.jsonl trl.jsonl

PAIRS are records of training data whose last turn is the user's, with two answers:
    {"image": "dog.jpg", "conversations": [{"from": "human", "value": "<image>\nA dog?"}],
     "chosen": "Yes.", "rejected": "No."}

A record that is no pair is named, and nothing is written; exit code 2.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.run_command import run_command
from vlm_sft.data.preferences import PreferencePair, read_pairs, trl_row
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_text


def main(argv: Sequence[str]) -> int:
    """Convert the file; returns the exit code."""
    if len(argv) not in (2, 3) or "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0 if "-h" in argv or "--help" in argv else 2
    source, out = Path(argv[0]), Path(argv[1])
    if out.exists():
        raise UserError(f"{out}: exists already; give the name of a new file")
    rows = []
    for pair in read_pairs(source, Path(argv[2]) if len(argv) == 3 else None):
        if not isinstance(pair, PreferencePair):
            raise UserError(str(pair))
        for image in pair.prompt.images:
            if isinstance(image, Path) and not image.is_file():
                raise UserError(f"{pair.prompt.where}: no such image {image}")
        rows.append(trl_row(pair))
    if not rows:
        raise UserError(f"{source}: has no records")
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows):,} pairs")
    return 0


if __name__ == "__main__":
    run_command(main)
