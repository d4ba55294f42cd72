"""Show records as the model sees them: `python -m vlm_sft.show CONFIG.yaml`."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from vlm_sft.commands.parser import (
    RUN_SETTINGS,
    CommandParser,
    add_columns_option,
    add_overrides,
    heavy_imports,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import ColumnNames, DataFile, DataFormat, RunConfig
from vlm_sft.errors import UserError
from vlm_sft.errors.codes import CODES
from vlm_sft.inspection.limits import LLAVA_IMAGE_TOKENS, MAX_ON_PAGE, MAX_PRINTED
from vlm_sft.utils.libraries import require_extra
from vlm_sft.utils.output_files import require_output_file

ABOUT = """\
Show records as the model sees them, with the trained tokens marked, and whether the
configuration's length limit and policy keep, shorten or skip them. On a terminal the output goes
through a pager."""

EXAMPLES = """\
examples:
  # the records of a configuration, trained tokens between marks
  vlm-sft show configs/tiny/stage2.yaml --limit 3

  # one record by its id, as JSON (ids, labels, tokens; one placeholder per image)
  vlm-sft show configs/tiny/stage2.yaml --record red-circle-1 --json

  # an HTML page to share: images, trained tokens, figures, search
  vlm-sft show configs/tiny/stage2.yaml --html page.html

  # figures only: outcomes, lengths, trained share and truncation of each file
  vlm-sft show configs/tiny/stage2.yaml --statistics

  # records that are too long, from one of several files
  vlm-sft show configs/tiny/stage2.yaml --source instructions.json --reason too_long

  # any file with any tokenizer and template, without a configuration
  vlm-sft show --records data.json --tokenizer DIR --template chatml

Without a configuration there is no length limit unless --max-length sets one, and image files may
be missing. The exit code is 2 if a printed record is faulty; --statistics and --html report faulty
records and exit with 0."""


def main(argv: Sequence[str]) -> int:
    """Print or write records with their trained tokens; return 2 if a printed one is faulty."""
    arguments = parser().read(argv)
    _require_fitting(arguments)
    from vlm_sft.commands import inputs

    config = None
    if arguments.config is not None:
        parts: set[inputs.Part] = {"tokenizer", "eval" if arguments.eval else "train"}
        config = inputs.read_config(arguments.config, arguments.overrides, parts)
        if arguments.eval and not config.data.eval:
            raise UserError(f"--eval: {arguments.config} has no files in data.eval")
    else:
        inputs.require_records("--records", arguments.records)
        arguments.columns = ColumnNames.of_option(arguments.columns)
        inputs.require_model_name("--tokenizer", arguments.tokenizer)
        inputs.require_template("--template", arguments.template or "auto")
    if arguments.html is not None:
        require_extra("matplotlib", "--html")
        arguments.html = _require_page(arguments, config)
    with heavy_imports():
        from vlm_sft.commands.show import run
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run(arguments, config)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft show", ABOUT, EXAMPLES, settings=RUN_SETTINGS)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="configuration of a run")
    add_overrides(parser)
    _add_input_options(parser)
    _add_selection_options(parser)
    _add_output_options(parser)
    return parser


def _add_input_options(parser: CommandParser) -> None:
    count = whole_number(1)
    add = parser.add_argument_group("input").add_argument
    add("--eval", action="store_true", help="show the files of data.eval instead of data.train")
    add("--source", metavar="NAME", help="only this file of the configuration (path or name)")
    default = f"those of the vision tower; with --records {LLAVA_IMAGE_TOKENS}, as LLaVA-1.5"
    add(
        "--image-tokens",
        type=count,
        metavar="N",
        help=f"image tokens per image (default: {default})",
    )
    add = parser.add_argument_group("input without a configuration").add_argument
    add("--records", metavar="FILE", help="a file or folder of records")
    add(
        "--format",
        choices=get_args(DataFormat),
        help="format of --records (default: auto)",
    )
    add_columns_option(add, "--records")
    add("--image-root", metavar="DIR", help="folder of relative image names")
    add(
        "--follow-symlinks",
        action="store_true",
        help="allow symbolic links that leave the image root",
    )
    add("--tokenizer", metavar="DIR", help="folder, hub name, or 'bytes'")
    add("--template", metavar="NAME", help="name, template file, or auto (default)")
    add("--system", metavar="TEXT", help="system text for records that have none")
    add(
        "--llava-quirks",
        choices=["none", "llava-1.5"],
        help="which quirks of LLaVA's code to repeat (default: none)",
    )
    add(
        "--max-length",
        type=count,
        metavar="N",
        help="maximum tokens per record (default: no limit)",
    )
    add(
        "--length-policy",
        choices=["error", "drop_turns", "skip"],
        help="what to do with longer records (default: error)",
    )


def _add_selection_options(parser: CommandParser) -> None:
    add = parser.add_argument_group("selection").add_argument
    add("--record", metavar="ID", help="only the record with this id")
    help_reason = "only records with this reason, e.g. too_long, empty_answer"
    add("--reason", type=_reason, metavar="CODE", help=help_reason)
    add(
        "--longer-than",
        type=whole_number(0),
        metavar="N",
        help="only records with more tokens, image tokens included, before turns are dropped",
    )
    add(
        "--shorter-than",
        type=whole_number(0),
        metavar="N",
        help="only records with fewer tokens, counted in the same way",
    )
    default = f"{MAX_PRINTED}; with a pager or --json all; with --html {MAX_ON_PAGE}"
    help_limit = f"maximum number of records (default: {default})"
    add("--limit", type=whole_number(1), metavar="N", help=help_limit)


def _add_output_options(parser: CommandParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--html", metavar="FILE", help="write a self-contained HTML page")
    add(
        "--overwrite",
        action="store_true",
        help="replace FILE of --html even if `show` did not write it",
    )
    add(
        "--statistics",
        action="store_true",
        help="print figures about all records instead of records",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object per record; with --statistics a single one",
    )
    add("--no-pager", action="store_true", help="print without a pager")
    add("--no-color", action="store_true", help="print without colors")


def _reason(name: str) -> str:
    """Check that a reason is one that the ledger can contain."""
    if name in CODES:
        return name
    near = difflib.get_close_matches(name, CODES, n=1)
    hint = f"did you mean {near[0]}?" if near else "docs/errors.md lists all reasons"
    raise argparse.ArgumentTypeError(f"no such reason; {hint}")


def _require_fitting(arguments: argparse.Namespace) -> None:
    if arguments.html is not None and arguments.json and not arguments.statistics:
        raise UserError("--json and --html: give one of them, or add --statistics")
    if arguments.html is not None and Path(arguments.html).is_dir():
        raise UserError(f"--html {arguments.html}: this is a folder; give a file name")
    if arguments.config is not None:
        _refuse_together(arguments)
        return
    missing = [f"--{n}" for n in ("records", "tokenizer") if getattr(arguments, n) is None]
    if arguments.eval and not missing:
        raise UserError("--eval: needs CONFIG.yaml; with --records, name the validation file")
    if missing:
        raise UserError(f"give CONFIG.yaml, or --records and --tokenizer (missing: {missing[0]})")


def _require_page(arguments: argparse.Namespace, config: RunConfig | None) -> Path:
    """Check before any record is read that the page can be written to `--html`."""
    if config is not None:
        inputs, images = [Path(arguments.config), *config.input_paths()], config.image_roots()
    else:
        names = (arguments.records, arguments.tokenizer, arguments.template)
        inputs = [Path(name) for name in names if name]
        file = DataFile(path=arguments.records, image_root=arguments.image_root)
        images = [file.images_start_in()]
    return require_output_file(
        arguments.html,
        inputs=inputs,
        image_roots=images,
        command="show",
        overwrite=arguments.overwrite,
    )


def _refuse_together(arguments: argparse.Namespace) -> None:
    """Refuse options for settings that the configuration already has."""
    names = (
        "records",
        "format",
        "columns",
        "image_root",
        "tokenizer",
        "template",
        "system",
        "llava_quirks",
    )
    for name in (*names, "max_length", "length_policy"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option}: give CONFIG.yaml or --records, not both; change a configuration's "
                "settings with key.path=value"
            )


if __name__ == "__main__":
    run_command(main)
