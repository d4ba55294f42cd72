import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.json_lists import Element, read_lists
from vlm_sft.errors import UserError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    lists=st.dictionaries(st.sampled_from("abc"), st.lists(values, max_size=5), min_size=1),
    others=st.dictionaries(st.sampled_from("xyz"), values),
    indent=st.sampled_from([None, 1]),
)
def test_elements_are_those_of_the_whole_document(
    tmp_path_factory: pytest.TempPathFactory,
    lists: dict[str, list[Any]],
    others: dict[str, Any],
    indent: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "lists.json"
    text = json.dumps({**others, **lists}, indent=indent)
    path.write_text(text, encoding="utf-8")
    found = list(read_lists(path, dict.fromkeys(lists, Any)))
    assert found == [
        Element(key, position, value)
        for key, values in lists.items()
        for position, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an object with a list 'a'"),
        ("[1]", "an object with a list 'a'"),
        ("{}", "an object with a list 'a', and found none"),
        ('{"a": 3}', "an object with a list 'a', and found none"),
        ('{"a": [1', "is not valid JSON"),
        ('{"a": [1,]}', "is not valid JSON"),
        ('{"a": [1] "b": 2}', "expected , or } in line 1, column 11"),
        ('{"a": [1, nope, 2]}', "Expecting value in line 1, column 11"),
        ('{"a": [], "a": []}', "the key 'a' appears twice"),
        ('{"a": []} {}', "expected nothing after the object in line 1, column 10"),
        ('{"x": ' + "[" * 100_000, "too deeply"),
        ("{1: []}", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_lists(path, {"a": Any}))


def test_bytes_that_are_no_text_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b'{"a": ["\xff"]}')
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_lists(path, {"a": Any}))
    with pytest.raises(UserError, match="no such file"):
        list(read_lists(tmp_path / "none.json", {"a": Any}))


def test_a_value_that_never_ends_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"a": ["' + "x" * 100_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="truncated"):
        list(read_lists(path, {"a": Any}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
