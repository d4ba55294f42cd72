"""Limits of the settings of generation."""

from typing import Final

TEMPERATURES: Final = "0, or 0.01 to 100"
"""The temperatures that logits of every dtype can be divided by; 0 means greedy decoding."""


def is_temperature(value: float) -> bool:
    """Return whether a value is one of `TEMPERATURES`."""
    return value == 0 or 0.01 <= value <= 100
