"""Verbs with their subjects, objects and places, what WordNet makes of words, and its table."""

import importlib.util
from pathlib import Path

import pytest

from data_tools.instruct.verify import senses
from data_tools.instruct.verify.clauses import predicates

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "make_wordnet_table.py"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("a man holding a bat is swinging at a ball",
         ["hold: man bat", "swing: man - at ball"]),
        ("the boy bends over the cupcake and blows out the candle",
         ["bend: boy cupcake over cupcake", "blow: boy candle out candle"]),
        ("a group of people wait for a bus on the street",
         ["wait: people - for bus, on street"]),
        ("he stands in a workshop and is sanding a piece of wood",
         ["stand: he - in workshop", "sand: he wood"]),
        ("a white dog and a cat are sleeping on top of a blue couch",
         ["sleep: dog - on couch"]),
        ("a woman who feeds two goats in a pen", ["feed: woman goats in pen"]),
        ("the plates covered with tomato sauce are served", ["cover: plates - with sauce",
         "serve: plates -"]),
    ],
)  # fmt: skip
def test_verbs_are_read_with_subject_object_and_places(sentence: str, expected: list[str]) -> None:
    words = sentence.split()
    found = []
    for verb in predicates(words):
        subject = "-" if verb.subject is None else words[verb.subject]
        thing = "-" if verb.object is None else words[verb.object]
        places = ", ".join(f"{preposition} {words[noun]}" for preposition, noun in verb.places)
        found.append(f"{verb.stem}: {subject} {thing} {places}".strip())
    assert found == expected


def test_words_have_stems_kinds_and_relations() -> None:
    nouns, verbs = senses.nouns(), senses.verbs()
    stems = ("hopped", "ran", "chatting", "settled", "lies")
    assert [senses.verb(w) for w in stems] == ["hop", "run", "chat", "settle", "lie"]
    assert [senses.noun(w) for w in ("wolves", "men", "buses")] == ["wolf", "man", "bus"]
    assert nouns.is_a("pelican", "bird") and not nouns.is_a("pelican", "person")
    assert nouns.related("trout", "fish") and not nouns.related("kitchen", "garage")
    assert verbs.related("doze", "sleep") and not verbs.related("sit", "swim")
    assert [w for w in ("kiwi", "shrimp", "banana", "table", "fork") if senses.is_food(w)] == [
        "kiwi", "shrimp", "banana",
    ]  # fmt: skip
    assert (senses.ground("river"), senses.ground("hand")) == ("body_of_water", None)


def test_the_table_is_made_from_the_files_of_wordnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make_wordnet_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    empty = {f"{kind}.{part}": "" for kind in ("data", "index") for part in ("noun", "verb", "adj")}
    files = empty | {
        "data.adv": "", "noun.exc": "wolves wolf\n", "verb.exc": "ran run\n",
        "data.noun": "  1 a licence\n"
        "01 05 n 01 animal 0 000 | a living thing such as a wolf or wolf\n"
        "02 05 n 02 wolf 0 Canis_lupus 0 001 @ 01 n 0000 | an animal that can run\n",
        "index.noun": "animal n 1 0 1 1 01\nwolf n 1 1 @ 1 0 02\ncanis_lupus n 1 1 @ 1 0 02\n",
        "data.verb": "03 38 v 01 run 0 000 | move fast\n",
        "index.verb": "run v 1 0 1 1 03\n",
        "cntlist.rev": "animal%1:05:00:: 1 9\nrun%2:38:00:: 1 7\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(script, "TABLE", tmp_path / "wordnet.txt")
    assert script.main([str(tmp_path)]) == 0
    text = (tmp_path / "wordnet.txt").read_text()
    assert "Copyright 2006 by Princeton University" in text
    assert text[text.index("# nouns") :] == (
        "# nouns\n1 0 animal+\n2 1 wolf+\n# verbs\n1 0 run+\n# irregular nouns\nwolves wolf\n"
        "# irregular verbs\nran run\n# mostly verbs\n# mostly adjectives\n"
    )
