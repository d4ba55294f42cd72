"""Image files to pixels, for every format, mode, orientation, alpha channel and bit depth."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.data.conversation import ImageSource
from vlm_sft.data.image_layout import ImageLayout, LayoutRule
from vlm_sft.errors import ImageError
from vlm_sft.utils.image_paths import missing_image
from vlm_sft.utils.reading import NotARegularFile, open_regular
from vlm_sft.utils.tar_index import read_member

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are decoded, detected by content. Others (EPS, WMF, ...) can run programs."""

MAX_PIXELS: Final = 120_000_000
"""Images with more pixels are refused by their header, before anything is decoded."""

MAX_BYTES: Final = 512 * 2**20
"""Larger image files are refused unread; MAX_PIXELS without compression take fewer bytes."""

MAX_SIDE: Final = 65_535
"""Longest side in pixels, which is the limit of JPEG."""

_MAX_CANVAS: Final = 4096
"""Longest side of which the padded square is created; larger images are resized axis by axis."""

_FAST_INTERPOLATIONS: Final = ("bilinear", "bicubic")
"""Interpolations for which torch resizes bytes like Pillow."""

_MAX_WHOLE_RESIZE: Final = 64
"""Largest aspect ratio of which the whole image is resized and then cropped, as CLIPImageProcessor
does. Beyond it only the visible square is resized, because a 1 x N strip would become N times the
square. (The two differ by a few levels of 255: Pillow rounds between its two passes.)"""


@dataclass(frozen=True)
class ImageSpec:
    """The input that a vision tower expects; provided by the tower.

    Attributes:
        size: Side of the square input in pixels.
        mean: Subtracted from red, green, blue, each in 0..1.
        std: Divides red, green, blue after that.
        interpolation: How images are resized.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"


def open_image(source: ImageSource) -> Image.Image:
    """Return an image as 8-bit RGB, fully decoded and upright.

    Animations and multi-page files give their first frame. The EXIF orientation is applied. Alpha
    is composited on white, so that hidden colors never show. 16-bit and float gray is scaled, not
    clipped. CMYK and LAB are converted without a device profile.

    Raises:
        ImageError: `image_missing`, `image_not_file` (folder, pipe, device), `image_unreadable`
            (permissions, disk), `image_format` (none of FORMATS), `image_too_large` (over
            MAX_PIXELS or MAX_SIDE), `image_broken` (truncated or corrupt).
    """
    with _opened(source) as (file, name):
        return _decode(_read_header(file, name), name)


def thumbnail(source: ImageSource, side: int, *, quality: int = 80) -> bytes:
    """Return an image, upright and at most `side` pixels wide and high, as a JPEG file.

    Raises:
        ImageError: The image cannot be opened.
    """
    image = open_image(source)
    image.thumbnail((side, side))
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


class UprightSize(NamedTuple):
    """The size of an image as `open_image` returns it, and how EXIF orientation turned it."""

    width: int
    height: int
    turn: Literal["none", "sideways", "other"]


def upright_size(source: ImageSource) -> UprightSize:
    """Return the image's size from its header alone; broken pixel data is not detected.

    Raises:
        ImageError: As `open_image`, for errors of the header.
    """
    with _opened(source) as (file, name):
        image = _read_header(file, name)
        turn = _turn_of(image)
        width, height = image.size
    if turn in _SIDEWAYS:
        return UprightSize(height, width, "sideways")
    return UprightSize(width, height, "none" if turn is None else "other")


def read_pixels(
    source: ImageSource, spec: ImageSpec, aspect: ImageAspect, processing: ImageProcessing = "fast"
) -> Tensor:
    """Load an image as a tower's square input, uint8 [3, size, size], channels in RGB order.

    Args:
        source: A file or its bytes.
        spec: The tower's input. Mean and standard deviation are applied by the tower; here the
            mean is only the color of the padding.
        aspect: See `to_pixels`.
        processing: `exact` is `to_pixels(open_image(...))`. `fast` raises the same errors and
            differs by at most 2 levels of 255: libjpeg-turbo decodes ordinary JPEGs to the same
            bytes, and torch resizes in Pillow's fixed-point arithmetic. Everything else (other
            formats, modes and interpolations, damaged files, narrow crops, sides over 4,096) is
            processed as with `exact`.

    Raises:
        ImageError: As `open_image`.
    """
    return _square(_load(source, processing), spec, aspect, processing)


class ImageCrops(NamedTuple):
    """An image as the vision tower takes it.

    Attributes:
        pixels: uint8 [crops, 3, size, size], in the order of the layout.
        layout: How they become tokens.
    """

    pixels: Tensor
    layout: ImageLayout


def read_crops(
    source: ImageSource,
    rule: LayoutRule,
    spec: ImageSpec,
    aspect: ImageAspect,
    processing: ImageProcessing = "fast",
    *,
    num_images: int = 1,
) -> ImageCrops:
    """Load an image as the crops of its layout.

    Args:
        source: A file or its bytes.
        rule: Gives the layout.
        spec: See `read_pixels`.
        aspect: How an image that is not divided becomes square.
        processing: See `read_pixels`; `exact` gives the pixels of transformers' image processors
            for LLaVA-NeXT, LLaVA-OneVision and InternVL.
        num_images: Number of images in the record.

    Raises:
        ImageError: As `open_image`.
    """
    image = _load(source, processing)
    return _crops(image, rule, spec, aspect, processing, num_images)


def to_crops(
    image: Image.Image, rule: LayoutRule, spec: ImageSpec, aspect: ImageAspect
) -> ImageCrops:
    """Return the crops of an image from `open_image`, made by Pillow; see `read_crops`."""
    return _crops(np.array(image), rule, spec, aspect, "exact", 1)


def _crops(
    image: np.ndarray,
    rule: LayoutRule,
    spec: ImageSpec,
    aspect: ImageAspect,
    processing: ImageProcessing,
    num_images: int,
) -> ImageCrops:
    layout = rule.layout(image.shape[1], image.shape[0], num_images=num_images)
    if layout.tiles is None:
        return ImageCrops(_square(image, spec, aspect, processing)[None], layout)
    tiles = _tiles(image, layout, spec, processing)
    if layout.overview == "none":
        return ImageCrops(tiles, layout)
    overview = _resized(image, (spec.size, spec.size), spec, processing)[None]
    order = [overview, tiles] if layout.overview == "first" else [tiles, overview]
    return ImageCrops(torch.cat(order), layout)


def read_bytes(source: ImageSource) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: `image_missing`, `image_not_file` or `image_unreadable`.
    """
    if isinstance(source, bytes):
        return source
    with _open_bytes(source, str(source)) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(str(source), error) from None


def to_pixels(image: Image.Image, spec: ImageSpec, aspect: ImageAspect) -> Tensor:
    """Convert an image from `open_image` to a square by Pillow, uint8 [3, size, size].

    `pad` pastes the whole image on a square of color int(255 * mean) at offset
    floor((max - min) / 2), and resizes the square (LLaVA, `llava/mm_utils.py:expand2square`).
    `crop` resizes the short side to `size` and takes the center square (CLIPImageProcessor;
    LLaVA-1.5 stage 1).
    """
    resample = Image.Resampling[spec.interpolation.upper()]
    fit = _pad if aspect == "pad" else _crop
    return torch.from_numpy(np.array(fit(image, spec, resample))).permute(2, 0, 1).contiguous()


@contextmanager
def _opened(source: ImageSource) -> Iterator[tuple[IO[bytes], str]]:
    """Open an image with its name for messages; Pillow is strict meanwhile."""
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    with _open_bytes(source, name) as file, _strict_pillow():
        yield file, name


@contextmanager
def _open_bytes(source: ImageSource, name: str) -> Iterator[IO[bytes]]:
    with BytesIO(source) if isinstance(source, bytes) else _open_regular(source, name) as file:
        _refuse_too_many_bytes(file, name)
        yield file


def _open_regular(path: Path, name: str) -> IO[bytes]:
    try:
        inside = read_member(path)
        return open_regular(path) if inside is None else BytesIO(inside)
    except NotARegularFile as error:
        raise ImageError("image_not_file", str(error)) from None
    except FileNotFoundError:
        raise ImageError("image_missing", missing_image(path)) from None
    except OSError as error:
        raise _unreadable(name, error) from None


def _refuse_too_many_bytes(file: IO[bytes], name: str) -> None:
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if num_bytes > MAX_BYTES:
        raise ImageError(
            "image_too_large",
            f"{name}: {num_bytes:,} bytes; at most {MAX_BYTES:,} are accepted; shrink it",
        )


def _unreadable(name: str, error: Exception) -> ImageError:
    text = getattr(error, "strerror", None) or str(error)
    return ImageError("image_unreadable", f"{name}: cannot be read: {text}")


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Keep truncated files errors, whatever another library has set, and ignore warnings."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _read_header(file: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise ImageError("image_format", f"{name}: {_unknown_content(file)}") from None
    except MemoryError:
        raise _too_large(name) from None
    except Exception as error:  # a damaged header can make Pillow's readers raise anything
        raise _broken(name, error) from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")
    if width * height == 0:
        raise ImageError("image_broken", f"{name}: an image of {width} x {height} pixels")
    return image


def _unknown_content(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(16)
    if not head:
        return "the file is empty; it should be an image"
    return f"not an image of {', '.join(FORMATS)} (it begins with {head!r})"


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _upright(_to_rgb(image), image)
    except ImageError:
        raise
    except MemoryError:
        raise _too_large(name) from None
    except Exception as error:  # decoders have no common error type either
        raise _broken(name, error) from None


def _too_large(name: str, found: str = "a header that needs too much memory") -> ImageError:
    limits = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side are accepted"
    return ImageError("image_too_large", f"{name}: {found}; {limits}; shrink it")


def _broken(name: str, error: Exception) -> ImageError:
    return ImageError("image_broken", f"{name}: truncated or corrupt image ({error}); get it again")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _gray_of_any_depth(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


def _gray_of_any_depth(image: Image.Image) -> Image.Image:
    """Scale the range of a gray image to 0..255 (Pillow's own conversion clips at 255).

    16-bit modes have the range 0..65535. 32-bit and float modes declare none: it is the smallest
    of 0..1 (float), 0..255 and 0..65535 that contains every value, else minimum to maximum.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values that are not numbers")
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(values, image.mode)
    gray = np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    for full in (1.0, 255.0, 65535.0)[0 if mode == "F" else 1 :]:
        if low >= 0 and high <= full:
            return 0.0, full
    return low, max(high, low + 1)


_TURNS: Final[dict[object, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS: Final = tuple(_TURNS[number] for number in (5, 6, 7, 8))
"""Turns that swap width and height."""


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    turn = _turn_of(original)
    return rgb if turn is None else rgb.transpose(turn)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright; unreadable EXIF is ignored.

    `ImageOps.exif_transpose` also rewrites the whole EXIF block, and fails on images that are
    fine except for a damaged tag in it.
    """
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # ignore damaged metadata of a good image
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _crop(image: Image.Image, spec: ImageSpec, resample: Image.Resampling) -> Image.Image:
    size = spec.size
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) <= _MAX_WHOLE_RESIZE * size:
        whole = image.resize((width, height), resample)
        return whole.crop((left, top, left + size, top + size))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), resample, box=box)


def _pad(image: Image.Image, spec: ImageSpec, resample: Image.Resampling) -> Image.Image:
    (width, height), side, size = image.size, max(image.size), spec.size
    red, green, blue = (int(255 * value) for value in spec.mean)
    offset = ((side - width) // 2, (side - height) // 2)
    canvas_size = (side, side)
    if side > _MAX_CANVAS:  # the long axis first, because the square itself could take gigabytes
        wide = width >= height
        image = image.resize((size, height) if wide else (width, size), resample)
        canvas_size = (size, side) if wide else (side, size)
        offset = (0, offset[1]) if wide else (offset[0], 0)
    canvas = Image.new("RGB", canvas_size, (red, green, blue))
    canvas.paste(image, offset)
    return canvas.resize((size, size), resample)


def _load(source: ImageSource, processing: ImageProcessing) -> np.ndarray:
    """Return an image as `open_image` does, uint8 [H, W, 3]; `fast` decodes ordinary JPEGs itself.

    Raises:
        ImageError: As `open_image`.
    """
    with _opened(source) as (file, name):
        image = _read_header(file, name)
        plain = _decode_plain_jpeg(file, image) if processing == "fast" else None
        return np.array(_decode(image, name)) if plain is None else plain


def _square(
    image: np.ndarray, spec: ImageSpec, aspect: ImageAspect, processing: ImageProcessing
) -> Tensor:
    """Return uint8 [3, size, size] of uint8 [H, W, 3]; see `to_pixels`."""
    if processing == "fast" and _resizes_fast(image, spec, aspect):
        return (_pad_fast if aspect == "pad" else _crop_fast)(image, spec)
    return to_pixels(Image.fromarray(image), spec, aspect)


# --- crops of an image


def _tiles(
    image: np.ndarray, layout: ImageLayout, spec: ImageSpec, processing: ImageProcessing
) -> Tensor:
    """Return the tiles of an image row by row, uint8 [tiles, 3, size, size]."""
    assert layout.tiles is not None
    (rows, columns), size = layout.tiles, spec.size
    resized = _resized(image, layout.resized, spec, processing)
    (height, width), (top, left) = layout.resized, layout.offset
    canvas = torch.zeros(3, rows * size, columns * size, dtype=torch.uint8)
    canvas[:, top : top + height, left : left + width] = resized
    tiles = canvas.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    return tiles.reshape(rows * columns, 3, size, size)


def _resized(
    image: np.ndarray, size: tuple[int, int], spec: ImageSpec, processing: ImageProcessing
) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, height, width], without keeping the aspect ratio."""
    height, width = image.shape[:2]
    # Otherwise Pillow can resize vertically first, and torch never does: with the bytes clipped
    # between the two passes, they would differ by up to 20 levels.
    horizontal_first = height <= 2 * width and (
        size[0] >= height or size[0] * width >= size[1] * height
    )
    if processing == "fast" and spec.interpolation in _FAST_INTERPOLATIONS and horizontal_first:
        return _resize_fast(image, size, spec)
    resample = Image.Resampling[spec.interpolation.upper()]
    resized = Image.fromarray(image).resize((size[1], size[0]), resample)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


# --- fast processing


def _decode_plain_jpeg(file: IO[bytes], image: Image.Image) -> np.ndarray | None:
    """Decode an upright gray or color JPEG to uint8 [H, W, 3]; return None for everything else."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or _turn_of(image) is not None:
        return None
    file.seek(0)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(file.read(), colorspace="RGB", strict=True)
    except Exception:  # Pillow decides whether this is an error
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _resizes_fast(image: np.ndarray, spec: ImageSpec, aspect: ImageAspect) -> bool:
    height, width = image.shape[:2]
    if aspect == "pad":
        fits = max(height, width) <= _MAX_CANVAS
    else:  # for taller images Pillow resizes vertically first, and torch last
        fits = height <= 2 * width <= 2 * _MAX_WHOLE_RESIZE * height
    return fits and spec.interpolation in _FAST_INTERPOLATIONS


def _crop_fast(image: np.ndarray, spec: ImageSpec) -> Tensor:
    size, short = spec.size, min(image.shape[:2])
    height, width = (int(size * side / short) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    whole = _resize_fast(image, (height, width), spec)
    return whole[:, top : top + size, left : left + size].contiguous()


def _pad_fast(image: np.ndarray, spec: ImageSpec) -> Tensor:
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, 3), np.uint8)
    row = np.tile(np.array([int(255 * mean) for mean in spec.mean], np.uint8), (side, 1))
    canvas[:top] = canvas[top + height :] = row
    canvas[:, :left], canvas[:, left + width :] = row[:left], row[left + width :]
    canvas[top : top + height, left : left + width] = image
    return _resize_fast(canvas, (spec.size, spec.size), spec).contiguous()


def _resize_fast(image: np.ndarray, size: tuple[int, int], spec: ImageSpec) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, height, width] in channels-last memory format."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return interpolate(pixels, size=size, mode=spec.interpolation, antialias=True)[0]
