"""Masks that a person has read stay as they were read."""

import pytest

from tests.data.mask_oracle import Pair
from tests.tokenizers_for_tests import missing
from tests.tools.golden_masks import FOLDER, PAIRS, difference, file_of


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_masks_are_those_that_were_read(pair: Pair) -> None:
    if missing(pair.tokenizer) is not None:
        pytest.skip(str(missing(pair.tokenizer)))
    text = difference(pair)
    if text:
        pytest.fail(f"{text}\n\nread it, then run scripts/golden_masks --write", pytrace=False)


def test_no_page_is_left_over() -> None:
    assert sorted(FOLDER.iterdir()) == sorted(file_of(pair) for pair in PAIRS)
