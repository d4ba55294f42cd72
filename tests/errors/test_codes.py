"""One vocabulary of faults: what is raised is registered, what is registered is raised and told."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm_sft import errors
from vlm_sft.errors import UserError
from vlm_sft.errors.codes import ALL, CODE_OF_FINGERPRINT, CODES, FAMILIES

ROOT = Path(__file__).parents[2]

NAME_AT = {
    "RecordError": 0,
    "ImageError": 0,
    "StrictJsonError": 0,
    "self.error": 0,
    "raw.error": 0,
    "self._error": 1,
}
"""Which argument of a call is a fault's name."""

REASON_AT = {"_entry": 2, "LedgerEntry": 3}
"""Which argument of a call of the trainer is a ledger's reason; the data tools have none."""

RELAYS = ("CODE_OF_FINGERPRINT.get(name)", "code_of(error).name", "error.reason", "reason", "code")
"""Names that come from elsewhere: an error or a table that was checked where it was made."""

ERRORS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")
}


def sources() -> list[Path]:
    """Every module that may raise, the registry itself left out."""
    files = [*ROOT.glob("vlm_sft/**/*.py"), *ROOT.glob("data_tools/**/*.py")]
    return sorted(file for file in files if file.name != "error_codes.py")


def choices(node: ast.expr) -> list[ast.expr]:
    """The values that an expression can have, as far as it says them."""
    return [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]


def names_in_call(call: ast.Call, *, of_data_tools: bool) -> Iterator[ast.expr]:
    """What a call gives as a fault's name."""
    called = ast.unparse(call.func)
    if called in ERRORS:
        yield from (k.value for k in call.keywords if k.arg == "code")
    at = ({} if of_data_tools else REASON_AT).get(called, NAME_AT.get(called))
    if at is not None and len(call.args) > at:
        yield call.args[at]


def names_at_raise_sites(file: Path) -> Iterator[tuple[str, str]]:
    """Every fault's name in a module with its place: of raise sites, and classes' own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: list[ast.expr] = []
    ours = file.relative_to(ROOT).parts[0] == "data_tools"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [
                choice
                for name in names_in_call(node, of_data_tools=ours)
                for choice in choices(name)
            ]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "default_code" for t in targets):
                found.append(node.value)
    for expression in found:
        where = f"{file.relative_to(ROOT)}:{expression.lineno}"
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            yield expression.value, where
        elif ast.unparse(expression) != "None":  # which leaves the class its own
            assert ast.unparse(expression) in RELAYS, f"{where}: no name can be read here"


def all_names() -> list[tuple[str, str]]:
    found = [pair for file in sources() for pair in names_at_raise_sites(file)]
    found += [(name, "CODE_OF_FINGERPRINT") for name in CODE_OF_FINGERPRINT.values()]
    found += [(name, "errno") for name in errors._OF_ERRNO.values()]
    return [*found, (errors.code_of(OSError("no number")).name, "errno")]


def test_every_name_at_a_raise_site_is_registered() -> None:
    named = all_names()
    assert len(named) > 100
    assert [(name, where) for name, where in named if name not in CODES] == []


def test_every_registered_code_is_raised_somewhere() -> None:
    assert set(CODES) - {name for name, _ in all_names()} == set()


def test_an_error_of_an_unregistered_name_cannot_be_made() -> None:
    with pytest.raises(KeyError):
        UserError("what; what to do", code="no_such_fault")


def test_codes_are_unique_in_order_and_in_a_family() -> None:
    numbers = [code.number for code in ALL]
    assert numbers == sorted(set(numbers)) and len(CODES) == len(ALL)
    assert {number // 100 for number in numbers} == set(FAMILIES)
    for code in ALL:
        assert code.name.isidentifier() and code.name == code.name.lower(), code.name
        for sentence in (code.meaning, code.remedy):
            assert sentence[0].isupper() or sentence[0] == "`", sentence
            assert sentence.endswith(".") and "\n" not in sentence and "|" not in sentence, sentence


def test_every_entry_of_the_fingerprint_has_a_code() -> None:
    """The entries of the fingerprint that `make_store` gives to the checkpoint store."""
    tree = ast.parse((ROOT / "vlm_sft" / "train" / "setup.py").read_text(encoding="utf-8"))
    (facts,) = (
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "fingerprint"
    )
    assert isinstance(facts, ast.Dict)
    assert {key.value for key in facts.keys if isinstance(key, ast.Constant)} == set(
        CODE_OF_FINGERPRINT
    )


def test_the_page_is_what_the_module_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sft.errors"], capture_output=True, cwd=ROOT, check=True
    )
    page = (ROOT / "docs" / "errors.md").read_bytes()
    assert done.stdout == page, "run: python -m vlm_sft.errors > docs/errors.md"
    assert done.stderr == b""
