import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def collect_fake_tensors() -> Iterator[None]:
    """Collect garbage after each test: fake tensors are in reference cycles, and count as live."""
    yield
    gc.collect()
