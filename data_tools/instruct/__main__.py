"""Build instruction data: `vlm-sft data COMMAND CONFIG.yaml [KEY=VALUE ...]`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from data_tools.instruct.stages import COMMANDS, STAGES, parser, parsers
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with and return the exit code."""
    if not argv or argv[0] not in COMMANDS:
        parser().read(argv[:1])  # handles --help and --version, and refuses everything else
        return 2
    name, *words = argv
    if name == "run":
        _refuse_options_of_stages(words)
    options = vars(parsers()[name].read(words))
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
    if name == "grow":
        from data_tools.instruct.grow import command as grow

        grow.command(config, Path(given), overwrite=overwrite, **options)
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
    return 0


def _refuse_options_of_stages(words: Sequence[str]) -> None:
    """Refuse options of single stages, which `run` does not have.

    Raises:
        UserError: The message names the option and the stage.
    """
    known = parsers()
    for word in words:
        option = word.partition("=")[0]
        for stage in STAGES:
            if option in known[stage].option_strings - known["run"].option_strings:
                raise UserError(
                    f"{option}: an option of `{stage}`, not of `run`; run the stages one by one to "
                    "use it"
                )


if __name__ == "__main__":
    run_command(main)
