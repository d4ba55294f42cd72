"""Build instruction data: `python -m data_tools.instruct COMMAND CONFIG.yaml [KEY=VALUE ...]`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from data_tools.instruct.stages import COMMANDS, PROG, STAGES, parser, parsers
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError


def main(argv: Sequence[str], prog: str = PROG) -> int:
    """Run the command that `argv` begins with and return the exit code.

    Args:
        argv: Name, configuration file, overrides and options.
        prog: The words before the name, as the user typed them.
    """
    if not argv or argv[0] not in COMMANDS:
        parser(prog).read(argv[:1])  # handles --help and --version, and refuses everything else
        return 2
    name, *words = argv
    if name == "run":
        _refuse_options_of_stages(words, prog)
    options = vars(parsers(prog)[name].read(words))
    given, overrides, overwrite = (options.pop(key) for key in ("config", "overrides", "overwrite"))

    from data_tools.instruct.config import InstructConfig
    from data_tools.instruct.run_folder import own_for, refuse_older
    from vlm_sft.config import loading as settings
    from vlm_sft.utils.console import echo

    config = settings.load(InstructConfig, given, overrides)
    refuse_older(Path(config.output_dir))
    if name == "explain":
        from data_tools.instruct import explain

        explain.command(config, overwrite=overwrite, **options)
        return 0
    # `plan` indexes by itself; with `index` before it, all would be read and reported twice.
    names = list(STAGES)[1:] if name == "run" else [name]
    own_for(config, Path(given), names, overwrite=overwrite)
    for stage in names:
        try:
            import_module(f"data_tools.instruct.{STAGES[stage].module}").command(config, **options)
        except KeyboardInterrupt:
            echo(f"stopped in `{stage}`; repeat the command to continue")
            raise
    if name == "run":
        _print_outcomes(Path(config.output_dir))
    return 0


def _refuse_options_of_stages(words: Sequence[str], prog: str) -> None:
    """Refuse options of single stages, which `run` does not have.

    Raises:
        UserError: The message names the option and the stage.
    """
    known = parsers(prog)
    for word in words:
        option = word.partition("=")[0]
        for stage in STAGES:
            if option in known[stage].option_strings - known["run"].option_strings:
                raise UserError(
                    f"{option}: an option of `{stage}`, not of `run`; run the stages one by one to "
                    "use it"
                )


def _print_outcomes(output_dir: Path) -> None:
    """Print the outcomes of all images and requests."""
    from data_tools.instruct.outcomes import outcomes
    from data_tools.instruct.run_folder import RunFolder
    from vlm_sft.utils.console import echo

    found = outcomes(RunFolder(output_dir))
    echo("", file=sys.stdout)
    for line in found.lines():
        echo(line, file=sys.stdout)


if __name__ == "__main__":
    run_command(main)
