"""The argument parser that all commands share, and the block of their heavy imports."""

import argparse
import atexit
import difflib
import gc
import logging
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import vlm_sft
from vlm_sft.commands.registry import exit_at_once
from vlm_sft.errors import UserError
from vlm_sft.utils.image_paths import looked_for

_NUMBER = re.compile(r"-\d*\.?\d+([eE][-+]?\d+)?")


RUN_SETTINGS: Final = "vlm_sft.config.schema:RunConfig"
"""The settings of a run."""

_EXPECTED = {int: "expected a whole number", float: "expected a number"}
"""Messages that replace argparse's `invalid int value`."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, raised as `UserError`.

    Options cannot be abbreviated: an abbreviation could change its meaning when an option is added.

    Args:
        prog: The command as the user types it, e.g. `vlm-sft stage1`.
        about: What the command does.
        examples: Text below the options.
        settings: The section of the settings that the command accepts as `key.path=value`, as
            `module:class`; empty if it accepts none.
        usage: Replaces the generated usage line.
    """

    def __init__(
        self,
        prog: str,
        about: str | None = None,
        examples: str | None = None,
        *,
        settings: str = "",
        usage: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.settings = settings
        self.add_argument(
            "--version",
            action="version",
            version=f"vlm_sft {vlm_sft.__version__}",
            help="print the version and exit",
        )

    @property
    def option_strings(self) -> frozenset[str]:
        """All options, e.g. `--help` and `-h`."""
        return frozenset(self._option_string_actions)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; options may come between positional arguments.

        Raises:
            UserError: Unknown option, missing argument or wrong value.
        """
        self._refuse_unknown_options(argv)
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as a `UserError`."""
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing is not None:
            message = f"missing: {missing[1]}; `{self.prog} --help` shows examples"
        raise UserError(message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            shown = arg_string if len(arg_string) <= 60 else f"{arg_string[:57]}..."
            raise argparse.ArgumentError(
                None, f"{_name_of(action)} {shown}: {error.message}"
            ) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise argparse.ArgumentError(None, f"{_name_of(action)} {value}: {hint}")

    def _refuse_unknown_options(self, argv: Sequence[str]) -> None:
        for position, word in enumerate(argv):
            if word == "--":
                return
            name, equals, value = word.partition("=")
            looks_like_option = name.startswith("-") and name != "-" and " " not in word
            if not looks_like_option or _NUMBER.fullmatch(word):
                continue
            if name in self._option_string_actions:
                continue
            following = argv[position + 1] if position + 1 < len(argv) else "VALUE"
            raise UserError(self._unknown_option(name, value if equals else following))

    def _unknown_option(self, name: str, value: str) -> str:
        key = name.lstrip("-")
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        if self.settings and (not near or "." in key):
            meant = self._nearest_setting(key)
            hint = f"; did you mean {meant}={value}?" if meant else ""
            return (
                f"{name}: unknown option; settings of the configuration are given as "
                f"key.path=value{hint}"
            )
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists all options"
        return f"{name}: unknown option; {hint}"

    def _nearest_setting(self, key: str) -> str | None:
        from vlm_sft.config.validation_errors import nearest_setting  # imports pydantic

        module, _, name = self.settings.partition(":")
        return nearest_setting(getattr(import_module(module), name), key)


def _name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def config_parser(prog: str, about: str, examples: str) -> CommandParser:
    """Return a parser for `CONFIG.yaml [key.path=value ...]`."""
    parser = CommandParser(prog, about, examples, settings=RUN_SETTINGS)
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="configuration of a run, see configs/"
    )
    add_overrides(parser)
    return parser


def group_parser(
    prog: str, about: str, commands: Mapping[str, str], examples: str
) -> CommandParser:
    """Return the parser of a command whose first argument names one of several commands.

    Args:
        prog: As the user types it, e.g. `vlm-sft config`.
        about: What the group of commands is for.
        commands: What each command does, by name; the help text lists them in this order.
        examples: Examples, printed at the end of the help text.
    """
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    parser = CommandParser(
        prog, f"{about}\n\ncommands:\n{lines}", examples, usage="%(prog)s COMMAND ..."
    )
    parser.add_argument(
        "command", choices=list(commands), metavar="COMMAND", help=argparse.SUPPRESS
    )
    return parser


def training_parser(prog: str, about: str, examples: str) -> CommandParser:
    """Return the parser of a training stage."""
    parser = config_parser(prog, about, examples)
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this setting (or any setting that begins with it) differs from the "
        "value that the run was started with; may be repeated",
    )
    return parser


def add_overrides(parser: argparse.ArgumentParser, example: str = "train.max_steps=10") -> None:
    """Add the optional `key.path=value` arguments."""
    parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help=f"settings that replace those of the file, e.g. {example}",
    )


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type for whole numbers from `least` to `most`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError("expected a whole number") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected {_range(least, most)}")
        return value

    return convert


def number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """Return an argument type for numbers from `least` (exclusive if `above`) to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError("expected a number") from None
        too_small = value <= least if above else value < least
        if too_small or value > most or not math.isfinite(value):
            upper = f" and at most {most:g}" if math.isfinite(most) else ""
            lower = f"more than {least:g}" if above else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"expected {lower}{upper}")
        return value

    return convert


def _range(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else f"{least} to {most}"


def require_file(option: str, path: Path) -> None:
    """Refuse an input file that does not exist.

    Raises:
        UserError: Names the option and the absolute path.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; give a file")
    if not path.exists():
        raise UserError(
            f"{option} {path}: no such file{looked_for(path)}", code="data_file_missing"
        )


def require_folder(option: str, path: Path) -> None:
    """Refuse an input folder that does not exist.

    Raises:
        UserError: Names the option and the absolute path.
    """
    if not path.is_dir():
        found = (
            "this is a file; give a folder"
            if path.exists()
            else f"no such folder{looked_for(path)}"
        )
        raise UserError(f"{option} {path}: {found}", code="data_file_missing")


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and other slow libraries in this block, after arguments and files are checked.

    Where that takes long, a line says so.

    The garbage collector rests meanwhile, and ignores afterwards what was imported: it would go
    through a million live objects again and again, a fifth of the whole time.

    Ctrl-C ends the process at once. Nothing has started yet, and libraries turn a KeyboardInterrupt
    during their import into other exceptions, or ignore it.
    """
    silence_known_noise()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, exit_at_once)
    first = gc.isenabled() and "torch" not in sys.modules
    shown: AbstractContextManager[None] = nullcontext()
    if first:
        gc.disable()
        from vlm_sft.utils.progress import waiting

        shown = waiting("importing torch and transformers")
    try:
        with shown:
            yield
    finally:
        if first:
            gc.freeze()
            atexit.register(gc.unfreeze)  # what stays alive at the end, nanobind reports as leaked
            gc.enable()
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _keep_bars_out_of_files()


def _keep_bars_out_of_files() -> None:
    """Disable the progress bars of transformers unless stderr is a terminal."""
    library = sys.modules.get("transformers.utils.logging")
    if library is not None and not sys.stderr.isatty():
        library.disable_progress_bar()


NOISE: Final = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
"""Beginnings of log messages that are irrelevant to the user, by the name of their logger.

bitsandbytes logs this on import, whether or not anything is quantized; without that kernel it
computes the same on a CPU in another way.
"""


def silence_known_noise() -> None:
    """Drop the messages of `NOISE`, and no other messages of those loggers."""
    for name, beginning in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _DropMessages) for known in logger.filters):
            logger.addFilter(_DropMessages(beginning))


class _DropMessages(logging.Filter):
    """A logging filter that drops messages with a known beginning."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


CHECKPOINT_HELP: Final = (
    "RUN/final or RUN/checkpoints/step-N; or the folder or hub name of a finished LLaVA model"
)


def add_columns_option(add: Callable[..., Any], of: str) -> None:
    """Add --columns, which `ColumnNames.of_option` checks.

    Args:
        add: `add_argument` of a parser or of a group.
        of: The options whose tables it describes.
    """
    add(
        "--columns",
        type=_table_columns,
        metavar="PART=COLUMN,...",
        help=f"columns of a table ({of}) whose names are not recognized: "
        "image=file,question=q,answer=a",
    )


def _table_columns(text: str) -> dict[str, str]:
    """Return columns by part; `caption`, as tables often name it, is the part `text`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(part.strip() and column.strip() for part, _, column in pairs):
        raise argparse.ArgumentTypeError("expected PART=COLUMN,..., e.g. image=file,text=caption")
    columns = {part.strip(): column.strip() for part, _, column in pairs}
    return {"text" if part == "caption" else part: name for part, name in columns.items()}


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """Add `--template`, for commands that load finished models; see `load_checkpoint`."""
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chat template of a finished model whose folder has none: a built-in name or a YAML "
        "file",
    )


def add_base_option(parser: argparse.ArgumentParser) -> None:
    """Add `--base`, for commands that load a checkpoint; see `checkpoint.base_models`."""
    parser.add_argument(
        "--base",
        metavar="KEY=PATH",
        action="append",
        default=[],
        help="new location of a base model of the checkpoint that was moved, e.g. "
        "model.language_model.name=models/vicuna; may be repeated",
    )
