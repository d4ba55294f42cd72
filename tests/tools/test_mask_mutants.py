"""The seeded mask bugs still fit the sources, and the oracle sees them without the proof's help.

`scripts/mutate_masks` tries every mutant on the tests themselves.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.data import mask_oracle
from tests.data.mask_oracle import Pair, check
from tests.tokenizers_for_tests import load
from tests.tools.golden_masks import CASES
from tests.tools.mutate_masks import MUTANTS, NO_PROOF
from tests.tools.mutation import ROOT, Mutant, require_fit

CHEAP = (
    "the stop token is masked",
    "the last token of the header is trained",
    "questions are trained",
    "a turn's flag is ignored",
    "an empty answer is not trained",
)


@pytest.mark.parametrize("mutant", (*MUTANTS, NO_PROOF), ids=lambda mutant: mutant.name)
def test_a_mutant_still_fits_the_sources(mutant: Mutant, tmp_path: Path) -> None:
    require_fit(mutant, tmp_path)


def mutated(monkeypatch: pytest.MonkeyPatch, *mutants: Mutant) -> ModuleType:
    """The module of the masks with these bugs in it; the real module stays as it is."""
    path = ROOT / NO_PROOF.file
    text = path.read_text(encoding="utf-8")
    for mutant in mutants:
        assert mutant.file == NO_PROOF.file
        text = text.replace(mutant.old, mutant.new)
    module = ModuleType("mutated_masking")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def broken_cases(monkeypatch: pytest.MonkeyPatch, *mutants: Mutant) -> list[str]:
    pair = Pair("chatml", "bytes", "chatml")
    by = mutated(monkeypatch, *mutants).ChatTokenizer.from_name(pair.template, load(pair.tokenizer))
    monkeypatch.setattr(mask_oracle, "chat_tokenizer", lambda _: by)
    broken = []
    for name, conversation in CASES.items():
        try:
            check(pair, conversation)
        except Exception:
            broken.append(name)
    return broken


def test_without_a_mutant_nothing_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken_cases(monkeypatch, NO_PROOF) == []


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("proof", ["with the proof", "without the proof"])
def test_the_oracle_sees_a_mutant(name: str, proof: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    both = (mutant,) if proof == "with the proof" else (mutant, NO_PROOF)
    assert broken_cases(monkeypatch, *both)
