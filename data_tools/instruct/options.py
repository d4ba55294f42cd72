"""Options of the stages."""

from vlm_sft.commands.parser import CommandParser


def stage_parser(stage: str, about: str | None) -> CommandParser:
    """Return the parser of a stage's own options, which follow `STAGE CONFIG`."""
    example = f"example:\n  python -m data_tools.instruct {stage} configs/instruct/rules.yaml"
    program = f"python -m data_tools.instruct {stage} CONFIG"
    return CommandParser(program, about, example, takes_settings=True)
