import os
import socket
import struct
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPImageProcessorPil

from vlm_sft.config.fields import ImageAspect
from vlm_sft.data import images
from vlm_sft.data.images import ImageSpec, open_image, read_pixels, to_pixels
from vlm_sft.errors import ImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageSpec(size=336, mean=MEAN, std=STD, interpolation="bicubic")
SMALL = ImageSpec(size=14, mean=MEAN, std=STD, interpolation="bicubic")
UNIT = ImageSpec(size=2, mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colors with an edge and some noise, as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / max(width, 2), y * 255 / max(height, 2), (x + y) % 256], axis=-1)
    base[height // 3 : height // 2] = 255 - base[height // 3 : height // 2]
    noise = np.random.default_rng(seed).normal(0, 12, base.shape)
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def levels(normalized: torch.Tensor) -> torch.Tensor:
    """What a stock processor gave, back in 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.as_tensor(normalized) * std + mean) * 255


def refused(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value.reason


def first_pixel(source: object) -> tuple[int, ...]:
    image = open_image(source)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("format", FORMATS)
def test_every_accepted_format_opens_whatever_the_file_is_called(tmp_path, format):
    (tmp_path / "image.txt").write_bytes(encode(photo(40, 30), format))
    image = open_image(tmp_path / "image.txt")
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_what_is_no_image_file_is_refused_by_kind_and_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    start = time.monotonic()
    assert refused(tmp_path / "none.png") == "image_missing"
    assert refused(tmp_path / "dangling.png") == "image_missing"
    assert refused(tmp_path) == "image_not_file"
    assert refused(tmp_path / "pipe") == "image_not_file"
    assert refused(tmp_path / "empty.png") == "image_format"
    assert refused(tmp_path / "page.jpg") == "image_format"
    assert refused(tmp_path / ("long" * 100)) == "image_unreadable"
    assert refused(tmp_path / "page.jpg" / "inside") == "image_unreadable"
    assert refused(tmp_path / "nul\0byte.png") == "image_unreadable"
    assert time.monotonic() - start < 2


def test_devices_and_sockets_are_refused(tmp_path, monkeypatch):
    assert refused(Path("/dev/zero")) == "image_not_file"
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert refused(tmp_path / "socket") == "image_not_file"


def test_formats_that_run_programs_are_never_tried():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert refused(postscript) == "image_format"
    assert refused(encode(photo(8, 8), "PPM")) == "image_format"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("progressive", [False, True])
def test_an_image_cut_anywhere_is_refused_or_whole(format, progressive):
    options = {"progressive": True} if format == "JPEG" and progressive else {}
    data = encode(photo(90, 70), format, **options)
    whole = np.asarray(open_image(data))
    for tenth in range(10):
        cut = data[: len(data) * tenth // 10 + 3]
        assert refused(cut) in ("image_broken", "image_format", "image_too_large")
    for cut in (data[:-1], data[:-2], data[:-20]):
        try:
            image = open_image(cut)
        except ImageError:
            continue
        np.testing.assert_array_equal(np.asarray(image), whole)


def test_truncated_images_stay_errors_when_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(photo(90, 70), "JPEG")
    assert refused(data[: len(data) // 2]) == "image_broken"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_an_image_or_an_image_error(format, damage):
    data = bytearray(encode(photo(24, 18), format))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        image = open_image(bytes(data))
    except ImageError:
        return
    assert image.mode == "RGB"


def test_the_pixel_cap_is_read_from_the_header_before_decoding(monkeypatch):
    bomb = encode(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 30_000

    def decoded(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert refused(bomb) == "image_too_large"
    assert refused(encode(Image.new("1", (70_000, 1)), "PNG")) == "image_too_large"
    assert refused(encode(Image.new("1", (20_000, 20_000)), "PNG")) == "image_too_large"


def test_bombs_in_metadata_and_frames_take_neither_time_nor_memory():
    small = Image.new("RGB", (8, 4), "red")
    texts = PngInfo()
    texts.add_text("comment", "x" * 20_000_000, zip=True)
    loop = struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + loop + struct.pack("<I", 8)
    frames = [Image.new("L", (8, 8), i % 256) for i in range(1000)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    screen = bytearray(encode(small, "GIF"))
    screen[6:10] = b"\xff\xff\xff\xff"
    start = time.monotonic()
    assert refused(encode(small, "PNG", pnginfo=texts)) == "image_broken"
    assert open_image(encode(small, "JPEG", exif=exif)).size == (4, 8)
    assert first_pixel(animation) == (0, 0, 0)
    assert refused(bytes(screen)) == "image_too_large"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many_is_taken(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert first_pixel(data) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations_give_the_same_upright_image(format):
    upright = photo(33, 20)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> inverse Transpose
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    for orientation in range(1, 9):
        stored = upright
        if orientation > 1:
            stored = upright.transpose(Image.Transpose(back[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(stored, format, exif=exif, **quality.get(format, {}))
        image = open_image(data)
        assert image.size == (33, 20)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright).astype(int))
        assert difference.mean() < (4 if format == "JPEG" else 1e-9), orientation


def test_damaged_exif_does_not_cost_a_good_image():
    data = encode(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert first_pixel(data)[0] > 250


def rgba(hidden: tuple[int, int, int]) -> Image.Image:
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[:3] = (255, 0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_colors_hidden_under_alpha_never_show(format):
    one, other = (open_image(encode(rgba(c), format)) for c in ((0, 0, 0), (9, 200, 77)))
    assert one.tobytes() == other.tobytes()
    assert one.getpixel((0, 5)) == (255, 255, 255)
    assert one.getpixel((0, 0)) == (255, 0, 0)
    assert torch.equal(to_pixels(one, SMALL, "pad"), to_pixels(other, SMALL, "pad"))


def test_every_kind_of_transparency_is_composited_on_white():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert first_pixel(encode(half, "PNG")) == (127, 127, 127)
    assert first_pixel(encode(Image.new("LA", (2, 2), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    assert first_pixel(encode(palette, "PNG")) == (0, 0, 255)
    assert first_pixel(encode(palette, "PNG", transparency=1)) == (255, 255, 255)
    assert first_pixel(encode(palette, "PNG", transparency=b"\xff\x00")) == (255, 255, 255)
    assert first_pixel(encode(palette, "GIF", transparency=1)) == (255, 255, 255)
    keyed = Image.new("RGB", (2, 2), (1, 2, 3))
    assert first_pixel(encode(keyed, "PNG", transparency=(1, 2, 3))) == (255, 255, 255)
    gray = Image.new("L", (2, 2), 7)
    assert first_pixel(encode(gray, "PNG", transparency=7)) == (255, 255, 255)


def deep(values: np.ndarray, format: str = "TIFF") -> tuple[int, ...]:
    return first_pixel(encode(Image.fromarray(values), format))


def test_deep_greys_are_scaled_and_not_clipped():
    full = lambda value, kind: np.full((3, 3), value, kind)  # noqa: E731
    for format in ("PNG", "TIFF"):
        assert deep(full(40000, np.uint16), format) == (156, 156, 156)
        assert deep(full(65535, np.uint16), format) == (255, 255, 255)
        assert deep(full(255, np.uint16), format) == (1, 1, 1)
    assert deep(full(40000, np.int32)) == (156, 156, 156)
    assert deep(full(200, np.int32)) == (200, 200, 200)
    assert deep(full(0.5, np.float32)) == (128, 128, 128)
    assert deep(full(200, np.float32)) == (200, 200, 200)
    ramp = np.array([[-3.0, 1.0, 5.0]], np.float32)
    assert np.asarray(open_image(encode(Image.fromarray(ramp), "TIFF")))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert refused(encode(Image.fromarray(full(np.nan, np.float32)), "TIFF")) == "image_broken"


def test_one_bit_grey_cmyk_and_lab_images_have_their_colors():
    assert first_pixel(encode(Image.new("1", (9, 9), 1), "PNG")) == (255, 255, 255)
    assert first_pixel(encode(Image.new("L", (9, 9), 77), "PNG")) == (77, 77, 77)
    for format in ("JPEG", "TIFF"):
        cyan = first_pixel(encode(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), format))
        assert np.allclose(cyan, (0, 255, 255), atol=3)
        black = first_pixel(encode(Image.new("CMYK", (9, 9), (0, 0, 0, 255)), format))
        assert np.allclose(black, (0, 0, 0), atol=3)
    middle = first_pixel(encode(Image.new("LAB", (9, 9), (136, 128, 128)), "TIFF"))
    assert np.ptp(middle) <= 2 and 120 < middle[0] < 136


SHAPES = [(640, 480), (480, 640), (336, 336), (335, 337), (100, 90), (1000, 50), (37, 501), (7, 5)]


@pytest.mark.parametrize("size", [336, 224, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_what_clip_image_processor_makes(shape, size):
    spec = ImageSpec(size=size, mean=MEAN, std=STD, interpolation="bicubic")
    image = photo(*shape)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (to_pixels(image, spec, "crop") - levels(theirs)).abs().max() <= 1e-3


@pytest.mark.parametrize("shape", [(5, 501), (501, 5)])
def test_long_strips_are_cropped_before_they_are_resized_with_nearly_the_same_pixels(shape):
    image, size = photo(*shape), 112
    spec = ImageSpec(size=size, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")
    long = int(size * 501 / 5)
    left, top = ((long - size) // 2, 0) if shape[0] > shape[1] else (0, (long - size) // 2)
    whole = image.resize((long, size) if shape[0] > shape[1] else (size, long), 3)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    difference = np.abs(to_pixels(image, spec, "crop").numpy().astype(int) - expected)
    assert difference.mean() < 0.5  # Pillow rounds and clips between its two passes


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_llavas_square_of_the_mean_color_and_then_clip_image_processor(shape):
    image = photo(*shape)
    width, height = shape
    side = max(shape)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )(square, return_tensors="pt")["pixel_values"][0]
    assert (to_pixels(image, CLIP, "pad") - levels(theirs)).abs().max() <= 1e-3


@pytest.mark.parametrize("shape", [(1500, 500), (501, 1500), (700, 700), (500, 1), (1, 500)])
def test_padding_one_axis_at_a_time_gives_the_square_way_s_pixels(shape, monkeypatch):
    image = photo(*shape)
    whole = to_pixels(image, UNIT_336, "pad").int()
    monkeypatch.setattr(images, "_MAX_CANVAS", 100)
    difference = (whole - to_pixels(image, UNIT_336, "pad")).abs().float()
    if shape[0] >= shape[1]:
        assert difference.max() == 0
    else:  # the two passes change places, and Pillow rounds and clips between them
        assert difference.mean() < 0.1 and difference.max() < 12


UNIT_336 = ImageSpec(size=336, mean=(0.4, 0.4, 0.4), std=(1, 1, 1), interpolation="bicubic")


def test_a_wide_image_is_shown_whole_by_pad_and_cut_by_crop():
    image = Image.new("RGB", (4, 2), "red")
    image.paste((0, 0, 255), (0, 0, 1, 2))
    padded = to_pixels(image, ImageSpec(4, (0.5, 0.5, 0.5), (1, 1, 1), "nearest"), "pad")
    assert padded[0].tolist() == [[127] * 4, [0, 255, 255, 255], [0, 255, 255, 255], [127] * 4]
    assert to_pixels(image, UNIT, "crop")[0].tolist() == [[255, 255], [255, 255]]


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_every_shape_gives_the_tower_s_shape(aspect):
    sides = [1, 2, 13, 14, 15, 335, 337, 3000]
    for width in sides:
        for height in sides:
            if width * height > 2_000_000:
                continue
            pixels = to_pixels(Image.new("RGB", (width, height)), SMALL, aspect)
            assert pixels.shape == (3, 14, 14) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(1, 65_535), (65_535, 1)])
def test_the_most_extreme_image_needs_neither_much_time_nor_memory(shape, aspect):
    start = time.monotonic()
    assert to_pixels(Image.new("RGB", shape), CLIP, aspect).shape == (3, 336, 336)
    assert time.monotonic() - start < 2


def test_pixels_are_in_red_green_blue_order():
    pixels = to_pixels(Image.new("RGB", (1, 1), (255, 0, 51)), UNIT, "crop")
    assert pixels[:, 0, 0].tolist() == [255, 0, 51]


# --- fast processing compared with exact processing

RESIZES = ["nearest", "bilinear", "bicubic", "lanczos"]
COCO = Path(os.environ.get("VLM_SFT_COCO_DIR", "none"))


def both(data: bytes, spec: ImageSpec, aspect: ImageAspect) -> tuple[torch.Tensor, torch.Tensor]:
    fast, exact = (read_pixels(data, spec, aspect, how) for how in ("fast", "exact"))
    assert fast.shape == exact.shape == (3, spec.size, spec.size)
    assert fast.dtype == exact.dtype == torch.uint8 and fast.is_contiguous()
    return fast, exact


def difference(data: bytes, spec: ImageSpec, aspect: ImageAspect) -> int:
    fast, exact = both(data, spec, aspect)
    return int((fast.int() - exact.int()).abs().max())


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 256),
    aspect=st.sampled_from(["pad", "crop"]),
    interpolation=st.sampled_from(RESIZES),
    harshest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fast_pixels_are_within_two_levels_of_pillows_for_any_image(
    width, height, size, aspect, interpolation, harshest, seed
):
    noise = np.random.default_rng(seed).integers(0, 2 if harshest else 256, (height, width, 3))
    pixels = (noise * (255 if harshest else 1)).astype(np.uint8)
    data = encode(Image.fromarray(pixels), "PNG", compress_level=0)
    spec = ImageSpec(size, MEAN, STD, interpolation)
    assert difference(data, spec, aspect) <= 2


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("shape", [*SHAPES, (640, 1281), (4097, 30), (30, 4097), (1, 1)])
def test_fast_jpegs_are_within_two_levels_whatever_their_shape(shape, aspect):
    assert difference(encode(photo(*shape), "JPEG", quality=90), CLIP, aspect) <= 2


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full color": {"subsampling": 0},
    "half color": {"subsampling": 1},
    "coarse": {"quality": 5},
    "finest": {"quality": 100, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 3},
    "stored as red, green, blue": {"keep_rgb": True},
    "optimized, with a profile": {"optimize": True, "icc_profile": b"no profile" * 9000},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (160, 97)])
def test_jpegs_are_decoded_to_the_very_bytes_of_pillow(kind, shape, monkeypatch):
    spec = ImageSpec(min(shape), MEAN, STD, "nearest")  # which changes no byte
    for image in (photo(*shape), photo(*shape).convert("L")):
        if image.mode == "L" and kind == "stored as red, green, blue":
            continue
        data = encode(image, "JPEG", **JPEGS[kind])
        exact = read_pixels(data, spec, "crop", "exact")
        with monkeypatch.context() as patched:  # Pillow's decoder has no part in it
            patched.setattr(ImageFile.ImageFile, "load", None)
            assert torch.equal(read_pixels(data, spec, "crop", "fast"), exact)


@pytest.mark.skipif("VLM_SFT_COCO_DIR" not in os.environ, reason="VLM_SFT_COCO_DIR is not set")
def test_photographs_of_coco_are_within_two_levels_and_mostly_equal():
    files = sorted((COCO / "images").glob("*.jpg"))[:40]
    assert files
    total = 0.0
    for aspect in ("pad", "crop"):
        for file in files:
            fast, exact = both(file.read_bytes(), CLIP, aspect)
            distance = (fast.int() - exact.int()).abs()
            assert distance.max() <= 2, file
            total += distance.float().mean().item()
    assert total / (2 * len(files)) < 0.01


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_what_the_fast_decoder_does_not_do_is_the_exact_way_s_image(aspect):
    upright = photo(61, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(upright, "JPEG", exif=exif)
    cmyk = encode(upright.convert("CMYK"), "JPEG")
    see_through = encode(upright.convert("RGBA"), "PNG")
    palette = encode(upright.convert("P"), "GIF")
    deep = encode(Image.fromarray(np.full((30, 50), 40000, np.uint16)), "PNG")
    for data in (turned, cmyk, see_through, palette, deep):
        assert difference(data, CLIP, aspect) <= 2


@settings(max_examples=200, deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    options=st.sampled_from([{}, {"progressive": True}, {"subsampling": 0}]),
)
def test_the_fast_way_refuses_and_accepts_the_damaged_files_that_the_exact_way_does(
    damage, cut, options
):
    data = bytearray(encode(photo(40, 31), "JPEG", **options))
    for place, value in damage:
        data[int(place * len(data))] = value
    source = bytes(data if cut is None else data[: int(cut * len(data))])
    outcomes = []
    for processing in ("fast", "exact"):
        try:
            outcomes.append(read_pixels(source, SMALL, "pad", processing))
        except ImageError as error:
            outcomes.append((error.reason, str(error)))
    fast, exact = outcomes
    if isinstance(exact, torch.Tensor):
        assert isinstance(fast, torch.Tensor) and (fast.int() - exact.int()).abs().max() <= 2
    else:
        assert fast == exact
