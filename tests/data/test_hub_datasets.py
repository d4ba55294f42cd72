"""Data sets of a hub: read at one commit, with or without an Arrow copy, and every fault said."""

import json
import shutil
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from huggingface_hub import HfFileSystem, constants
from PIL import Image

from tests.export.hub_stub import TOKEN, Hub, running_hub
from tests.tiny_runs import run
from vlm_sft.config.schema import DataFile, load_config, load_stored_config
from vlm_sft.data import hub_datasets, hub_shards
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.images import read_bytes
from vlm_sft.data.records import open_records
from vlm_sft.errors import ConfigError, RecordError, UserError

ONE, TWO = "1" * 40, "2" * 40
NAME = "hf://datasets/me/scenes"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", found.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        _forget()
        yield found
        _forget()


def _forget() -> None:
    hub_datasets._commit_of.cache_clear()
    HfFileSystem.clear_instance_cache()
    fsspec.config.conf.clear()


def png(number: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def parquet(rows: list[dict[str, Any]], image: str | None = "image") -> bytes:
    table = datasets.Dataset.from_list(rows)
    if image is not None:
        table = table.cast_column(image, datasets.Image())
    file = BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def captions(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": png(number), "path": None}, "text": f"Caption {number}."}
        for number in range(first, first + count)
    ]


def publish(hub: Hub, files: dict[str, bytes], commit: str = ONE, name: str = "me/scenes") -> None:
    hub.datasets.setdefault(name, {})[commit] = files
    hub.heads[f"{name}@main"] = commit


def read(path: str, **settings: Any) -> list[Conversation]:
    found = list(open_records(DataFile(path=path, **settings)).conversations)
    errors = [record for record in found if isinstance(record, RecordError)]
    assert not errors, errors
    return [record for record in found if isinstance(record, Conversation)]


def shape(records: list[Conversation]) -> list[Any]:
    """What must not depend on how a data set is brought here."""
    return [
        (r.id, r.where, r.turns, [bytes(read_bytes(image)) for image in r.images]) for r in records
    ]


@pytest.fixture
def scenes(hub: Hub) -> Hub:
    """A data set of three Parquet files, the last with an image of an earlier one."""
    files = {
        f"data/train-0000{part}-of-00003.parquet": parquet(captions(20 * part, 20))
        for part in range(3)
    }
    publish(hub, files)
    return hub


def test_both_ways_give_the_same_records_in_the_order_of_the_data_set(scenes: Hub) -> None:
    arrow, shards = read(NAME), read(NAME, streaming=True)
    assert [record.turns[-1].text for record in arrow] == [f"Caption {n}." for n in range(60)]
    assert shape(arrow) == shape(shards)
    assert arrow[7].id == "index-7" and arrow[7].where == f"{NAME}[7]"
    assert isinstance(arrow[7].images[0], bytes) and isinstance(shards[7].images[0], Path)


def test_a_stream_that_was_killed_goes_on_behind_its_last_shard(
    scenes: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub_shards, "PER_SHARD", 16)
    whole = shape(read(NAME, streaming=True))
    contents = _contents(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    for stop in (0, 2, 3):
        _killed_after(stop, monkeypatch)
    assert shape(read(NAME, streaming=True)) == whole
    assert _contents(tmp_path / "second") == contents and len(contents) == 8


def _contents(cache: Path) -> dict[str, bytes]:
    (folder,) = (cache / "vlm_sft" / "hub" / "me--scenes").iterdir()
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".jsonl", ".tar")}


def _killed_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the writing in the shard after so many, as a kill does."""
    written = hub_shards._write_shard
    moved = hub_shards._Images.moved

    def write_or_stop(folder: Path, number: int, batches: Any) -> Any:
        if number == shards:

            def stop(images: Any, row: Any, key: str) -> Any:
                if key == "000005":
                    raise KeyboardInterrupt
                return moved(images, row, key)

            monkeypatch.setattr(hub_shards._Images, "moved", stop)
        return written(folder, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(hub_shards, "_write_shard", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            read(NAME, streaming=True)
    monkeypatch.setattr(hub_shards._Images, "moved", moved)


def test_written_shards_need_no_hub_and_are_not_read_if_they_changed(
    scenes: Hub, tmp_path: Path
) -> None:
    before = shape(read(f"{NAME}@{ONE}", streaming=True))
    scenes.faults[""] = 500
    assert shape(read(f"{NAME}@{ONE}", streaming=True)) == before
    (tar,) = (tmp_path / "cache").rglob("*.tar")
    tar.write_bytes(tar.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"00000\.tar: is missing or was changed; delete the fold"):
        read(f"{NAME}@{ONE}", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_equal_images_and_several_of_one_record_and_messages_are_read(
    streaming: bool, hub: Hub
) -> None:
    image = {"bytes": png(1), "path": None}
    turns = [
        {"role": "user", "content": "<image><image>\nWhich?"},
        {"role": "assistant", "content": "Both."},
    ]
    table = datasets.Dataset.from_list(
        [{"images": [image, {"bytes": png(2), "path": None}], "messages": turns}] * 2
    ).cast_column("images", datasets.List(datasets.Image()))
    file = BytesIO()
    table.to_parquet(file)
    publish(hub, {"test.parquet": file.getvalue()})
    first, second = read(f"{NAME}?split=test", streaming=streaming)
    assert [bytes(read_bytes(found)) for found in first.images] == [png(1), png(2)]
    assert first.images == second.images


def test_question_and_answer_columns_and_configs_of_the_card_are_read(hub: Hub) -> None:
    rows = [{"photo": {"bytes": png(3), "path": None}, "q": "A dog?", "a": "No."}]
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}.parquet}}]\n"
        for name in ("short", "long")
    )
    publish(
        hub,
        {"README.md": f"{card}---\n".encode(), "short.parquet": parquet(rows, "photo"),
         "long.parquet": parquet(captions(0, 2))},
    )  # fmt: skip
    columns = {"image": "photo", "question": "q", "answer": "a"}
    (record,) = read(f"{NAME}?config=short", columns=columns)
    assert record.turns[-1].text == "No."
    with pytest.raises(UserError, match=r"has 2 configs \('short', 'long'\); name one, e\.g\. hf:"):
        read(NAME)
    with pytest.raises(UserError, match=r"no config 'shorts'; it has .*did you mean 'short'\?"):
        read(f"{NAME}?config=shorts")


@pytest.mark.parametrize("streaming", [False, True])
def test_every_fault_of_the_hub_is_one_sentence_without_the_token(
    streaming: bool, scenes: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(scenes, {"a/train.parquet": b"no Parquet"}, name="me/broken")
    publish(scenes, {"train.parquet": parquet(captions(0, 1)), "test.parquet":
                     parquet(captions(0, 1))}, name="me/two")  # fmt: skip
    publish(scenes, {"train.parquet": parquet([{"a": 1}], None)}, name="me/columns")
    publish(scenes, {"train.parquet": parquet(captions(0, 1))}, name="me/gated")
    publish(scenes, {"notes.xyz": b""}, name="me/empty")
    scenes.gated.add("me/gated")
    for path, message in [
        ("me/none", "there is no such data set, or it is private"),
        ("me/gated", "the data set is gated; accept its terms"),
        ("me/scenes@v7", "the data set has no revision 'v7'"),
        ("me/two", r"has 2 splits \('train', 'test'\); name one, e\.g\. .*me/two\?split=train"),
        ("me/scenes?split=trian", r"no split 'trian'; it has 'train'; did you mean 'train'\?"),
        ("me/columns", "none of the known keys"),
        ("me/empty", "has no files that `datasets` can read"),
        ("me/broken", "`datasets` cannot read it"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            read_or_raise(f"hf://datasets/{path}", streaming)
        assert TOKEN not in str(raised.value) and "\n" not in str(raised.value)
    scenes.faults["me/scenes"] = 500
    _forget()
    with pytest.raises(UserError, match="the hub answered HTTP 500"):
        read(NAME, streaming=streaming)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub did not answer"):
        read(NAME, streaming=streaming)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        read(NAME, streaming=streaming)


def test_every_file_of_a_configuration_gets_its_commit(scenes: Hub) -> None:
    config = load_config("configs/tiny/stage2.yaml")
    files = {name: [DataFile(path=NAME)] for name in ("train", "eval", "eval_text")}
    config = config.model_copy(update={"data": config.data.model_copy(update=files)})
    first = hub_datasets.pinned(config, None)
    assert [file.path for file in first.data.files] == 3 * [f"{NAME}?commit={ONE}"]
    publish(scenes, {"train.parquet": parquet(captions(100, 60))}, TWO)
    _forget()
    assert hub_datasets.pinned(config, first) == first


def read_or_raise(path: str, streaming: bool) -> None:
    for record in open_records(DataFile(path=path, streaming=streaming)).conversations:
        if isinstance(record, RecordError):
            raise record


def test_without_the_library_the_command_that_installs_it_is_said(
    scenes: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'datasets' cannot be imported .*\[datasets\]"):
        read(NAME)


@pytest.mark.parametrize(
    "path",
    ["hf://me/scenes", "hf://datasets/scenes", f"{NAME}?slit=train", f"{NAME}@", f"{NAME}?x",
     f"{NAME}?split=a&split=b", f"{NAME}?split=train[:10]", f"{NAME}?commit=1"],
)  # fmt: skip
def test_a_wrong_address_is_refused_with_the_right_form(path: str) -> None:
    with pytest.raises(ValueError, match=r"expected hf://datasets/OWNER/NAME@REVISION\?config="):
        DataFile(path=path)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_stays_at_the_commit_of_its_first_start_and_refuses_another_revision(
    streaming: bool, scenes: Hub, tmp_path: Path
) -> None:
    settings = [f"data.train.0.path={NAME}", f"data.train.0.streaming={json.dumps(streaming)}",
                "data.eval=[]", "train.eval_every_steps=null", "train.eval_samples=0"]  # fmt: skip
    out = tmp_path / "run"
    run("stage1", out, *settings)
    assert load_stored_config(out / "config.yaml").data.train[0].path == f"{NAME}?commit={ONE}"
    trained, losses = (out / "trained.jsonl").read_bytes(), _losses(out)
    shutil.rmtree(out / "final")  # as a kill in step 3 leaves it
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    publish(scenes, {"train.parquet": parquet(captions(100, 60))}, TWO)  # someone pushes
    scenes.datasets["me/scenes"]["v2"] = scenes.datasets["me/scenes"][TWO]
    _forget()
    run("stage1", out, *settings)
    assert (out / "trained.jsonl").read_bytes() == trained and _losses(out) == losses
    with pytest.raises(ConfigError, match=r"(?s)data\.train\.0\.path.*scenes@v2"):
        run("stage1", out, *settings, f"data.train.0.path={NAME}@v2")


def _losses(out: Path) -> list[Any]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]
