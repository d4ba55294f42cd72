import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_fakes_left() -> Iterator[None]:
    """Fake tensors lie in cycles; what they stand for is counted until they are gone."""
    yield
    gc.collect()
