import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import make_scenes
from data_tools.scenes import art, backgrounds
from data_tools.scenes import captions as scene_captions
from data_tools.scenes.compose import Scene, SceneSettings, compose, scene_rng
from vlm_sft.errors import UserError
from vlm_sft.utils import words

pytest.importorskip("resvg_py", reason="needs the extra 'demo'")


def _settings(artist: str = "openmoji", **changes: Any) -> SceneSettings:
    values = {"artist": artist, "seed": 3, "max_side": 160, "categories": art.load_categories()}
    return SceneSettings(**(values | changes))


def _scenes(count: int, **changes: Any) -> list[Scene]:
    chosen = _settings(**changes)
    return [compose(chosen, index) for index in range(1, count + 1)]


def _line(out: Path, *extra: str) -> list[str]:
    fixed = ["--artist", "twemoji", "--count", "4", "--seed", "1", "--max-side", "128"]
    return ["--out", str(out), *fixed, "--workers", "1", *extra]


@pytest.mark.parametrize("artist", sorted(art.ARTISTS))
def test_every_category_is_drawn_by_both_artists(artist: str) -> None:
    categories = art.load_categories()
    art.check_drawings(art.ARTISTS[artist], categories)
    assert len(categories) >= 24
    for category in categories:
        for code in category.code_points:
            solid = np.asarray(art.glyph(artist, code, 64).getchannel("A")) > 127
            assert solid.mean() > 0.1


def test_masks_of_different_objects_share_no_pixel_and_lie_in_the_image() -> None:
    for scene in _scenes(12):
        total = np.zeros((scene.height, scene.width), dtype=int)
        for instance in scene.instances:
            assert instance.mask.shape == (scene.height, scene.width)
            assert instance.mask.any()
            total += instance.mask
        assert total.max(initial=0) <= 1
        assert scene.instances, "an image shows something"


def test_what_is_drawn_is_what_the_masks_say() -> None:
    """A scene with objects and without differs in the masks' pixels, and hardly elsewhere."""
    chosen = _settings(max_side=320)
    for index in range(1, 5):
        scene = compose(chosen, index)
        rng = scene_rng(chosen.seed, index)
        rng.integers(9)  # the size
        _, empty = backgrounds.paint(scene.width, scene.height, rng)
        drawn = np.asarray(Image.open(io.BytesIO(scene.jpeg)), dtype=int)
        changed = np.abs(drawn - np.asarray(empty, dtype=int)).max(axis=2) > 40
        mask = np.logical_or.reduce([instance.mask for instance in scene.instances])
        assert changed[mask].mean() > 0.5
        assert changed[~mask].mean() < 0.05


def test_captions_name_all_and_only_what_is_there() -> None:
    names = [category.name for category in art.load_categories()]
    for scene in _scenes(25, max_instances=3):
        captions = scene_captions.describe(scene, scene_rng(3, scene.index, 1))
        assert len(captions) == 5 == len(set(captions))
        there = [instance.category.name for instance in scene.instances]
        crowds = {i.category.name for i in scene.instances if i.crowd}
        for caption in captions:
            for name in names:
                said = f" {name} " in f" {caption.lower()} ".translate(_PUNCTUATION) or (
                    f" {words.plural(name)} " in f" {caption.lower()} ".translate(_PUNCTUATION)
                )
                assert not said or name in there, caption
        full = [c for c in captions if " left " not in c]
        assert len(full) >= 4
        for caption in full:
            for name in set(there) - crowds:
                assert words.counted(name, there.count(name)) in caption.lower()


_PUNCTUATION = str.maketrans(",.", "  ")


def test_a_crowd_is_one_annotation(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    make_scenes.main(_line(out, "--crowd-share", "1", "--categories", "dog,cat"))
    document = json.loads((out / "annotations" / "instances_twemoji.json").read_text())
    crowds = Counter(entry["image_id"] for entry in document["annotations"] if entry["iscrowd"])
    assert crowds and set(crowds.values()) == {1}


def test_files_have_cocos_form_and_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        assert make_scenes.main([*_line(tmp_path / name), "--workers", workers]) == 0
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 4 + 5  # images; instances, captions, settings, attribution, marker
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    document = json.loads((tmp_path / "one/annotations/instances_twemoji.json").read_text())
    assert set(document) == {"info", "licenses", "images", "annotations", "categories"}
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    for image in document["images"]:
        with Image.open(tmp_path / "one" / "images" / image["file_name"]) as opened:
            assert opened.size == sizes[image["id"]]
            assert max(opened.size) <= 128
    for entry in document["annotations"]:
        left, top, width, height = entry["bbox"]
        assert left >= 0 and top >= 0
        assert left + width <= sizes[entry["image_id"]][0]
        assert top + height <= sizes[entry["image_id"]][1]
        assert 0 < entry["area"] <= width * height
    captions = json.loads((tmp_path / "one/annotations/captions_twemoji.json").read_text())
    assert len(captions["annotations"]) == 20
    assert "CC BY 4.0" in (tmp_path / "one" / "ATTRIBUTION.md").read_text()


def test_a_finished_folder_says_so_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scenes"
    make_scenes.main(_line(out))
    before = (out / "settings.json").stat().st_mtime_ns
    assert make_scenes.main(_line(out)) == 0
    assert "done already" in capsys.readouterr().out
    assert (out / "settings.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings \\(augment differ\\)"):
        make_scenes.main(_line(out, "--augment", "0"))
    (out / "images" / "000000000002.jpg").unlink()
    make_scenes.main(_line(out))
    assert (out / "images" / "000000000002.jpg").is_file()


def test_objects_that_would_hide_too_much_of_others_are_left_out() -> None:
    large = dict(min_objects=3, max_objects=3, max_instances=1, min_scale=0.7, max_scale=0.8)
    loose, strict = (
        sum(
            len(scene.instances)
            for scene in _scenes(8, crowd_share=0, visible_share=share, **large)
        )
        for share in (0.3, 0.95)
    )
    assert 8 <= strict < loose <= 24


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--categories", "dog,unicorn"), "'unicorn' is not in the table"),
        (("--categories", ""), "--categories: found '', which names none"),
        (("--categories", " , "), "--categories: found ' , ', which names none"),
        (("--out", ""), "--out: the name is empty"),
        (("--augment", "2"), "--augment 2: expected 0 or more and at most 1"),
        (("--min-objects", "5", "--max-objects", "4"), "--max-objects 4: expected 5 to 24"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, extra: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scenes.main(_line(tmp_path / "scenes", *extra))


@pytest.mark.parametrize("document", [[], ["dog"], {"categories": "dog"}, {"categories": ["dog"]}])
def test_a_file_of_another_form_is_no_table_of_categories(tmp_path: Path, document: Any) -> None:
    (tmp_path / "table.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="expected an object with a list of objects under 'categ"):
        make_scenes.main(_line(tmp_path / "scenes", "--categories", str(tmp_path / "table.json")))


def test_only_the_chosen_backgrounds_are_painted() -> None:
    chosen = ("meadow", "water")
    assert {scene.background for scene in _scenes(12, backgrounds=chosen)} == set(chosen)


def test_an_unknown_background_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--backgrounds moon: expected some of"):
        make_scenes.main(_line(tmp_path / "out", "--backgrounds", "water,moon"))
