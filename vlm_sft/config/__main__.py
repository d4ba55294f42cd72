"""Print configurations and their reference: `vlm-sft config show|reference|schema`."""

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from vlm_sft.commands.parser import CommandParser, config_parser, group_parser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import ConfigError

if TYPE_CHECKING:
    from vlm_sft.config.reference import Schemas

COMMANDS = {
    "show": "print the resolved configuration: the file, overrides and all defaults",
    "reference": "print every setting with its type, default, meaning and resume policy",
    "schema": "print the JSON schema of configuration files, for editors",
}

EXAMPLES = """\
examples:
  vlm-sft config show configs/tiny/stage1.yaml train.max_steps=10
  vlm-sft config reference                         # every setting
  vlm-sft config reference train.packing max_length
  vlm-sft config reference --data teacher          # of the data commands
  vlm-sft config reference --format markdown > docs/configuration.md
  vlm-sft config schema > vlm-sft.schema.json"""


def main(argv: Sequence[str]) -> int:
    """Run the subcommand that `argv` begins with and return the exit code."""
    if argv and argv[0] in COMMANDS:
        arguments = parsers()[argv[0]].read(argv[1:])
        return {"show": _show, "reference": _reference, "schema": _schema}[argv[0]](arguments)
    parser().read(argv[:1])  # handles --help and --version, and refuses everything else
    return 2


def parser() -> CommandParser:
    """Return the command's parser."""
    about = "Print configurations and their reference."
    return group_parser("vlm-sft config", about, COMMANDS, EXAMPLES)


def parsers() -> dict[str, CommandParser]:
    """Return the parsers of the subcommands."""
    about = {name: f"{text[0].upper()}{text[1:]}." for name, text in COMMANDS.items()}
    show = config_parser("vlm-sft config show", about["show"], EXAMPLES)
    reference = CommandParser("vlm-sft config reference", about["reference"], EXAMPLES)
    reference.add_argument(
        "keys",
        metavar="KEY",
        nargs="*",
        help="a setting or a section, e.g. train.packing (default: all settings)",
    )
    reference.add_argument(
        "--data",
        action="store_true",
        help="settings of `vlm-sft data` and data_tools.mix instead of those of training",
    )
    reference.add_argument(
        "--format", choices=["text", "markdown"], default="text", help="default: text"
    )
    schema = CommandParser("vlm-sft config schema", about["schema"], EXAMPLES)
    return {"show": show, "reference": reference, "schema": schema}


def _show(arguments: argparse.Namespace) -> int:
    from vlm_sft.config.finished import resolve
    from vlm_sft.config.schema import dump_config, load_config

    print(dump_config(resolve(load_config(arguments.config, arguments.overrides))), end="")
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    from vlm_sft.config import reference

    schemas = _data_schemas() if arguments.data else reference.TRAINING
    try:
        settings = reference.select_settings(arguments.keys, schemas)
    except ConfigError:
        if not arguments.data:
            _refuse_data_settings(arguments.keys)
        raise
    if arguments.format == "markdown":
        print(reference.as_markdown(settings, schemas))
    else:
        print(reference.as_text(settings))
    return 0


def _refuse_data_settings(keys: Sequence[str]) -> None:
    """Refuse a key that only the data commands have, with the option that shows it."""
    from vlm_sft.config import reference

    for key in keys:
        if not _knows(key, reference.TRAINING) and _knows(key, _data_schemas()):
            raise ConfigError(
                f"{key}: a setting of the data commands; run `vlm-sft config reference --data "
                f"{key}`"
            )


def _knows(key: str, schemas: "Schemas") -> bool:
    from vlm_sft.config import reference

    try:
        return bool(reference.select_settings([key], schemas))
    except ConfigError:
        return False


def _data_schemas() -> "Schemas":
    """Return the schemas of the data commands, which this package otherwise does not know."""
    return {
        "data_tools.instruct": import_module("data_tools.instruct.config").InstructConfig,
        "data_tools.mix": import_module("data_tools.mix.config").MixConfig,
        "data_tools.select": import_module("data_tools.select.config").SelectConfig,
    }


def _schema(_arguments: argparse.Namespace) -> int:
    from vlm_sft.config.schema import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    run_command(main)
