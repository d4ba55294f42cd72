"""SECURITY.md promises nothing that no test holds."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def promises() -> list[str]:
    """Every item and paragraph between the two headings."""
    text = PAGE.partition("## What the toolkit promises")[2].partition("## What it does not")[0]
    return [item for item in re.split(r"\n(?=- )|\n\n", text) if item.strip().startswith("- ")]


def test_every_promise_names_a_test() -> None:
    assert len(promises()) >= 20
    for promise in promises():
        assert NAME.search(promise), f"no test is named for: {promise}"


def test_every_test_that_the_page_names_exists() -> None:
    named = NAME.findall(PAGE)
    assert len(named) >= 25
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in tests, f"{file} has no {test}"
