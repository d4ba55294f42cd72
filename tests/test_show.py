"""Records are shown as the model sees them, with the trained tokens marked."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.tokenizers_for_tests import load, missing
from vlm_sft import show
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import DataConfig, DataFile, load_config
from vlm_sft.data.conversation import Conversation, TextPart, Turn
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.filtering import RecordFilter
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.records import read_records
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.inspection.records import Inspected
from vlm_sft.inspection.tokens import view_tokens

pytestmark = pytest.mark.usefixtures("in_the_repository")

CONFIG = "configs/tiny/stage2.yaml"
RECORDS = "configs/tiny/data/instructions.json"
DATA_FILE = DataFile(path=RECORDS)
FILE = ["--records", RECORDS, "--tokenizer", "bytes", "--template", "chatml"]


def objects(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert show.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def file_of(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "records.jsonl"
    rows = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("source", [[CONFIG], FILE])
def test_json_holds_ids_labels_and_tokens_of_equal_length(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = objects([*source, "--json"], capsys)
    assert len(found) == 24
    for one in found:
        assert {"id", "input_ids", "labels", "tokens", "num_images"} <= one.keys()
        assert len(one["input_ids"]) == len(one["labels"]) == len(one["tokens"]) > 0
        assert one["num_images"] == one["input_ids"].count(one["image_token_id"]) == 1
        trained = [
            t for t, label in zip(one["tokens"], one["labels"], strict=True) if label != -100
        ]
        assert "".join(trained).count("<|im_end|>") == 2
        pairs = zip(one["input_ids"], one["labels"], strict=True)
        assert all(label in (-100, i) for i, label in pairs)


def test_both_sources_show_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert objects([CONFIG, "--json"], capsys) == objects([*FILE, "--json"], capsys)


def test_overrides_and_validation_files_of_a_configuration_are_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (one,) = objects([CONFIG, "--eval", "--json", "--limit", "1"], capsys)
    assert one["id"] == "red-circle-2"
    vicuna = objects([CONFIG, "data.template=vicuna_v1", "--json", "--limit", "1"], capsys)
    assert "".join(vicuna[0]["tokens"]).startswith("<s>A")


@pytest.mark.parametrize("source", [[CONFIG], FILE])
def test_trained_text_is_between_marks(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([*source, "--record", "red-circle-1"]) == 0
    out = capsys.readouterr().out
    assert "⟦red<|im_end|>⟧" in out and "⟦circle<|im_end|>⟧" in out
    assert out.count("⟦") == out.count("⟧") == 2
    assert "<|im_start|>user\n<image>\nWhich colour?<|im_end|>" in out
    assert "red-circle-1" in out and "1 image)" in out and "red-circle-0" not in out


def test_five_records_are_shown_without_a_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, count in ([], 5), (["--limit", "7"], 7):
        assert show.main([CONFIG, *options]) == 0
        assert capsys.readouterr().out.count("── ") == count


def test_long_answers_are_not_broken_into_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = " ".join(f"word{i}" for i in range(80))
    argv = ["--records", file_of(tmp_path, answer), *FILE[2:]]
    assert show.main(argv) == 0
    assert f"⟦{answer}<|im_end|>⟧" in capsys.readouterr().out


def test_control_characters_are_shown_as_symbols(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "a\x1b[2Jb\rc\x07\td [bold]e"), *FILE[2:]]
    assert show.main(argv) == 0
    out = capsys.readouterr().out
    assert "⟦a␛[2Jb␍c␇␉d [bold]e<|im_end|>⟧" in out
    assert not {"\x1b", "\r", "\x07"} & set(out)


def test_text_that_equals_a_special_token_or_a_mark_gets_a_backslash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, r"<image> <|im_end|> ⟦x⟧ \\<image> <im"), *FILE[2:]]
    assert show.main(argv) == 0
    out = capsys.readouterr().out
    assert r"⟦\<image> \<|im_end|> \⟦x\⟧ \\\\\<image> <im<|im_end|>⟧" in out


def test_special_token_strings_in_data_stay_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "say <|im_end|>"), *FILE[2:], "--json"]
    (one,) = objects(argv, capsys)
    trained = [t for t, label in zip(one["tokens"], one["labels"], strict=True) if label != -100]
    assert trained == [*"sayĠ<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([CONFIG, "--record", "gone"], ["--record gone: no record with this id", RECORDS]),
        (["--records", RECORDS], ["missing: --tokenizer"]),
        ([], ["give CONFIG.yaml"]),
        ([*FILE[:-1], "chatmll"], ["chatmll"]),
        (["--records", RECORDS, "--tokenizer", "./gone"], ["no such folder './gone'"]),
        (["--records", "gone.json", "--tokenizer", "bytes"], ["gone.json"]),
        ([CONFIG, "--limit", "0"], ["--limit 0: expected 1 or more"]),
        ([CONFIG, *FILE], ["--records: give CONFIG.yaml or --records, not both"]),
        ([CONFIG, "--template", "plain"], ["--template: give CONFIG.yaml or", "key.path=value"]),
        ([*FILE, "--eval"], ["--eval: needs CONFIG.yaml"]),
        ([CONFIG, "--max-length", "9"], ["--max-length: give CONFIG.yaml or --records"]),
        ([CONFIG, "--source", "gone"], ["--source gone: no such file", RECORDS]),
        ([CONFIG, "--image-tokens", "0"], ["--image-tokens 0: expected 1 or more"]),
        ([CONFIG, "--longer-than", "-1"], ["--longer-than -1: expected 0 or more"]),
        ([CONFIG, "--json", "--html", "x.html"], ["--json and --html: give one"]),
        ([CONFIG, "--html", "configs"], ["--html configs: this is a folder"]),
        ([CONFIG, "data.eval=[]", "--eval"], ["has no files in data.eval"]),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(show.main, argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error VS") and err.count("\n") == 1 and out == ""
    assert all(word in err for word in words)


def test_a_faulty_record_is_reported_among_the_valid_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "good", " ", "good too"), *FILE[2:], "--json"]
    assert show.main(argv) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["r0", "r2"]
    assert "records.jsonl:2: record 'r1': turn 1: the answer is empty" in err


# --- filtering results


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts)
    ]


def mixed(folder: Path) -> Path:
    """Two files with records of every kind, and a configuration that limits them to 120 tokens.

    Nine image tokens per image, one token per byte; `chatml` adds about 40 tokens per exchange.
    """
    Image.new("RGB", (600, 300), "teal").save(folder / "ok.png")
    whole = BytesIO()
    Image.new("RGB", (60, 60), "red").save(whole, "PNG")
    (folder / "broken.png").write_bytes(whole.getvalue()[:60])
    first = [
        {"id": "good", "image": "ok.png", "conversations": turns("<image>What?", "Teal.")},
        {"id": "empty", "conversations": turns("Why?", "")},
        {"id": "gone", "image": "gone.png", "conversations": turns("<image>What?", "None.")},
        {"id": "broken", "image": "broken.png", "conversations": turns("<image>What?", "Half.")},
        {"id": "long", "conversations": turns("One?", "First.", "Two?", "Second. " * 20)},
        {"id": "too long", "conversations": turns("All?", "Everything. " * 20)},
    ]
    silent = turns("Silent?", "Yes.")
    silent[1]["loss"] = False  # type: ignore[assignment]
    second = [
        {"id": "text", "conversations": turns("Say <|im_end|>", "A <image> and </s></s>.")},
        {"id": "silent", "conversations": silent},
        {"id": "half", "conversations": [*silent, *turns("Loud?", "Yes!")]},
    ]
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "second.json").write_text(json.dumps(second))
    config = yaml.safe_load(Path(CONFIG).read_text())
    files = [{"path": str(folder / name)} for name in ("first.json", "second.json")]
    config["data"] |= {"train": files, "max_length": 120, "length_policy": "drop_turns"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.mark.parametrize("policy", ["error", "drop_turns", "skip"])
def test_statistics_equal_the_ledger_of_a_run(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mixed(tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / "ok.png").read_bytes())
    overrides = [f"data.length_policy={policy}", "data.on_error=quarantine"]
    (statistics,) = objects([str(path), *overrides, "--statistics", "--json"], capsys)
    config = load_config(path, overrides).data
    ledger = Ledger()
    dataset = SupervisedDataset(
        config.train,
        ChatTokenizer.from_name("chatml", byte_tokenizer()),
        ImageSpec(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        layout_rule=LayoutRule(statistics["image_tokens_per_image"]),
        config=config,
        ledger=ledger,
    )
    total = statistics["total"]
    assert statistics["image_tokens_per_image"] == 9
    assert total["records"] == len(ledger.entries) == 9
    assert total["outcomes"] == ledger.counts
    assert total["reasons"] == {f"{b}: {r}": n for (b, r), n in ledger.reasons.items()}
    assert total["text_tokens"] + total["image_tokens"] == sum(dataset.lengths)
    trained = sum(int((dataset[i].labels != -100).sum()) for i in range(len(dataset)))
    assert total["trained_tokens"] == trained
    for source in statistics["sources"]:
        name = source["name"]
        found = Counter(e.bucket for e in ledger.entries if name in e.where)
        assert {k: n for k, n in source["outcomes"].items() if n} == found


def test_statistics_count_special_token_strings_and_long_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (statistics,) = objects([str(mixed(tmp_path)), "--statistics", "--json"], capsys)
    first, second = statistics["sources"]
    assert second["control_strings"] == {"<|im_end|>": 1, "</s>": 2}
    assert second["records_with_control"] == 1 and first["control_strings"] == {}
    assert second["placeholders_in_answers"] == 1 and second["placeholders_elsewhere"] == 0
    assert first["images"] == 3 and first["missing_images"] == 1
    assert first["without_images"] == 2 and second["without_images"] == 3
    assert first["too_long"] == 2 and first["dropped_turns"] == 2
    with_images, without = (
        first[f"length_{what}_image_tokens"]["shortest"] for what in ("with", "without")
    )
    assert with_images == without + 9


def test_statistics_are_tables_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([str(mixed(tmp_path)), "--statistics"]) == 0
    out = capsys.readouterr().out
    for words in ("Records by outcome", "empty_answer", "Trained share", "all files"):
        assert words in out
    assert "longer than 120" in out and "<|im_end|> 1" in out


def test_without_a_configuration_there_is_no_limit_until_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed(tmp_path)
    argv = ["--records", str(tmp_path / "first.json"), *FILE[2:], "--statistics", "--json"]
    (statistics,) = objects(argv, capsys)
    assert statistics["max_length"] is None and statistics["image_tokens_per_image"] == 576
    assert statistics["total"]["outcomes"]["trained"] == 5
    limits = ["--max-length", "120", "--length-policy", "skip", "--image-tokens", "9"]
    (statistics,) = objects([*argv, *limits], capsys)
    assert statistics["total"]["reasons"] == {
        "quarantined: empty_answer": 1,
        "skipped: too_long": 2,
    }


def shown_ids(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    show.main([*argv, "--limit", "99"])
    return re.findall(r"^── (.*) \(", capsys.readouterr().out, flags=re.MULTILINE)


def test_records_are_selected_by_file_reason_and_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(mixed(tmp_path))
    all_ids = shown_ids([config], capsys)
    assert len(all_ids) == 9
    assert shown_ids([config, "--source", "second.json"], capsys) == all_ids[6:]
    assert shown_ids([config, "--source", str(tmp_path / "first.json")], capsys) == all_ids[:6]
    assert shown_ids([config, "--reason", "too_long"], capsys) == ["long", "too long"]
    longer = shown_ids([config, "--longer-than", "120"], capsys)
    shorter = shown_ids([config, "--shorter-than", "121"], capsys)
    assert longer == ["long", "too long"]  # as read, before turns are dropped
    assert shorter == ["good", "broken", "text", "silent", "half"]
    assert shown_ids([config, "--record", "long", "--reason", "too_long"], capsys) == ["long"]


def test_a_selection_without_records_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(mixed(tmp_path)), "--reason", "bad_id"]
    assert show.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "" and "no record matches --reason bad_id; 9 records in" in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--reason", "too_lon", "--reason too_lon: no such reason; did you mean too_long?"),
        ("--reason", "xyz", "--reason xyz: no such reason; docs/errors.md lists all reasons"),
        ("--source", "x{near}", "no such file in this run; did you mean {near}?"),
        ("--source", "xyz", "--source xyz: no such file in this run: "),
    ],
)
def test_an_unknown_reason_or_file_is_refused_with_the_nearest_known_one(
    option: str, value: str, message: str, tmp_path: Path
) -> None:
    config = mixed(tmp_path)
    near = Path(load_config(config).data.train[0].path).name
    with pytest.raises(UserError, match=re.escape(message.format(near=near))):
        show.main([str(config), option, value.format(near=near)])


def test_skipped_and_shortened_records_are_labeled_and_train_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(mixed(tmp_path))
    assert show.main([config, "--limit", "99"]) == 2
    out, err = capsys.readouterr()
    blocks = {block.split(" (")[0]: block for block in out.split("── ")[1:]}
    assert "turns dropped: too_long: 2 of 4 turns dropped" in blocks["long"]
    assert "⟦First.<|im_end|>⟧" in blocks["long"] and "Second." not in blocks["long"]
    assert "skipped: too_long: its first question" in blocks["too long"]
    assert "⟦" not in blocks["too long"] and "Everything." in blocks["too long"]
    assert "quarantined: empty_answer: turn 1: the answer is empty" in blocks["empty"]
    assert blocks["half"].count("⟦") == 1 and "⟦Yes!" in blocks["half"]
    assert err == "error: 2 of 9 records shown are faulty\n"
    show.main([config, "--record", "too long", "--json"])
    (one,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["outcome"] == "skipped" and one["reason"] == "too_long"
    assert set(one["labels"]) == {-100}


def test_a_tower_that_cannot_be_built_is_reported_and_only_needed_for_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = ["model.vision_tower.name=./gone", "model.vision_tower.config=null"]
    assert show.main([CONFIG, *gone, "--json", "--limit", "1"]) == 0
    assert "note: " in (err := capsys.readouterr().err) and "--image-tokens N" in err
    with pytest.raises(ValueError, match="or give --image-tokens N"):
        show.main([CONFIG, *gone, "--statistics"])
    assert show.main([CONFIG, *gone, "--statistics", "--image-tokens", "9"]) == 0


def test_a_terminal_gets_all_records_wrapped_and_in_color_through_its_pager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen"
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > '{seen}'\n")
    pager.chmod(0o755)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in {"PAGER": str(pager), "COLUMNS": "50", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert show.main([CONFIG]) == 0
    text = seen.read_text()
    assert capsys.readouterr().out == "" and "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.count("── ") == 24 and "⟦red<|im_end|>⟧" in plain
    assert max(map(len, plain.splitlines())) <= 50
    pager.write_text("#!/bin/sh\nexit 0\n")  # a reader who leaves at once
    assert show.main([CONFIG]) == 0
    assert show.main([CONFIG, "--no-pager", "--limit", "1"]) == 0
    assert "⟦red<|im_end|>⟧" in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


# --- the page


class Page(HTMLParser):
    """The elements and texts of a page; `articles` is one list of elements for each record."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shape: list[Any] = []
        self.articles: list[list[Any]] = []
        self.marks: list[list[str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "i":
            return  # the number of tokens depends on the text
        if tag == "article":
            self.articles.append([])
            self.marks.append([])
            self.texts.append("")
        kept = sorted((k, v) for k, v in attrs if k not in ("src", "width", "height"))
        into = self.articles[-1] if "article" in [*self.open, tag] else self.shape
        into.append((tag, kept))
        if tag == "mark" and self.articles:
            self.marks[-1].append("")
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "i":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "article" in self.open:
            self.texts[-1] += data
            if "mark" in self.open:
                self.marks[-1][-1] += data


def page_of(argv: Sequence[str], folder: Path) -> tuple[str, Page]:
    path = folder / "page.html"
    assert show.main([*argv, "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


NASTY = [
    "plain",
    "<script>alert(1)</script>",
    "</script><script>alert(1)//",
    "</style><style>*{display:none}",
    "</mark></span></div></article>",
    "<!-- never ends",
    "<![CDATA[ ]]> <?php ?> <!doctype html>",
    "\"' onmouseover='alert(1)' x=\"",
    "&lt;b&gt; &amp; &#60;i&#62; &amp",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1) ${alert(1)} {{7*7}}",
    "\u202eright\u2066 to left\u202c \u200f",
    "\x00\x01\x08\x0c\x1b[2J\x7f\x9b",
    "\u2028line\u2029paragraph\ufeff\uffff",
    "日本語 👨‍👩‍👧 ` \\ \t",
]


def nasty_records(folder: Path, texts: Sequence[str]) -> list[str]:
    rows = [
        {"id": f"{number}{text}", "conversations": turns(f"Q {text}", f"A {text}")}
        for number, text in enumerate(texts)
    ]
    path = folder / "<b>&\"'.json"
    path.write_text(json.dumps(rows))
    return ["--records", str(path), *FILE[2:]]


def test_no_text_of_a_record_changes_the_page_around_it(tmp_path: Path) -> None:
    text, page = page_of(nasty_records(tmp_path, NASTY), tmp_path)
    _, harmless = page_of(nasty_records(tmp_path, ["harmless"] * len(NASTY)), tmp_path)
    assert page.articles == harmless.articles and len(page.articles) == len(NASTY)
    # the table of special-token strings is the same, since none of these texts contains one
    assert page.shape == harmless.shape and page.open == []
    assert [tag for tag, _ in page.shape].count("script") == 1
    assert text.count("<script") == text.count("</script") == 1
    assert text.count("<style") == text.count("</style") == 1
    dangerous = "\x00\x1b\x7f\x9b\u202e\u2066\u2028\u200f\ufeff\uffff"
    assert not set(dangerous) & set(text)
    for shown, nasty in zip(page.texts[:12], NASTY[:12], strict=True):
        assert f"Q {nasty}" in shown and f"A {nasty}" in shown


def test_a_page_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    text, page = page_of([CONFIG], tmp_path)
    policy = next(dict(found)["content"] for _, found in page.shape if "http-equiv" in dict(found))
    assert policy.startswith("default-src 'none'; img-src data:;") and "sha256-" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert "://" not in text and "@import" not in text and "url(" not in text


def conversations(path: str) -> Iterator[Conversation]:
    for record in read_records(DataFile(path=path)):
        assert isinstance(record, Conversation)
        yield record


def test_the_trained_tokens_of_a_page_are_the_answers(tmp_path: Path) -> None:
    _, page = page_of([CONFIG], tmp_path)
    expected = [
        [f"{turn.text}<|im_end|>" for turn in record.turns if turn.role == "assistant"]
        for record in conversations(RECORDS)
    ]
    assert page.marks == expected
    for article, answers in zip(page.articles, expected, strict=True):
        assert article.count(("div", [("class", "exchange")])) == len(
            answers
        )  # a block an exchange
    _, page = page_of(nasty_records(tmp_path, ["日本語 é", "two\nlines", "👨‍👩‍👧"]), tmp_path)
    assert page.marks == [[f"A {text}<|im_end|>"] for text in ("日本語 é", "two\nlines", "👨‍👩‍👧")]


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [("sentencepiece", "vicuna_v1"), ("llama_3", "llama_3"), ("qwen", "chatml")],
)
def test_tokens_together_spell_exactly_what_was_encoded(tokenizer: str, template: str) -> None:
    if (reason := missing(tokenizer)) is not None:
        pytest.skip(reason)
    chat_tokenizer = ChatTokenizer.from_name(template, load(tokenizer))
    record_filter = RecordFilter(
        chat_tokenizer, layout_rule=LayoutRule(1), config=DataConfig(train=[DATA_FILE])
    )
    for text in [*NASTY, " two  spaces ", "\n\nlines\n", "한국어 " * 9, "👩‍🚀", "a\ufffdb\ufffd"]:
        asked, answer = Turn("user", (TextPart("Q" + text),)), Turn("assistant", (TextPart(text),))
        result = record_filter.filter(Conversation("x", (asked, answer)))
        view = view_tokens(Inspected(0, result), chat_tokenizer, LayoutRule(1))
        assert view is not None
        (trained,) = (span for span in view.spans if span.kind == "trained")
        text_of_span = "".join(token.text for token in trained.tokens if not token.is_special)
        prefix = " " if template == "vicuna_v1" else ""
        assert text_of_span == chat_tokenizer.encoder.normalized(prefix + text)
        assert len(trained.tokens) <= view.num_trained
        if "\ufffd" not in text and len(text) > 20:
            assert len(trained.tokens) > 3  # tokens are shown one by one


def test_a_page_shows_thumbnails_and_reports_missing_and_broken_images(tmp_path: Path) -> None:
    text, page = page_of([str(mixed(tmp_path))], tmp_path)
    assert text.count("data:image/jpeg;base64,") == 1
    assert 'width="256" height="128"' in text and "1: ok.png, 600 x 300" in page.texts[0]
    assert "image 1:" in page.texts[2] and "no image file" in page.texts[2]
    assert "broken.png: truncated or corrupt" in page.texts[3]


def test_a_page_shows_the_filtering_result_of_each_record(tmp_path: Path) -> None:
    text, page = page_of([str(mixed(tmp_path))], tmp_path)
    good, empty, _, _, long, too_long, words, silent, half = page.texts
    assert "2 turns" in good and "1 image " in good and "with image tokens" in good
    assert "first.json[0]" in good
    assert "empty_answer: turn 1: the answer is empty" in empty
    assert "2 of 4 turns dropped" in long and "assistant: Second. Second." in long
    assert page.marks[4] == ["First.<|im_end|>"] and "Second." not in "".join(page.marks[4])
    assert "skipped" in too_long and page.marks[5] == [] and "Everything." in too_long
    assert "A <image> and </s></s>." in words
    assert "no_targets" in silent and page.marks[7] == []
    assert page.marks[8] == ["Yes!<|im_end|>"] and "Silent?" in half
    outcomes = [dict(article[0][1])["data-outcome"] for article in page.articles]
    kinds = {"trained": 4, "quarantined": 2, "turns_dropped": 1, "skipped": 2}
    assert Counter(outcomes) == kinds
    assert "training would end at the first of the 2 quarantined records" in text
    assert text.count('data-kind="source"') == 2 and text.count('data-kind="outcome"') == 4


def test_a_page_reports_how_many_records_it_shows_and_is_reproducible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [CONFIG, "--limit", "7", "--longer-than", "10"]
    text, page = page_of(argv, tmp_path)
    assert len(page.articles) == 7
    assert "7 of 24 records selected by --longer-than 10 are shown." in text
    assert "7 of 24 records, " in capsys.readouterr().err
    assert page_of(argv, tmp_path)[0] == text
    assert text.count("data:image/png;base64,") == 2  # lengths, and supervised share
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]
