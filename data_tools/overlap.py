"""Report which evaluation images occur in training records, and were therefore trained on.

Images are compared by COCO id, by file content and by perceptual hash, so that renamed, copied and
re-encoded images are found. With --run, the records are those of the run's configuration that its
updates have used (trained.jsonl). `vlm-sft data pope` leaves such images out by itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import (
    CommandParser,
    add_columns_option,
    heavy_imports,
    require_file,
    require_folder,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.output_files import require_output_file

EXAMPLES: Final = """examples:
  vlm-sft data overlap --images val2014 --training llava_v1_5_mix665k.json
  vlm-sft data overlap --images val2014 --questions coco_pope_random.json \\
      --training mine.json --training-images images --out overlap.json
  vlm-sft data overlap --images val2014 --run runs/stage1 runs/stage2
"""


def main(argv: Sequence[str]) -> int:
    """Compare the images, print the counts, write `--out`; return the exit code."""
    arguments = parser().read(argv)
    require_folder("--images", arguments.images)
    if arguments.training_images is not None:
        require_folder("--training-images", arguments.training_images)
    for option in ("questions", "training"):
        for path in getattr(arguments, option):
            require_file(f"--{option}", path)
    if not (arguments.training or arguments.run):
        raise UserError("give --training FILES or --run DIR: there is nothing to compare with")
    for run in arguments.run:
        require_folder("--run", run)
    if arguments.out is not None:
        logs = [run / name for run in arguments.run for name in ("config.yaml", "trained.jsonl")]
        require_output_file(
            arguments.out, inputs=[*arguments.questions, *arguments.training, *logs],
            image_roots=[arguments.images], command="overlap", overwrite=arguments.overwrite,
        )  # fmt: skip
    with heavy_imports():
        from data_tools.rules.overlap import report_overlap
    report_overlap(arguments)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data overlap", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of evaluation images")
    add(
        "--questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help='question files that name them as "image" (default: every image in --images)',
    )
    add(
        "--training",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="records that the model was trained on, as data.train has them",
    )
    add_columns_option(add, "--training")
    add(
        "--training-images",
        type=Path,
        metavar="DIR",
        help="image_root of --training (default: each file's folder)",
    )
    add(
        "--run",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="output_dir of runs; relative paths in their configurations start here",
    )
    add("--out", type=Path, metavar="FILE", help="JSON file with each image that was found and why")
    add("--overwrite", action="store_true", help="replace --out even if another program wrote it")
    return parser


if __name__ == "__main__":
    run_command(main)
