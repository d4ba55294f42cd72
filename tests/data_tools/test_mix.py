"""Sources are mixed in the wanted shares, under unique ids, and what is left out is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.mix import __main__ as mix
from data_tools.mix.config import CANNOT_TELL, MixConfig
from data_tools.mix.quotas import RecordCounts, quotas
from data_tools.mix.read import content_digest
from tests.data_tools.instruct_samples import draw
from vlm_sft.config.loading import parse
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError


def record(number: int, *, name: str = "", answer: str = "", image: bool = True) -> dict[str, Any]:
    question = f"What is {name}{number}?"
    turns = [
        {"from": "human", "value": ("<image>\n" if image else "") + question},
        {"from": "gpt", "value": answer or f"Thing {number}."},
    ]
    image = {"image": "train2017/000000000001.png"} if image else {}
    return {"id": number, **image, "conversations": turns}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "train2017").mkdir()
    draw(tmp_path / "train2017" / "000000000001.png", 1)
    return tmp_path


def source(root: Path, name: str, records: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    path = root / f"{name}.json"
    path.write_text(json.dumps(records))
    return {"name": name, "path": str(path), **more}


def mixed(root: Path, sources: list[dict[str, Any]], **more: Any) -> list[Conversation]:
    config = {"output_dir": str(root / "mix"), "sources": sources, **more}
    (root / "mix.yaml").write_text(yaml.safe_dump(config))
    assert mix.main([str(root / "mix.yaml")]) == 0
    found = list(
        read_records(DataFile(path=str(root / "mix" / "train.jsonl"), image_root=str(root)))
    )
    assert all(isinstance(one, Conversation) for one in found), found
    return [one for one in found if isinstance(one, Conversation)]


def card(root: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((root / "mix" / "card.json").read_text())
    return told


def test_all_of_all_sources_comes_with_the_sources_name_before_every_id(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = source(root, "a", [record(1), record(1, name="x"), record(2)], license="CC BY 4.0")
    found = mixed(root, [first, source(root, "b", [record(1, name="b")])])
    assert [one.id for one in found] == ["a/1", "a/1#2", "a/2", "b/1"]
    told = card(root)
    assert [s["taken"] for s in told["sources"]] == [3, 1]
    assert told["sources"][0]["license"] == "CC BY 4.0"
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[0] == ["source", "records", "available", "taken", "repeated", "wanted", "reached"]
    assert out[1] == ["a", "3", "3", "3", "0", "75.0%", "75.0%"]
    assert (
        "| a | 3 | 3 | 3 | 0 | 75.0% | 75.0% | CC BY 4.0 | none named |"
        in (root / "mix" / "card.md").read_text()
    )


def test_every_form_is_read_and_written_as_the_same_conversation(root: Path) -> None:
    from pyarrow import Table, parquet

    image = (root / "train2017" / "000000000001.png").read_bytes()
    turns = [{"from": "human", "value": "Look <image> here"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"id": "p", "image": {"bytes": image, "path": None}, "conversations": turns}]
    parquet.write_table(Table.from_pylist(rows), root / "p.parquet")
    messages = {
        "id": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": "A word.", "loss": False},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Another."},
        ],
    }
    (root / "m.jsonl").write_text(json.dumps(messages) + "\n")
    alpaca = {"instruction": "Say hello", "input": "in French", "output": "Bonjour"}
    (root / "a.jsonl").write_text(json.dumps(alpaca) + "\n")
    image = {"type": "image", "image": "train2017/000000000001.png"}
    content = [image, {"type": "text", "text": "What?"}]
    parts = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    (root / "c.jsonl").write_text(json.dumps({"id": "c", "messages": parts}) + "\n")
    names = {"p": "p.parquet", "m": "m.jsonl", "a": "a.jsonl", "c": "c.jsonl"}
    sources = [{"name": name, "path": str(root / file)} for name, file in names.items()]
    found = mixed(root, sources)
    assert [one.id for one in found] == ["p/p", "m/m", "a/line-1", "c/c"]
    for one, (name, file) in zip(found, names.items(), strict=True):
        (before,) = read_records(DataFile(path=str(root / file), image_root=str(root)))
        assert isinstance(before, Conversation), name
        assert (one.turns, one.images) == (before.turns, before.images)


def test_weights_and_a_total_set_the_shares_and_again_gives_the_same_bytes(root: Path) -> None:
    sources = [
        source(root, "a", [record(n, name="a") for n in range(50)], weight=3),
        source(root, "b", [record(n, name="b") for n in range(50)], weight=1),
    ]
    first = mixed(root, sources, total=40)
    files = {path.name: path.read_bytes() for path in (root / "mix").iterdir()}
    assert [sum(one.id.startswith(name) for one in first) for name in "ab"] == [30, 10]
    assert mixed(root, sources, total=40) == first
    assert files == {path.name: path.read_bytes() for path in (root / "mix").iterdir()}
    other = mixed(root, sources, total=40, seed=1)
    assert [one.id for one in other] != [one.id for one in first]
    # without a total, as many as no source runs short of
    assert len(mixed(root, sources)) == 66


def test_what_is_chosen_does_not_depend_on_the_order_of_a_file(root: Path) -> None:
    records = [record(n) for n in range(30)]
    first = mixed(root, [source(root, "a", records)], total=10)
    second = mixed(root, [source(root, "a", records[::-1])], total=10)
    assert {one.id for one in first} == {one.id for one in second}


def test_text_replay_has_the_share_that_is_wanted(root: Path) -> None:
    sources = [
        source(root, "images", [record(n) for n in range(47)]),
        source(root, "text", [record(n, image=False) for n in range(20)], replay=True),
    ]
    found = mixed(root, sources, replay_share=0.06)
    assert sum(not one.images for one in found) == 3 and len(found) == 50
    assert card(root)["shares"]["replay"] == {"wanted": 0.06, "reached": 0.06}
    with pytest.raises(UserError, match="source text is for replay, which is text alone"):
        mixed(root, [source(root, "text", [record(1)], replay=True)], replay_share=0.5)


def test_answers_that_cannot_tell_have_the_share_that_is_wanted(root: Path) -> None:
    unsure = [record(n, answer="That cannot be told from the picture.") for n in range(40)]
    sources = [source(root, "a", [*unsure, *[record(n) for n in range(100, 190)]])]
    found = mixed(root, sources, cannot_tell_share=0.1)
    assert len(found) == 100
    assert sum("cannot" in one.turns[1].text for one in found) == 10
    assert card(root)["shares"]["cannot_tell"] == {"wanted": 0.1, "reached": 0.1}
    with pytest.raises(UserError, match="80 answers of a of kind `cannot_tell`, which has 40"):
        mixed(root, sources, total=100, cannot_tell_share=0.8)
    again = mixed(root, sources, total=100, cannot_tell_share=0.8, when_short="upsample")
    assert len({one.id for one in again}) == 100
    assert card(root)["sources"][0]["repeated"] == 40


@pytest.mark.parametrize("is_repeated", [False, True])
def test_receipts_say_who_wrote_a_record_and_what_cannot_tell(
    root: Path, is_repeated: bool
) -> None:
    receipts = [
        {"id": "0", "model": "big-one", "kinds": ["object", "cannot_tell"]},
        {"id": "1", "model": "big-one", "kinds": ["object"]},
        *({"id": f"not mixed {n}", "model": "small-one", "kinds": []} for n in range(5)),
    ]
    lines = "".join(json.dumps(receipt) + "\n" for receipt in receipts)
    (root / "who.jsonl").write_text(lines)
    records = [record(n, answer="I cannot see that." * (n == 1)) for n in range(3)]
    records += [record(0, name="x")] * is_repeated  # two records of one id
    sources = [source(root, "a", records, receipts=str(root / "who.jsonl"))]
    mixed(root, sources)
    assert card(root)["teacher_models"] == {"": 1, "big-one": 2 + is_repeated}
    reached = (1 + is_repeated) / (3 + is_repeated)
    assert card(root)["shares"]["cannot_tell"]["reached"] == pytest.approx(reached, abs=1e-6)
    assert f"- big-one: {2 + is_repeated} records" in (root / "mix" / "card.md").read_text()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("That cannot be determined from the picture.", True),
        ("The picture does not show what is behind the door.", True),
        ("I'm sorry, I can't help with that.", True),
        ("It isn't possible to tell.", False),
        ("You can tell by the shadows that it is evening.", False),
        ("No, there is no dog.", False),
    ],
)
def test_the_pattern_of_answers_that_cannot_tell(answer: str, expected: bool) -> None:
    import re

    assert (re.search(CANNOT_TELL, answer, re.IGNORECASE) is not None) == expected


def test_more_than_there_is_is_an_error_or_is_repeated_and_told(root: Path) -> None:
    sources = [source(root, "a", [record(n) for n in range(4)], count=10)]
    with pytest.raises(UserError, match="10 of a, which has 4; lower the total"):
        mixed(root, sources)
    found = mixed(root, sources, when_short="upsample")
    assert len(found) == 10 == len({one.id for one in found})
    assert [one.id for one in found][:2] == ["a/0", "a/0+2"]
    assert {len([one for one in found if one.images and f"a/{n}" in one.id]) for n in range(4)} == {
        2,
        3,
    }
    assert card(root)["sources"][0]["repeated"] == 6
    capped = [source(root, "a", [record(n) for n in range(4)], cap=3)]
    assert len(mixed(root, capped)) == 3


def test_values_beyond_what_can_be_counted_are_refused_in_one_sentence(root: Path) -> None:
    first = source(root, "a", [record(1), record(2)])
    second = source(root, "b", [record(3)])
    replay = source(root, "c", [record(4, image=False)]) | {"replay": True}
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([first, second], {"cannot_tell_pattern": "(" * 5000 + ")" * 5000}, "nested too deeply"),
        ([first], {"cannot_tell_pattern": "a{99999999999999999999}"}, "not a regular expression"),
        ([first], {"cannot_tell_pattern": "a" * 20_000}, "cannot_tell_pattern"),
        ([first | {"weight": 1e308}, second | {"weight": 1e308}], {}, r"sources.0.weight"),
        ([first | {"count": 10**30}], {}, r"sources.0.count"),
        ([first | {"cap": 10**30}], {}, r"sources.0.cap"),
        ([first], {"total": 10**30}, "total"),
        ([first, replay], {"replay_share": 1 - 1e-15}, "expected 4,294,967,295 at most"),
    ]
    for sources, values, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            mixed(root, sources, when_short="upsample", **values)
        assert len(str(raised.value)) < 1000


def test_equal_records_of_two_sources_come_once(root: Path) -> None:
    sources = [source(root, "a", [record(1), record(1)]), source(root, "b", [record(1)])]
    with pytest.raises(UserError, match="b"):
        mixed(root, [sources[0], {**sources[1], "count": 1}])
    assert [one.id for one in mixed(root, sources)] == ["a/1"]
    left_out = [s["left_out"] for s in card(root)["sources"]]
    assert left_out == [{"repeats an earlier one": 1}] * 2


def test_bad_records_and_missing_images_stop_it_or_are_counted(root: Path) -> None:
    gone = record(2)
    gone["image"] = "gone.png"
    sources = [source(root, "a", [record(1), gone, {"id": 3, "conversations": []}])]
    with pytest.raises(UserError, match=r"record '2': there is no image .*gone\.png"):
        mixed(root, sources)
    with pytest.raises(UserError, match="bad_records: leave_out"):
        mixed(root, sources, missing_images="leave_out")
    found = mixed(root, sources, missing_images="leave_out", bad_records="leave_out")
    assert [one.id for one in found] == ["a/1"]
    (told,) = card(root)["sources"]
    assert told["left_out"] == {"bad record": 1, "image missing": 1}
    assert told["bad_records"] == {"no_answer": 1}


def test_images_of_evaluations_are_left_out_unless_allowed(root: Path) -> None:
    draw(root / "train2017" / "000000000002.png", 2)
    second = record(2)
    second["image"] = "train2017/000000000002.png"
    (root / "ids.txt").write_text("COCO_val2014_000000000002.jpg\n")
    guard = {"lists": {"own": str(root / "ids.txt")}}
    sources = [source(root, "a", [record(1), second])]
    assert [one.id for one in mixed(root, sources, guard=guard)] == ["a/1"]
    assert card(root)["sources"][0]["left_out"] == {"evaluation image": 1}
    allowed = {**guard, "allow_evaluation_images": True}
    assert len(mixed(root, sources, guard=allowed)) == 2


def test_an_image_outside_of_the_root_is_refused(root: Path) -> None:
    sources = [source(root, "a", [record(1)])]
    with pytest.raises(UserError, match="is not below"):
        mixed(root, sources, image_root=str(root / "train2017" / "deeper"))


def test_one_image_under_two_roots_is_one(root: Path) -> None:
    found = [
        Conversation("x", (), (Path(folder, "train2017", "1.jpg"),)) for folder in ("/a", "/b/c")
    ]
    assert content_digest(found[0]) == content_digest(found[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(0, 30),
    st.one_of(st.none(), st.integers(1, 200)),
    st.sampled_from([None, 0.0, 0.06, 0.3]),
    st.sampled_from([None, 0.0, 0.05, 0.2]),
)
def test_quotas_are_within_one_of_what_was_asked_or_say_what_is_short(
    has: list[tuple[int, int]],
    texts: int,
    total: int | None,
    replay: float | None,
    unsure: float | None,
) -> None:
    sources = [{"name": f"s{i}", "path": "x"} for i in range(len(has))]
    sources.append({"name": "text", "path": "x", "replay": True})  # type: ignore[dict-item]
    values = {
        "output_dir": "x",
        "sources": sources,
        "total": total,
        "replay_share": replay,
        "cannot_tell_share": unsure,
    }
    config = parse(MixConfig, values, "test")
    available = {
        f"s{i}": RecordCounts(
            plain + (0 if unsure is not None else odd), odd if unsure is not None else 0
        )
        for i, (plain, odd) in enumerate(has)
    } | {"text": RecordCounts(texts)}
    try:
        found = quotas(config, available)
    except UserError as error:
        assert "than there is" in str(error) or "no source has one" in str(error)
        return
    taken = sum(quota.plain + quota.cannot_tell for quota in found.values())
    assert total is None or taken == total
    for name, quota in found.items():
        assert 0 <= quota.plain <= available[name].plain
        assert 0 <= quota.cannot_tell <= available[name].cannot_tell
    if unsure is not None:
        assert abs(sum(q.cannot_tell for q in found.values()) - unsure * taken) <= 1.5
    if replay is not None:
        assert abs(found["text"].plain - replay * taken) <= 1
