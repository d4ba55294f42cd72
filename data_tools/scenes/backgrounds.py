"""Backgrounds that look like places and surfaces: noise, horizons, walls, wood, water, lights."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Plane = NDArray[np.float32]
"""One value a pixel, [height, width]."""
Colors = NDArray[np.float32]
"""RGB in 0..255, [height, width, 3] (or [3])."""


def paint(
    width: int, height: int, rng: np.random.Generator, kinds: Sequence[str] = ()
) -> tuple[str, Image.Image]:
    """A background and the name of its kind; a pure function of `kinds` and `rng`'s state.

    It is painted at half size, enlarged, and given a film's grain.

    Args:
        width: Pixels.
        height: Pixels.
        rng: Where the randomness comes from.
        kinds: Keys of `KINDS` to choose from; empty means all of them.
    """
    kind = str(rng.choice(sorted(kinds or KINDS)))
    small = KINDS[kind](max(2, width // 2), max(2, height // 2), rng)
    image = _to_image(small)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * float(rng.uniform(1, 6))
    return kind, _to_image(np.asarray(image, dtype=np.float32) + grain)


def noise(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    cells: tuple[float, float] = (3, 3),
    octaves: int = 4,
) -> Plane:
    """Smooth noise in 0..1: random grids, each twice as fine and half as strong as the last.

    Args:
        width: Pixels.
        height: Pixels.
        rng: Where the randomness comes from.
        cells: Columns and rows of the coarsest grid.
        octaves: Number of grids.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        columns = min(width, max(2, round(cells[0] * 2**octave)))
        rows = min(height, max(2, round(cells[1] * 2**octave)))
        grid = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
        layer = grid.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float32) * 0.5**octave
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _color(rng: np.random.Generator, low: int = 40, high: int = 225) -> Colors:
    return rng.uniform(low, high, 3).astype(np.float32)


def _near(color: tuple[int, int, int], rng: np.random.Generator, spread: int = 25) -> Colors:
    return (np.array(color) + rng.uniform(-spread, spread, 3)).astype(np.float32)


def _blend(first: Colors, second: Colors, share: Plane) -> Colors:
    weight = share[..., None]
    return first * (1 - weight) + second * weight


def _ramp(width: int, height: int, angle: float) -> Plane:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along = x / width * np.cos(angle) + y / height * np.sin(angle)
    return ((along - along.min()) / max(float(np.ptp(along)), 1e-6)).astype(np.float32)


def _gradient(width: int, height: int, rng: np.random.Generator) -> Colors:
    share = _ramp(width, height, float(rng.uniform(0, 2 * np.pi)))
    return _blend(_color(rng), _color(rng), share)


def _clouds(width: int, height: int, rng: np.random.Generator) -> Colors:
    share = noise(width, height, rng, octaves=6)
    return _blend(_color(rng), _color(rng), share) + 30 * (
        noise(width, height, rng, cells=(5, 5))[..., None] - 0.5
    )


def _blobs(width: int, height: int, rng: np.random.Generator) -> Colors:
    canvas = _gradient(width, height, rng)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(int(rng.integers(3, 8))):
        center_x, center_y = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(0.15, 0.45) * max(width, height)
        near = np.exp(-((x - center_x) ** 2 + (y - center_y) ** 2) / radius**2)
        canvas = _blend(canvas, _color(rng), near.astype(np.float32) * 0.8)
    return canvas


def _over_horizon(above: Colors, below: Colors, rng: np.random.Generator, soft: int) -> Colors:
    height, width = above.shape[:2]
    level = float(rng.uniform(0.3, 0.65)) * height
    line = level + (noise(width, 2, rng, cells=(4, 2), octaves=4)[0] - 0.5) * soft
    rows = np.arange(height, dtype=np.float32)[:, None]
    return _blend(above, below, np.clip(rows - line[None, :], 0, 1).astype(np.float32))


def _sky(width: int, height: int, rng: np.random.Generator) -> Colors:
    sky = _blend(
        _near((90, 150, 215), rng), _near((190, 215, 235), rng), _ramp(width, height, 1.57)
    )
    clouds = np.clip(noise(width, height, rng, cells=(2, 4), octaves=5) * 2 - 1, 0, 1)
    return _blend(sky, _near((240, 240, 240), rng, 10), clouds * float(rng.uniform(0.2, 0.9)))


def _meadow(width: int, height: int, rng: np.random.Generator) -> Colors:
    blades = noise(width, height, rng, cells=(30, 8), octaves=4)
    grass = _blend(_near((50, 95, 35), rng), _near((130, 170, 75), rng), blades)
    return _over_horizon(_sky(width, height, rng), grass, rng, soft=height // 4)


def _desert(width: int, height: int, rng: np.random.Generator) -> Colors:
    dunes = noise(width, height, rng, cells=(2, 8), octaves=6)
    sand = _blend(_near((170, 130, 85), rng), _near((225, 195, 145), rng), dunes)
    return _over_horizon(_sky(width, height, rng), sand, rng, soft=height // 5)


def _water(width: int, height: int, rng: np.random.Generator) -> Colors:
    ripples = noise(width, height, rng, cells=(3, 18), octaves=4)
    return _blend(_near((25, 75, 110), rng), _near((125, 180, 200), rng), ripples)


def _wood(width: int, height: int, rng: np.random.Generator) -> Colors:
    y, _ = np.mgrid[0:height, 0:width].astype(np.float32)
    warp = noise(width, height, rng, cells=(2, 4), octaves=3)
    rings = 0.5 + 0.5 * np.sin(warp * float(rng.uniform(15, 40)) + y / height * 20)
    fibre = noise(width, height, rng, cells=(3, 60), octaves=2)
    share = (0.55 * rings + 0.45 * fibre).astype(np.float32)
    boards = _blend(_near((105, 65, 35), rng), _near((195, 145, 95), rng), share)
    plank = max(12, int(rng.uniform(0.15, 0.35) * height))
    rows = np.arange(height)
    boards += rng.uniform(-18, 18, height // plank + 1)[rows // plank][:, None, None]
    boards[rows % plank == 0] *= 0.45
    return boards.astype(np.float32)


def _brick(width: int, height: int, rng: np.random.Generator) -> Colors:
    brick_height = int(rng.integers(8, 20))
    brick_width = int(brick_height * rng.uniform(2.0, 2.8))
    y, x = np.mgrid[0:height, 0:width]
    row = y // brick_height
    shifted = x + (row % 2) * (brick_width // 2)
    column = shifted // brick_width
    shade = rng.uniform(-22, 22, (int(row.max()) + 1, int(column.max()) + 1))
    wall = _near((150, 80, 60), rng, 35) + shade[row, column][..., None]
    wall = wall + 35 * (noise(width, height, rng, cells=(20, 20), octaves=3)[..., None] - 0.5)
    mortar = (y % brick_height == 0) | (shifted % brick_width == 0)
    wall[mortar] = _near((185, 180, 170), rng, 20)
    return wall.astype(np.float32)


def _stripes(width: int, height: int, rng: np.random.Generator) -> Colors:
    ramp = _ramp(width, height, float(rng.uniform(0, np.pi)))
    stripes = (np.sin(ramp * float(rng.uniform(15, 70))) > 0).astype(np.float32)
    return _pattern(stripes, rng)


def _checker(width: int, height: int, rng: np.random.Generator) -> Colors:
    y, x = np.mgrid[0:height, 0:width]
    cell = int(rng.integers(8, 32))
    return _pattern(((x // cell + y // cell) % 2).astype(np.float32), rng)


def _pattern(share: Plane, rng: np.random.Generator) -> Colors:
    base = _color(rng, 60, 210)
    other = base + rng.uniform(15, 50) * rng.choice([-1.0, 1.0], 3)
    height, width = share.shape
    cloth = noise(width, height, rng, cells=(4, 4), octaves=6)[..., None] - 0.5
    return _blend(base, other.astype(np.float32), share) + 40 * cloth


def _gravel(width: int, height: int, rng: np.random.Generator) -> Colors:
    stones = noise(width, height, rng, cells=(width / 6, height / 6), octaves=2)
    base = _near((140, 130, 120), rng, 35)
    return base * (0.55 + 0.8 * stones[..., None])


def _bokeh(width: int, height: int, rng: np.random.Generator) -> Colors:
    dark, less_dark = _color(rng, 10, 70), _color(rng, 20, 110)
    canvas = _to_image(_blend(dark, less_dark, noise(width, height, rng)))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(int(rng.integers(12, 40))):
        radius = float(rng.uniform(0.01, 0.07)) * max(width, height)
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        red, green, blue = (int(value) for value in _color(rng, 120, 255))
        fill = (red, green, blue, int(rng.integers(50, 150)))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 3))))
    return np.asarray(canvas, dtype=np.float32)


def _room(width: int, height: int, rng: np.random.Generator) -> Colors:
    wall = _near((205, 195, 180), rng, 40) + 25 * (noise(width, height, rng)[..., None] - 0.5)
    floor = _wood(width, height, rng)
    light = _ramp(width, height, float(rng.uniform(0, 2 * np.pi)))[..., None]
    return _over_horizon(wall, floor, rng, soft=0) * (0.75 + 0.3 * light)


def _to_image(colors: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))


KINDS: Final[dict[str, Callable[[int, int, np.random.Generator], Colors]]] = {
    "meadow": _meadow,
    "desert": _desert,
    "water": _water,
    "wood": _wood,
    "brick": _brick,
    "room": _room,
    "bokeh": _bokeh,
    "clouds": _clouds,
    "gradient": _gradient,
    "blobs": _blobs,
    "checker": _checker,
    "stripes": _stripes,
    "gravel": _gravel,
}
