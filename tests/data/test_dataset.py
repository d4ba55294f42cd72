import gc
import json
import os
import pickle
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlm_sft.config.schema import DataConfig, DataFile, LanguageModelConfig
from vlm_sft.data import record_store
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.record_store import RecordStore
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

SPEC = ImageSpec(size=14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
TOKENS = 4
TOKENIZER = load_tokenizer(LanguageModelConfig(config={"model_type": "llama"}, tokenizer="bytes"))
CHAT_TOKENIZER = ChatTokenizer.from_name("vicuna_v1", TOKENIZER)


def record(turns: int = 1, images: int = 0, **more: Any) -> dict[str, Any]:
    """`turns` exchanges; the first `images` questions show one image each."""
    conversation = []
    for turn in range(turns):
        mark = "<image>\n" if turn < images else ""
        conversation.append({"from": "human", "value": f"{mark}Question {turn}?"})
        conversation.append({"from": "gpt", "value": f"Answer {turn}."})
    files = {"image": [f"{i}.png" for i in range(images)]} if images else {}
    return {"conversations": conversation, **files, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, color in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (20 + index, 10), color).save(tmp_path / f"{index}.png")
    return tmp_path


def build(
    folder: Path, records: list[dict[str, Any]], weights: tuple[float, ...] = (1.0,), **more: Any
) -> tuple[SupervisedDataset, Ledger]:
    files = []
    for number, weight in enumerate(weights):
        path = folder / f"data{number}.json"
        path.write_text(json.dumps(records))
        files.append(DataFile(path=str(path), weight=weight))
    config = DataConfig(train=files, **more)
    ledger = Ledger()
    dataset = SupervisedDataset(
        files, CHAT_TOKENIZER, SPEC, layout_rule=LayoutRule(TOKENS), config=config, ledger=ledger
    )
    return dataset, ledger


def test_an_example_is_its_rendering_with_placeholders_expanded_and_without_loss(folder):
    dataset, _ = build(folder, [record(turns=3, images=2, id="x")])
    example = dataset[0]
    tokenized = CHAT_TOKENIZER.tokenize(dataset.conversation(0))
    ids, labels = [], []
    for token, label in zip(tokenized.input_ids, tokenized.labels, strict=True):
        times = TOKENS if token == IMAGE_TOKEN_ID else 1
        ids += [token] * times
        labels += [IGNORE_INDEX if token == IMAGE_TOKEN_ID else label] * times
    assert example.record_id == "x"
    assert example.input_ids.tolist() == ids and example.input_ids.dtype == torch.int64
    assert example.labels.tolist() == labels and example.labels.dtype == torch.int64
    assert ids.count(IMAGE_TOKEN_ID) == 2 * TOKENS
    assert list(dataset.lengths) == [len(ids)] and dataset.has_image == [True]
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    assert TOKENIZER.decode(supervised) == " Answer 0.</s> Answer 1.</s> Answer 2.</s>"


def test_images_come_in_reading_order_as_the_tower_wants_them(folder):
    for aspect in ("pad", "crop"):
        dataset, _ = build(folder, [record(turns=3, images=3)], image_aspect=aspect)
        pixels = dataset[0].pixel_values
        assert pixels.shape == (3, 3, 14, 14) and pixels.dtype == torch.uint8
        for index in range(3):
            assert torch.equal(pixels[index], read_pixels(folder / f"{index}.png", SPEC, aspect))


def test_a_text_record_has_no_images_but_their_shape(folder):
    dataset, _ = build(folder, [record()])
    assert dataset[0].pixel_values.shape == (0, 3, 14, 14)
    assert dataset.has_image == [False]


def test_the_first_position_never_has_a_label(folder):
    class FromTheStart:
        def tokenize(self, conversation: Conversation) -> Any:
            tokenized = CHAT_TOKENIZER.tokenize(conversation)
            return replace(tokenized, labels=list(tokenized.input_ids))

        def tokenize_all(self, conversations: Iterable[Conversation]) -> Any:
            return map(self.tokenize, conversations)

    path = folder / "data.json"
    path.write_text(json.dumps([record()]))
    files = [DataFile(path=str(path))]
    dataset = SupervisedDataset(
        files,
        FromTheStart(),
        SPEC,
        layout_rule=LayoutRule(TOKENS),
        config=DataConfig(train=files),
        ledger=Ledger(),
    )
    labels = dataset[0].labels.tolist()
    assert labels[0] == IGNORE_INDEX and IGNORE_INDEX not in labels[1:]


def test_files_keep_their_order_and_weights(folder):
    dataset, ledger = build(folder, [record(id=1), record(id=2)], weights=(1.0, 2.5))
    assert dataset.record_ids == ["1", "2", "1", "2"]
    assert dataset.weights == [1.0, 1.0, 2.5, 2.5]
    assert dataset.num_input_records == 4 and ledger.counts["trained"] == 4


# --- faults


def faulty() -> list[dict[str, Any]]:
    empty = record(id="empty")
    empty["conversations"][1]["value"] = ""
    return [record(id="good"), empty, record(images=1, id="gone", image="gone.png")]


def test_the_first_bad_record_stops_reading_by_default(folder):
    with pytest.raises(RecordError, match=r"data0\.json\[1\]: record 'empty': .*empty") as caught:
        build(folder, faulty())
    assert caught.value.reason == "empty_answer"
    with pytest.raises(RecordError, match=r"'gone': no image file .*gone\.png") as caught:
        build(folder, faulty()[2:])
    assert caught.value.reason == "image_missing"


def test_bad_records_are_quarantined_on_request_and_the_ledger_counts_all(folder):
    dataset, ledger = build(folder, faulty(), on_error="quarantine")
    assert dataset.record_ids == ["good"] and dataset.num_input_records == 3
    assert [(e.record_id, e.bucket, e.reason) for e in ledger.entries] == [
        ("good", "trained", ""),
        ("empty", "quarantined", "empty_answer"),
        ("gone", "quarantined", "image_missing"),
    ]


def test_pipes_folders_and_impossible_names_are_no_images(folder):
    os.mkfifo(folder / "pipe.png")
    for name in ("pipe.png", "long" * 100):
        with pytest.raises(RecordError) as caught:
            build(folder, [record(images=1, image=name)])
        assert caught.value.reason == "image_missing"


def test_no_record_left_is_an_error_that_tells_why(folder):
    with pytest.raises(UserError, match=r"no record to train on; 2 records: 0 used.*2 quaran"):
        build(folder, faulty()[1:], on_error="quarantine")
    with pytest.raises(UserError, match="no record to train on; 0 records"):
        build(folder, [])


def test_a_broken_image_is_named_with_its_record_when_it_is_opened(folder):
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:50])
    dataset, _ = build(folder, [record(), record(images=1, id="torn")])
    assert dataset[0].record_id == "index-0"
    with pytest.raises(RecordError, match=r"data0\.json\[1\]: record 'torn': .*0\.png: trunc"):
        dataset[1]
    (error,) = dataset.broken_images()
    assert (error.record_id, error.reason) == ("torn", "image_broken")


def test_an_image_that_was_replaced_since_the_records_were_read_is_named(folder):
    dataset, _ = build(folder, [record(images=1, id="one")])
    before = dataset[0].pixel_values
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes())  # rewritten with the same bytes
    assert torch.equal(dataset[0].pixel_values, before)
    Image.new("RGB", (90, 70), "red").save(folder / "0.png")
    with pytest.raises(
        RecordError, match=r"record 'one': .*0\.png: has \d+ bytes, but had"
    ) as caught:
        dataset[0]
    assert caught.value.reason == "image_changed"


def test_a_record_whose_answers_all_carry_no_loss_is_skipped(folder):
    silent = record(turns=2, id="silent")
    for turn in silent["conversations"]:
        turn["loss"] = False
    dataset, ledger = build(folder, [record(id="good"), silent])
    assert dataset.record_ids == ["good"]
    assert [(e.bucket, e.reason) for e in ledger.entries][1] == ("skipped", "no_targets")


# --- length


def length_of(turns: int, images: int, folder: Path) -> int:
    return build(folder, [record(turns, images)])[0].lengths[0]


@pytest.mark.parametrize("policy", ["error", "skip", "drop_turns"])
@pytest.mark.parametrize("beyond", [-3, -2, -1, 0, 1, 2, 3])
def test_the_limit_counts_expanded_tokens_and_is_inclusive(folder, policy, beyond):
    limit = length_of(2, 2, folder)
    records = [record(1, 0, id="short"), record(2, 2, id="long")]
    options = {"max_length": limit - beyond, "length_policy": policy}
    if beyond <= 0:
        dataset, ledger = build(folder, records, **options)
        assert dataset.record_ids == ["short", "long"] and dataset.lengths[1] == limit
        assert ledger.counts["trained"] == 2
    elif policy == "error":
        with pytest.raises(RecordError, match=f"takes {limit} tokens, `max_length` is") as caught:
            build(folder, records, **options)
        assert caught.value.reason == "too_long"
    elif policy == "skip":
        dataset, ledger = build(folder, records, **options)
        assert dataset.record_ids == ["short"]
        assert ledger.reasons == {("skipped", "too_long"): 1}
    else:
        dataset, ledger = build(folder, records, **options)
        assert dataset.record_ids == ["short", "long"]
        assert dataset.lengths[1] == length_of(1, 1, folder)
        assert ledger.entries[1].message == "2 of 4 turns dropped"


def test_dropped_turns_take_their_images_with_them(folder):
    limit = length_of(2, 2, folder)
    records = [record(3, 3, id="x")]
    dataset, ledger = build(folder, records, max_length=limit, length_policy="drop_turns")
    conversation = dataset.conversation(0)
    assert [turn.text for turn in conversation.turns] == [
        "\nQuestion 0?",
        "Answer 0.",
        "\nQuestion 1?",
        "Answer 1.",
    ]
    assert conversation.images == (folder / "0.png", folder / "1.png")
    example = dataset[0]
    assert len(example.input_ids) == limit and example.pixel_values.shape[0] == 2
    whole, _ = build(folder, [record(2, 2)])
    assert example.input_ids.tolist() == whole[0].input_ids.tolist()
    assert ledger.counts == {"trained": 0, "turns_dropped": 1, "skipped": 0, "quarantined": 0}


def test_a_first_exchange_that_does_not_fit_is_skipped_and_never_cut(folder):
    limit = length_of(1, 1, folder)
    records = [record(3, 3, id="long"), record(1, 0, id="short")]
    with_system = record(3, 3, id="system")
    with_system["conversations"].insert(0, {"from": "system", "value": "x" * 300})
    dataset, ledger = build(
        folder, [*records, with_system], max_length=limit - 1, length_policy="drop_turns"
    )
    assert dataset.record_ids == ["short"]
    assert ledger.reasons == {("skipped", "too_long"): 2}
    assert "its first question and answer take" in ledger.entries[0].message


def test_dropping_the_only_trained_turn_leaves_nothing_and_is_said(folder):
    limit = length_of(1, 0, folder)
    late = record(2, 0, id="late")
    late["conversations"][1]["weight"] = 0
    dataset, ledger = build(
        folder, [record(id="x"), late], max_length=limit, length_policy="drop_turns"
    )
    assert dataset.record_ids == ["x"]
    assert ledger.reasons == {("skipped", "no_targets"): 1}


def test_too_long_records_can_be_quarantined(folder):
    limit = length_of(1, 0, folder)
    _, ledger = build(folder, [record(), record(2)], max_length=limit, on_error="quarantine")
    assert ledger.reasons == {("quarantined", "too_long"): 1}


# --- what is kept


def test_a_conversation_is_returned_as_it_was_read(folder):
    texts = ["Ünï\u2003코드 <image> \u0000", '"quotes" \n\n </s>']
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": texts[0]}]
    turns += [{"role": "assistant", "content": texts[1]}]
    dataset, _ = build(folder, [{"messages": turns, "images": ["0.png"], "id": 5}])
    conversation = dataset.conversation(0)
    assert conversation.id == "5" and conversation.where.endswith("data0.json[0]")
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
    assert conversation.turns[1].text == texts[0].replace("<image>", "")
    assert conversation.turns[2].text == texts[1]
    assert conversation.images == (folder / "0.png",)


def test_embedded_images_are_kept_on_disk_and_give_the_same_pixels(folder):
    import pyarrow
    from pyarrow import parquet

    buffer = BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    row = record(1, 1) | {"image": {"bytes": buffer.getvalue(), "path": None}}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), folder / "x.parquet")
    files = [DataFile(path=str(folder / "x.parquet"))]
    dataset = SupervisedDataset(
        files,
        CHAT_TOKENIZER,
        SPEC,
        layout_rule=LayoutRule(TOKENS),
        config=DataConfig(train=files),
        ledger=Ledger(),
    )
    from_file, _ = build(folder, [record(1, 1)])
    assert torch.equal(dataset[2].pixel_values, from_file[0].pixel_values)
    assert dataset.conversation(1).images == (buffer.getvalue(),)


def test_a_files_digest_moves_with_ids_labels_and_images_only(folder):
    def of(*records: dict[str, Any], **more: Any) -> str:
        return build(folder, list(records), **more)[0].contents[0].sha256

    base = of(record(2, 1, id="a"), record(1))
    assert of(record(2, 1, id="b"), record(1)) == base
    quiet = record(2, 1)
    quiet["conversations"][1]["loss"] = False
    others = [
        of(record(1), record(2, 1)),
        of(record(2, 1)),
        of(record(2, 0), record(1)),
        of(record(2, 1, image="1.png"), record(1)),
        of(quiet, record(1)),
    ]
    assert base not in others and len(set(others)) == 5


def test_workers_and_copies_give_the_examples_of_the_main_process(folder):
    dataset, _ = build(folder, [record(2, 1, id=i) for i in range(4)])
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
        collate_fn=_same,
        generator=torch.Generator(),
    )
    copy = pickle.loads(pickle.dumps(dataset))  # what workers get where nothing is forked
    for index, loaded in enumerate(loader):
        for theirs in (loaded, copy[index]):
            assert theirs.record_id == dataset[index].record_id
            assert torch.equal(theirs.input_ids, dataset[index].input_ids)
            assert torch.equal(theirs.pixel_values, dataset[index].pixel_values)


def _same(example: Any) -> Any:
    return example


@pytest.mark.parametrize("turns", [1, 12])
def test_a_record_takes_a_few_hundred_bytes_of_memory_however_long_it_is(
    folder: Path, turns: int
) -> None:
    rows = [record(turns, images=1, id=f"record-{i}") for i in range(500)]
    build(folder, rows[:10])  # what is kept once
    tracemalloc.start()
    dataset, ledger = build(folder, rows)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == len(ledger.entries) == 500
    assert kept / 500 < 600


# --- the record store


def test_a_store_is_read_by_pickled_copies_and_deleted_with_its_owner(monkeypatch):
    monkeypatch.setattr(record_store, "BATCH_BYTES", 100)  # several batches
    turns = (
        Turn("user", (ImagePart(0), TextPart(" and "), ImagePart(1)), image_separator=None),
        Turn("assistant", (TextPart("Ünï\u0000"),), supervised=False),
    )
    images = (b"PNG", Path(os.fsdecode(b"/a/\xff.png")))
    records = [Conversation(f"r{i}", turns, images, f"/b/\udcff:{i}") for i in range(20)]
    store = RecordStore()
    for number, row in enumerate(records):
        labels = [IGNORE_INDEX, IMAGE_TOKEN_ID, number][: number % 4]
        store.append(row, TokenizedRecord([5, IMAGE_TOKEN_ID, number][: number % 4], labels))
    store.finish()
    copy = pickle.loads(pickle.dumps(store))
    for number, row in enumerate(records):
        for by in (store, copy):
            assert by.conversation(number) == row and by.where(number) == row.where
            assert tuple(by.image(number, n) for n in range(2)) == images
            ids, supervised = by.tokens(number)
            assert ids.tolist() == [5, IMAGE_TOKEN_ID, number][: number % 4]
            assert supervised.tolist() == [False, True, True][: number % 4]
    path = Path(store.path)
    del copy
    assert path.exists()
    del store
    assert not path.exists()


def test_records_with_the_same_prefix_have_the_same_prefix_id(folder: Path) -> None:
    other = record(images=1)
    other["image"] = ["1.png"]
    later = record(images=1)
    later["conversations"][0]["value"] = "Look: <image>\nQuestion?"
    twice = record(turns=2, images=2)
    rows = [record(images=1), record(turns=2, images=1), other, later, record(), twice]
    dataset, _ = build(folder, rows)
    keys = list(dataset.prefix_ids)
    assert keys[0] == keys[1] == keys[5] >= 0
    assert len({keys[0], keys[2], keys[3]}) == 3
    assert keys[4] == -1 and list(dataset.prefix_lengths)[4] == 0
    assert list(dataset.num_images) == [1, 1, 1, 1, 0, 2]
    for index in (0, 1, 5):
        length = dataset.prefix_lengths[index]
        example = dataset[index]
        assert example.input_ids[:length].tolist() == dataset[0].input_ids[:length].tolist()
        assert example.input_ids[length - 1] == IMAGE_TOKEN_ID != example.input_ids[length]
    whole, rest = dataset[5].pixel_values, dataset.example(5, first_image=1).pixel_values
    assert len(whole) == 2 and torch.equal(rest, whole[1:])
    assert len(dataset.example(0, first_image=1).pixel_values) == 0


def test_embedded_images_are_distinguished_by_their_bytes(folder: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    red, blue = ((folder / name).read_bytes() for name in ("0.png", "2.png"))
    turns = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
    rows = {
        "conversations": [turns] * 3,
        "image": [{"bytes": image, "path": None} for image in (red, red, blue)],
    }
    features = Features(
        {
            "conversations": [{"from": Value("string"), "value": Value("string")}],
            "image": ImageFeature(),
        }
    )
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "rows.parquet"))
    ledger = Ledger()
    file = DataFile(path=str(folder / "rows.parquet"))
    config = DataConfig(train=[file])
    dataset = SupervisedDataset(
        [file], CHAT_TOKENIZER, SPEC, layout_rule=LayoutRule(TOKENS), config=config, ledger=ledger
    )
    first, second, third = dataset.prefix_ids
    assert first == second != third


def test_a_supervised_prefix_is_not_shared(folder: Path) -> None:
    learned = record(turns=2)
    learned["conversations"][2]["value"] = "<image>\nQuestion?"
    learned["image"] = ["0.png"]
    dataset, _ = build(folder, [learned, learned])
    assert list(dataset.prefix_ids) == [-1, -1]
