"""One image composed of drawings, with the exact truth about what is visible where."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_tools.scenes import art, backgrounds
from data_tools.scenes.art import SceneCategory

Mask = NDArray[np.bool_]
"""Which pixels are the object's, [height, width]."""

COCO_SIZES: Final = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 375),
                     (612, 612), (640, 360), (640, 512))  # fmt: skip
"""Widths and heights that are common in COCO."""
COCO_MAX_SIDE: Final = 640
JPEG_QUALITY: Final = 90
CROWD_SIZES: Final = (6, 12)
TRIES: Final = 12


@dataclass(frozen=True)
class SceneSettings:
    """Everything a scene depends on, besides its index.

    Attributes:
        artist: A key of `art.ARTISTS`.
        seed: Scenes are a pure function of (settings, index).
        categories: What may be drawn.
        min_objects: Fewest different categories in an image.
        max_objects: Most different categories in an image.
        max_instances: Most objects of one category, crowds aside.
        min_scale: Smallest objects' longer side, as a share of the image's shorter side.
        max_scale: The same of the largest objects; sizes are spread evenly on a logarithmic scale.
        max_side: Longer side of the largest image, pixels; the others shrink by the same share.
        augment: 0 draws objects as the artist did; 1 varies color, tilt and sharpness strongly.
        crowd_share: Share of images with one clump of many objects of a kind.
        visible_share: At least this share of an object's pixels stays visible; what would cover
            more of it is left out.
        backgrounds: Kinds of `backgrounds.KINDS` to paint; empty means all.
    """

    artist: str
    seed: int
    categories: tuple[SceneCategory, ...] = field(repr=False)
    min_objects: int = 1
    max_objects: int = 4
    max_instances: int = 3
    min_scale: float = 0.2
    max_scale: float = 0.55
    max_side: int = COCO_MAX_SIDE
    augment: float = 0.5
    crowd_share: float = 0.05
    visible_share: float = 0.6
    backgrounds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """An object, or a clump of many (`crowd`), and its visible pixels."""

    category: SceneCategory
    mask: Mask
    crowd: bool = False

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, width and height of the visible pixels, in pixels."""
        rows = np.flatnonzero(self.mask.any(axis=1))
        columns = np.flatnonzero(self.mask.any(axis=0))
        left, top = float(columns[0]), float(rows[0])
        return left, top, float(columns[-1] + 1) - left, float(rows[-1] + 1) - top


@dataclass(frozen=True)
class Scene:
    """A finished image: JPEG bytes and what is in it, back to front."""

    index: int
    width: int
    height: int
    jpeg: bytes
    background: str
    instances: tuple[Instance, ...]


class _Layer:
    """An object on the canvas: where its pixels were, and which of them can still be seen."""

    def __init__(self, category: SceneCategory, group: int, full: Mask) -> None:
        self.category = category
        self.group = group
        self.visible = full.copy()
        self.full_area = int(full.sum())


def scene_rng(seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """The generator of one scene; no scene's randomness depends on another's."""
    return np.random.default_rng([seed, index, purpose])


def compose(settings: SceneSettings, index: int) -> Scene:
    """Draw scene `index`: the same bytes and truth whoever asks and in whatever order."""
    rng = scene_rng(settings.seed, index)
    width, height = _size(settings.max_side, rng)
    background, canvas = backgrounds.paint(width, height, rng, settings.backgrounds)
    layers: list[_Layer] = []
    crowds: set[int] = set()
    for group, category in enumerate(_choose(settings, rng)):
        if group == 0 and rng.random() < settings.crowd_share:
            crowds.add(group)
            _add_crowd(canvas, layers, settings, category, group, rng)
            continue
        scale = float(np.exp(rng.uniform(np.log(settings.min_scale), np.log(settings.max_scale))))
        for _ in range(_how_many(settings.max_instances, rng)):
            _add(canvas, layers, settings, category, group, scale * rng.uniform(0.85, 1.15), rng)
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Scene(index, width, height, buffer.getvalue(), background, _instances(layers, crowds))


def _size(max_side: int, rng: np.random.Generator) -> tuple[int, int]:
    width, height = COCO_SIZES[int(rng.integers(len(COCO_SIZES)))]
    scale = max_side / COCO_MAX_SIDE
    return round(width * scale), round(height * scale)


def _choose(settings: SceneSettings, rng: np.random.Generator) -> Sequence[SceneCategory]:
    known = len(settings.categories)
    number = int(rng.integers(settings.min_objects, min(settings.max_objects, known) + 1))
    return [settings.categories[i] for i in rng.choice(known, size=number, replace=False)]


def _how_many(most: int, rng: np.random.Generator) -> int:
    weights = 0.5 ** np.arange(most)
    return 1 + int(rng.choice(most, p=weights / weights.sum()))


def _add_crowd(
    canvas: Image.Image,
    layers: list[_Layer],
    settings: SceneSettings,
    category: SceneCategory,
    group: int,
    rng: np.random.Generator,
) -> None:
    """Clump small objects around one point; a member may touch and cover its neighbors."""
    width, height = canvas.size
    center = (float(rng.uniform(0.3, 0.7)) * width, float(rng.uniform(0.3, 0.7)) * height)
    scale = float(rng.uniform(0.12, 0.2))
    for _ in range(int(rng.integers(CROWD_SIZES[0], CROWD_SIZES[1] + 1))):
        _add(canvas, layers, settings, category, group, scale, rng, near=center)


def _add(
    canvas: Image.Image,
    layers: list[_Layer],
    settings: SceneSettings,
    category: SceneCategory,
    group: int,
    scale: float,
    rng: np.random.Generator,
    near: tuple[float, float] | None = None,
) -> None:
    """Put one object on top if a place is found where everything below stays visible enough."""
    width, height = canvas.size
    drawing = _drawing(settings, category, round(scale * min(width, height)), rng)
    solid = np.asarray(drawing.getchannel("A")) > 127
    if drawing.width >= width or drawing.height >= height or not solid.any():
        return
    for _ in range(TRIES):
        if near is None:
            left = int(rng.integers(0, width - drawing.width))
            top = int(rng.integers(0, height - drawing.height))
        else:
            spread = 1.2 * max(drawing.size)
            left = int(near[0] + rng.normal(0, spread) - drawing.width / 2)
            top = int(near[1] + rng.normal(0, spread * 0.7) - drawing.height / 2)
            left = min(max(left, 0), width - drawing.width)
            top = min(max(top, 0), height - drawing.height)
        full = np.zeros((height, width), dtype=np.bool_)
        full[top : top + drawing.height, left : left + drawing.width] = solid
        if all(
            np.count_nonzero(layer.visible & ~full) >= settings.visible_share * layer.full_area
            for layer in layers
        ):
            for layer in layers:
                layer.visible &= ~full
            layers.append(_Layer(category, group, full))
            canvas.paste(drawing, (left, top), drawing)
            return


def _drawing(
    settings: SceneSettings, category: SceneCategory, side: int, rng: np.random.Generator
) -> Image.Image:
    """One of the category's drawings, its longer side about `side` pixels, lightly varied."""
    code = str(rng.choice(category.code_points))
    image = art.glyph(settings.artist, code, max(128, settings.max_side // 2))
    share = max(side, 12) / max(image.size)
    size = (max(4, round(image.width * share)), max(4, round(image.height * share)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = float(rng.uniform(-1, 1)) * 20 * min(1.0, 2 * settings.augment)
    if abs(angle) > 1:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        image = image.crop(image.getchannel("A").getbbox())
    image = _recolor(image, settings.augment, rng)
    if rng.random() < 0.3 * settings.augment:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    return image


def _recolor(image: Image.Image, augment: float, rng: np.random.Generator) -> Image.Image:
    """Turn the hue, stretch saturation, brightness and contrast, all within `augment`."""
    angle = float(rng.normal(0, 0.35)) * augment
    saturation = float(np.exp(rng.normal(0, 0.4) * augment))
    brightness = float(rng.normal(0, 30)) * augment
    contrast = float(np.exp(rng.normal(0, 0.25) * augment))
    if augment == 0:
        return image
    gray = np.full((3, 3), 1 / 3)
    # Rotation about the gray axis (Rodrigues' formula), saturation as the share off that axis.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * (np.eye(3) - gray) + np.sin(angle) * cross
    matrix = contrast * (gray + saturation * turn)
    shift = 128 * (1 - contrast) + brightness
    rows = np.concatenate((matrix, np.full((3, 1), shift)), axis=1)
    changed = image.convert("RGB").convert("RGB", tuple(rows.ravel().tolist()))
    changed.putalpha(image.getchannel("A"))
    return changed


def _instances(layers: Sequence[_Layer], crowds: set[int]) -> tuple[Instance, ...]:
    instances = [
        Instance(layer.category, layer.visible) for layer in layers if layer.group not in crowds
    ]
    for group in sorted(crowds):
        members = [layer for layer in layers if layer.group == group]
        if len(members) >= CROWD_SIZES[0] - 1:
            mask = np.logical_or.reduce([layer.visible for layer in members])
            instances.insert(0, Instance(members[0].category, mask, crowd=True))
        else:
            instances = [Instance(layer.category, layer.visible) for layer in members] + instances
    return tuple(instances)
