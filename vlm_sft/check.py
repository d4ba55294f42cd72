"""Check in advance what can fail in a run: records, images, masks, model, saving, resuming."""

import argparse
from collections.abc import Sequence

from vlm_sft.commands.parser import RUN_SETTINGS, CommandParser, add_overrides, heavy_imports
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.output_files import require_output_file

ABOUT = """\
Read and tokenize every record, decode every image, build the model, train on the longest batch,
save a checkpoint, and test the tokenizer with the chat template. With --tokenizer instead of
CONFIG.yaml: test only a tokenizer with a template.

All records that cannot be used are listed, not only the first. Exit code 0: the run can start; 2:
it cannot, or it would skip records, or a finding is BAD."""

EXAMPLES = """\
examples:
  vlm-sft check configs/tiny/stage1.yaml
  vlm-sft check my.yaml data.max_length=1024
  vlm-sft check my.yaml --no-model      (only the data; needs no weights)
  vlm-sft check my.yaml --bad bad.jsonl (writes all bad records to a file)

  # do a tokenizer and a chat template fit together? (exit code 0: yes, 2: a finding is BAD)
  vlm-sft check --tokenizer models/qwen --template chatml
  vlm-sft check --tokenizer models/vicuna --template vicuna_v1 --strict --json"""


def main(argv: Sequence[str]) -> int:
    """Check a configuration, or only a tokenizer with a template; return 0 or 2."""
    arguments = parser().read(argv)
    _require_one_source(arguments)
    from vlm_sft.commands import inputs

    if arguments.tokenizer is not None:
        inputs.require_model_name("--tokenizer", arguments.tokenizer)
        inputs.require_template("--template", arguments.template or "auto")
        with heavy_imports():
            from vlm_sft.commands.check import check_tokenizer_alone
        return check_tokenizer_alone(arguments)
    no_model = {"model", "projector"} if arguments.no_model else set()
    parts = inputs.ALL_PARTS - no_model
    config = inputs.read_config(arguments.config, arguments.overrides, parts)
    if arguments.bad is not None:
        arguments.bad = require_output_file(
            arguments.bad,
            inputs=[arguments.config, *config.input_paths()],
            image_roots=config.image_roots(),
            command="check",
            overwrite=arguments.overwrite,
        )
    with heavy_imports():
        from vlm_sft.commands.check import check_run
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return check_run(config, arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft check", ABOUT, EXAMPLES, settings=RUN_SETTINGS)
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", nargs="?", help="configuration of a run")
    add_overrides(parser)
    add("--all", action="store_true", help="print the notes about other programs, too")
    add("--no-model", action="store_true", help="check only data and images, without the model")
    add(
        "--bad",
        metavar="FILE.jsonl",
        help="write position, id, reason and message of every bad record to this file",
    )
    add("--overwrite", action="store_true", help="replace the file of --bad if it exists")
    add(
        "--strict",
        action="store_true",
        help="let warnings (about the template, repeated records) fail the check",
    )
    alone = parser.add_argument_group("only a tokenizer with a template, without CONFIG.yaml")
    alone.add_argument("--tokenizer", metavar="DIR", help="folder, hub name, or 'bytes'")
    alone.add_argument("--template", metavar="NAME", help="name, template file, or auto (default)")
    alone.add_argument("--system", metavar="TEXT", help="system text for records that have none")
    alone.add_argument(
        "--generation-config",
        metavar="DIR",
        help="folder of generation_config.json (default: the tokenizer's)",
    )
    alone.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _require_one_source(arguments: argparse.Namespace) -> None:
    if arguments.config is None and arguments.tokenizer is None:
        raise UserError("give CONFIG.yaml, or --tokenizer DIR and --template NAME")
    if arguments.config is None:
        given = {"--no-model": arguments.no_model, "--bad": arguments.bad, "--all": arguments.all}
        for option in filter(given.get, given):
            raise UserError(f"{option}: needs CONFIG.yaml; --tokenizer reads no data")
        return
    for name in ("tokenizer", "template", "system", "generation_config", "json"):
        if getattr(arguments, name):
            raise UserError(
                f"--{name.replace('_', '-')}: give CONFIG.yaml or --tokenizer, not both; change a "
                "configuration's settings with key.path=value"
            )


if __name__ == "__main__":
    run_command(main)
