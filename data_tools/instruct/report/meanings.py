"""What reason codes mean, of verification and of cleaning."""

from data_tools.instruct.clean.codes import MEANINGS
from data_tools.instruct.verify import codes


def meanings() -> dict[str, str]:
    """Every code's meaning in a sentence."""
    return {code.name: code.meaning for code in codes.ALL} | MEANINGS
