"""Kept features: the same losses, the same faults, and nothing wrong survives on disk."""

import hashlib
import json
import multiprocessing
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.rounding import assert_near, rounding, terms_of, terms_of_a_run
from tests.tiny_runs import TINY, rows, run
from vlm_sft.data.feature_store import FeatureStore, disk_use, is_feature_cache, remove_stale
from vlm_sft.data.images import read_pixels
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.train import feature_cache
from vlm_sft.train.feature_cache import CacheEstimate
from vlm_sft.utils.ownership import MARKER

SHAPE = (9, 32)
DIGEST, OTHER = bytes(range(32)), bytes(32)


def store(folder: Path, **recipe: Any) -> FeatureStore:
    return FeatureStore(folder, recipe, shape=SHAPE, dtype=torch.bfloat16)


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def losses(out: Path) -> list[float]:
    found = [row.get("loss", row.get("eval_loss")) for row in rows(out / "metrics.jsonl")]
    assert len(found) >= 4
    return found


# --- the store


def test_features_come_back_bit_by_bit_and_under_their_own_recipe_only(tmp_path: Path) -> None:
    first = store(tmp_path, tower="a")
    assert not first.holds(DIGEST)
    first.write(DIGEST, features())
    assert first.holds(DIGEST) and not first.holds(OTHER)
    assert torch.equal(first.read(DIGEST), features())
    assert first.path(DIGEST).stat().st_size == first.entry_bytes()
    assert store(tmp_path, tower="a").holds(DIGEST)
    assert not store(tmp_path, tower="b").holds(DIGEST)
    wide = FeatureStore(tmp_path, {"tower": "a"}, shape=(9, 33), dtype=torch.bfloat16)
    assert not wide.holds(DIGEST)


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeroed", "gone", "text"])
def test_a_damaged_file_is_named_and_removed_and_never_read(tmp_path: Path, damage: str) -> None:
    kept = store(tmp_path)
    kept.write(DIGEST, features())
    path = kept.path(DIGEST)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1]
    elif damage == "flipped":
        data[-SHAPE[1] - 100] ^= 1
    elif damage == "zeroed":
        data = bytearray(len(data))
    elif damage == "text":
        data = bytearray(b"not features")
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=path.name) as caught:
        kept.read(DIGEST)
    assert caught.value.reason == "features_damaged" and not path.exists()
    kept.write(DIGEST, features())
    assert torch.equal(kept.read(DIGEST), features())


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for place in range(0, kept.entry_bytes(), 7):
        kept.write(DIGEST, features())
        data = bytearray(kept.path(DIGEST).read_bytes())
        data[place] ^= 0x55
        kept.path(DIGEST).write_bytes(data)
        try:
            assert torch.equal(kept.read(DIGEST), features())  # white space of the header
        except UserError as error:
            assert error.reason == "features_damaged"


def test_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    kept = store(tmp_path)
    threads = [
        threading.Thread(target=lambda: [kept.write(DIGEST, features()) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(kept.read(DIGEST), features())
    assert [path.name for path in kept.folder.rglob("*") if path.is_file()] == [
        kept.path(DIGEST).name
    ]


def test_a_killed_process_leaves_whole_files_and_its_remains_are_cleared(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.describe()

    def fill() -> None:
        for number in range(10**6):
            kept.write(number.to_bytes(32, "big"), features())

    child = multiprocessing.get_context("fork").Process(target=fill)
    child.start()
    while not kept.holds((20).to_bytes(32, "big")):
        assert child.is_alive()
    child.kill()
    child.join()
    whole = list(kept.folder.rglob("*.safetensors"))
    assert len(whole) > 20
    for path in whole:
        assert torch.equal(kept.read(bytes.fromhex(path.stem)), features())
    begun = f".{DIGEST.hex()}.safetensors"
    old, young = (kept.folder / "00" / f"{begun}.{end}_123.tmp" for end in ("aged", "mine"))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    rest = sum(path.stat().st_size for path in kept.folder.rglob("*.tmp") if path != old)
    recipe = (kept.folder / "recipe.json").stat().st_size
    assert disk_use(tmp_path) == len(whole) * kept.entry_bytes() + rest + recipe
    assert old.exists(), "measuring deletes nothing"
    remove_stale(tmp_path)
    assert disk_use(tmp_path) == len(whole) * kept.entry_bytes() + rest + recipe
    assert young.exists() and not old.exists()


def test_files_of_others_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.describe()
    kept.write(DIGEST, features())
    before = disk_use(tmp_path)
    name = f".{DIGEST.hex()}.safetensors.abcdefgh.tmp"
    elsewhere = tmp_path / "photos" / "00"
    names = (tmp_path / name, tmp_path / "notes.tmp", elsewhere / name, elsewhere / ".x.tmp")
    inside = (kept.folder / "mine.tmp", kept.folder / "00" / "mine.tmp", kept.folder / "big.bin")
    for path in (*names, *inside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    (tmp_path / ("0" * 16)).symlink_to(kept.folder)
    assert disk_use(tmp_path) == before
    remove_stale(tmp_path)
    assert all(path.read_bytes() == b"mine" for path in (*names, *inside))


def test_a_directory_with_files_of_others_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"data\.feature_cache .* was not created by vlm_sft"):
        store(tmp_path).describe()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_cache_without_a_marker_is_used_as_before(tmp_path: Path) -> None:
    store(tmp_path).describe()
    (tmp_path / MARKER).unlink()
    store(tmp_path).describe()
    assert (tmp_path / MARKER).exists()


# --- whether it pays


ESTIMATE = CacheEstimate(
    tower_flops=2.0,
    record_flops=8.0,
    records=100.0,
    crops=100.0,
    missing=100,
    missing_crops=100,
    epochs=3.0,
    num_bytes=2_500_000_000,
)


def test_worth_counts_the_tower_and_the_pass_that_fills_the_cache() -> None:
    assert ESTIMATE.tower_share == pytest.approx(0.2)
    assert ESTIMATE.break_even_epochs == pytest.approx(1.0)
    assert ESTIMATE.saved == pytest.approx(2 * 200 / 3000)
    assert "20.0% of a step" in str(ESTIMATE) and "2.5 GB" in str(ESTIMATE)
    assert "saves about 13.3%" in str(ESTIMATE)
    once = replace(ESTIMATE, epochs=0.5)
    assert once.saved == pytest.approx(-100 / 500)
    assert "costs about 20.0% more" in str(once)
    shared = replace(ESTIMATE, missing_crops=25, epochs=1.0)
    assert (shared.break_even_epochs, shared.saved) == (0.25, pytest.approx(150 / 1000))


# --- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 without a cache, with an empty one, and with what that one holds."""
    made = tmp_path_factory.mktemp("runs")
    cache = f"data.feature_cache={made / 'kept'}"
    for name, overrides in {"without": [], "filling": [cache], "filled": [cache]}.items():
        assert run("stage1", made / name, "train.eval_every_steps=2", *overrides) == 0
    return made


def test_a_run_from_kept_features_has_the_losses_of_one_from_images(folder: Path) -> None:
    without = losses(folder / "without")
    bound = rounding(terms_of_a_run())
    assert losses(folder / "filling") == pytest.approx(without, rel=bound)
    assert losses(folder / "filled") == pytest.approx(without, rel=bound)


def test_a_run_notes_what_the_cache_costs_and_saves(folder: Path) -> None:
    filling, filled = (
        json.loads((folder / name / "feature_cache.json").read_text())
        for name in ("filling", "filled")
    )
    assert filling["missing"] > 0 == filled["missing"]
    assert filled["saved"] == pytest.approx(filled["tower_share"]) and filled["saved"] > 0
    assert filling["saved"] < filled["saved"]
    assert not (folder / "without" / "feature_cache.json").exists()


def test_not_more_workers_than_cores_fill_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    options = [f"data.feature_cache={tmp_path / 'kept'}", "data.num_workers=2"]
    with warnings.catch_warnings():  # torch warns of more
        warnings.filterwarnings("error", message="This DataLoader will create")
        assert run("stage1", tmp_path / "out", "train.max_steps=1", *options) == 0


def test_kept_features_are_those_of_the_tower(folder: Path) -> None:
    (recipe,) = (path for path in (folder / "kept").iterdir() if path.is_dir())
    described = json.loads((recipe / "recipe.json").read_text())
    assert described["image_processing"] == "fast" and described["dtype"] == "torch.float32"
    vlm = load_checkpoint(folder / "without", device="cpu")
    kept = FeatureStore(
        folder / "kept",
        {k: v for k, v in described.items() if k not in ("shape", "dtype")},
        shape=(9, 32),
        dtype=torch.float32,
    )
    image = next((TINY / "data").rglob("*.png"))
    pixels = read_pixels(image, vlm.image_spec, vlm.image_aspect)
    found = kept.read(hashlib.sha256(image.read_bytes()).digest())
    tower = vlm.model.vision_tower
    assert_near(found, tower(pixels[None]), terms_of(tower.encoder, length=tower.num_tokens))


def own_data(tmp_path: Path, images: int = 8) -> tuple[str, Path]:
    """Eight records with an image each, as an override, and the folder of their images."""
    records = []
    for number in range(8):
        Image.new("RGB", (60, 40), (30 * number, 90, 10)).save(tmp_path / f"{number}.png")
        turns = [("human", "<image>\nWhat?"), ("gpt", f"Number {number}.")]
        records.append(
            {
                "id": str(number),
                "image": f"{number % images}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    (tmp_path / "records.json").write_text(json.dumps(records))
    return f"data.train=[{{path: {tmp_path / 'records.json'}}}]", tmp_path


def test_packed_records_that_share_an_image_find_its_kept_features(tmp_path: Path) -> None:
    data, _ = own_data(tmp_path, images=3)
    overrides = [data, "data.eval=[]", "train.eval_every_steps=null", "train.max_steps=2"]
    overrides += ["train.micro_batch_size=null", "train.packing.max_tokens=300"]
    overrides += ["train.share_image_prefix=true"]
    kept = f"data.feature_cache={tmp_path / 'kept'}"
    assert run("stage1", tmp_path / "without", *overrides) == 0
    assert run("stage1", tmp_path / "with", *overrides, kept) == 0
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 3
    without, found = (losses_of_one(tmp_path / name) for name in ("without", "with"))
    assert len(without) == 2 and found == pytest.approx(without, rel=rounding(terms_of_a_run()))


def test_a_changed_image_is_another_one_and_a_broken_one_stays_the_record_s_fault(
    tmp_path: Path,
) -> None:
    data, images = own_data(tmp_path)
    keep = f"data.feature_cache={tmp_path / 'kept'}"
    small = ["data.eval=[]", "train.max_steps=1", "train.eval_every_steps=null"]
    assert run("stage1", tmp_path / "one", data, keep, *small) == 0
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 8
    Image.new("RGB", (60, 40), "white").save(images / "3.png")
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:60])
    lenient = ["data.on_error=quarantine", "data.max_quarantined=1"]
    assert run("stage1", tmp_path / "two", data, keep, *lenient, *small) == 0
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 9
    quarantined = [
        r
        for r in rows(tmp_path / "two" / "ledger.jsonl")
        if r.get("bucket", "trained") != "trained"
    ]
    assert [(row["id"], row["reason"]) for row in quarantined] == [("4", "image_broken")]


def test_a_damaged_entry_stops_the_run_by_name_and_the_next_start_computes_it_again(
    tmp_path: Path,
) -> None:
    data, _ = own_data(tmp_path)
    overrides = [data, f"data.feature_cache={tmp_path / 'kept'}", "data.eval=[]"]
    overrides += ["train.max_steps=1", "train.eval_every_steps=null"]
    assert run("stage1", tmp_path / "one", *overrides) == 0
    entries = sorted((tmp_path / "kept").rglob("*.safetensors"))
    entries[0].write_bytes(b"short")  # seen at the start and computed again
    entries[1].write_bytes(entries[1].read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match=entries[1].name) as caught:
        run("stage1", tmp_path / "two", *overrides)
    assert caught.value.reason == "features_damaged"
    assert run("stage1", tmp_path / "two", *overrides) == 0
    assert losses_of_one(tmp_path / "two") == losses_of_one(tmp_path / "one")


def losses_of_one(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out / "metrics.jsonl") if "loss" in row]


def test_what_has_no_room_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = own_data(tmp_path)
    overrides = [data, f"data.feature_cache={tmp_path / 'kept'}", "data.eval=[]"]
    with pytest.raises(UserError, match=r"feature_cache_gb allows 1e-05 GB") as caught:
        run("stage1", tmp_path / "one", *overrides, "data.feature_cache_gb=0.00001")
    assert caught.value.reason == "feature_cache_full"
    monkeypatch.setattr(feature_cache, "free_bytes", lambda path: 100)
    with pytest.raises(UserError, match=r"0\.1 kB free") as caught:
        run("stage1", tmp_path / "two", *overrides)
    assert caught.value.reason == "feature_cache_full"
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_a_run_may_take_up_a_cache_on_its_way_only_by_name(folder: Path) -> None:
    changes = [f"data.feature_cache={folder / 'kept'}", "data.feature_cache_gb=3"]
    with pytest.raises(UserError, match=r"add --allow-change data.feature_cache;"):
        run("stage1", folder / "without", "train.eval_every_steps=2", *changes)


def test_a_file_of_others_with_a_features_name_is_kept(tmp_path: Path) -> None:
    kept = store(tmp_path)
    path = kept.path(DIGEST)
    path.parent.mkdir(parents=True)
    path.write_text("my notes")
    with pytest.raises(UserError, match=r"the file is now .*\.kept-1\. Repeat the command"):
        kept.read(DIGEST)
    assert path.with_name(f"{path.name}.kept-1").read_text() == "my notes" and not path.exists()


@pytest.mark.parametrize("text", ["[" * 200_000, "\xff", "[]"])
def test_a_damaged_recipe_makes_no_feature_cache(tmp_path: Path, text: str) -> None:
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef" / "recipe.json").write_text(text, encoding="latin-1")
    assert not is_feature_cache(tmp_path)


def test_a_pipe_with_a_recipes_name_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "0123456789abcdef").mkdir()
    os.mkfifo(tmp_path / "0123456789abcdef" / "recipe.json")
    assert not is_feature_cache(tmp_path)
