"""An image's name leads below its root, and a name that leads nowhere is explained."""

import os
from pathlib import Path

import pytest

from vlm_sft.errors import ImageError
from vlm_sft.utils.image_paths import (
    current_directory_hint,
    image_path,
    looked_for,
    nearest_existing,
)


def refused(root: Path, name: str, **settings: bool) -> str:
    with pytest.raises(ImageError) as caught:
        image_path(root, name, **settings)
    assert caught.value.reason == "image_path"
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "images").mkdir(parents=True)
    (tmp_path / "root" / "images" / "dog.jpg").write_bytes(b"dog")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "cat.jpg").write_bytes(b"cat")
    return tmp_path / "root"


@pytest.mark.parametrize(
    "name",
    [
        "..", "../x.jpg", "images/../../x.jpg", "/etc/passwd", "", ".", "images/..",
        "file:///etc/passwd", "file://server/a.jpg", "http://a/b.jpg", "https:/a/b.jpg",
        "s3://a/b.jpg", "a\0.jpg", "file:///a%00b", "a" * 5000,
    ],
)  # fmt: skip
def test_a_name_that_leads_out_of_the_root_or_is_no_name_is_refused(root: Path, name: str) -> None:
    for follow in (False, True):
        assert len(refused(root, name, follow_symlinks=follow)) < 1000


def test_names_below_the_root_are_accepted_however_they_are_written(root: Path) -> None:
    place = root / "images" / "dog.jpg"
    for name in ("images/dog.jpg", "./images//dog.jpg", str(place), place.as_uri()):
        assert image_path(root, name) == place
    assert image_path(root, "images/absent.jpg") == root / "images" / "absent.jpg"


def test_a_link_out_of_the_root_is_refused_by_the_name_of_its_switch(root: Path) -> None:
    (root / "file.jpg").symlink_to(root.parent / "store" / "cat.jpg")
    (root / "folder").symlink_to(root.parent / "store")
    (root / "broken.jpg").symlink_to("/nowhere/x.jpg")
    for name in ("file.jpg", "folder/cat.jpg", "broken.jpg"):
        message = refused(root, name)
        assert "follow_symlinks: true" in message and "--follow-symlinks" in message
        assert image_path(root, name, follow_symlinks=True) == root / name


def test_links_within_the_root_and_a_root_that_is_a_link_are_accepted(root: Path) -> None:
    (root / "again.jpg").symlink_to("images/dog.jpg")
    assert image_path(root, "again.jpg") == root / "again.jpg"
    link = root.parent / "link"
    link.symlink_to(root)
    assert image_path(link, "images/dog.jpg").read_bytes() == b"dog"
    assert image_path(link, str(root / "images" / "dog.jpg")).read_bytes() == b"dog"
    refused(link, "../store/cat.jpg")


@pytest.mark.parametrize(
    ("existing", "requested", "difference"),
    [
        ("Café.jpg", "Cafe\u0301.jpg", "Unicode form (NFD and NFC)"),
        ("Dog.JPG", "dog.jpg", "upper and lower case"),
        ("a/dog.jpg", "a\\dog.jpg", "backslashes instead of slashes"),
        ("A/dog.jpg", "a/dog.jpg", "upper and lower case"),
        ("dog.jpg", "dog.jpg ", "leading or trailing spaces"),
        ("dog.jpg", "coco/train/dog.jpg", "the extra folder 'coco/train'"),
        ("train/dog.jpg", "dog.jpg", "the missing folder 'train'"),
        ("dog.jpg", "dog.jpeg", "the extension (.jpeg and .jpg)"),
        ("0000123.jpg", "000123.jpg", "spelling"),
        ("images/dog.jpg", "image/dog.jpg", "spelling"),
    ],
)
def test_a_missing_name_is_explained_by_the_nearest_one(
    tmp_path: Path, existing: str, requested: str, difference: str
) -> None:
    (tmp_path / existing).parent.mkdir(exist_ok=True)
    (tmp_path / existing).write_bytes(b"")
    found = nearest_existing(tmp_path / requested)
    assert found.endswith(f"exists, which differs in {difference}")


def test_nothing_near_gives_no_hint_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_bytes(b"")
    for name in ("x/y/z.jpg", "dog.jpg", "a" * 400, "a\0b"):
        assert nearest_existing(tmp_path / name) == ""


def test_a_name_with_another_number_is_not_taken_for_a_misspelt_one(tmp_path: Path) -> None:
    for name in ("000000007991.jpg", "img_12.png"):
        (tmp_path / name).write_bytes(b"")
    for name in ("000000000999.jpg", "img_13.png", "img_2.png"):
        assert nearest_existing(tmp_path / name) == ""
    assert "'img_12.png' exists" in nearest_existing(tmp_path / "imgs_12.png")


def test_a_missing_folder_is_explained_by_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert "'images' exists" in nearest_existing(tmp_path / "image")


def test_a_relative_path_names_the_directory_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert os.path.realpath(tmp_path) in current_directory_hint("data.json")
    assert current_directory_hint("/data.json") == ""


def test_a_missing_path_is_said_with_its_place_and_never_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.csv").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "photos")
    place = f" (looked for {tmp_path}/"
    assert (
        looked_for("../phottos") == f"{place}phottos); 'photos' exists, which differs in spelling"
    )
    assert looked_for("../photos.csv") == f"{place}photos.csv), which is a file"
    assert looked_for("../photos") == f"{place}photos), which is a folder"
    assert looked_for("../gone") == f"{place}gone), which is a symbolic link to nothing"
    assert looked_for("../others") == f"{place}others)"
    monkeypatch.chdir(tmp_path)
    assert "'photos' exists" in nearest_existing("photo", folder=True)
    for name in ("photos.tsv", "photos", "owner/" + "long" * 100):
        assert nearest_existing(name, folder=True) == ""
