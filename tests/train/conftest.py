"""Every test begins with no Accelerator made."""

from collections.abc import Iterator

import pytest

from tests.train.tiny import reset_accelerate


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()
