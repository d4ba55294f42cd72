"""The seeded bugs of resuming and packing still fit the sources; the tests named are there.

`scripts/mutate_resume` and `scripts/mutate_packing` try every mutant on those tests.
"""

from pathlib import Path

import pytest

from tests.tools import mutate_packing, mutate_resume
from tests.tools.mutation import ROOT, Mutant, require_fit

MUTANTS = (*mutate_resume.MUTANTS, *mutate_packing.MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_still_fits_the_sources(mutant: Mutant, tmp_path: Path) -> None:
    require_fit(mutant, tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_must_see_a_mutant_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") or not name
