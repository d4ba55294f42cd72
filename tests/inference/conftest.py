"""The tiny model of the evaluation's tests."""

from tests.evaluation.conftest import run

__all__ = ["run"]
