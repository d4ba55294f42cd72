"""Crops have the pixels of transformers' own image processors, from both ways of processing."""

import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.data.layouts_for_tests import CROP, pinpoints, rule, sizes
from tests.data.test_images import MEAN, STD, encode, levels, photo
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec, read_crops, read_pixels

SPEC = ImageSpec(CROP, MEAN, STD, "bicubic")
SQUARE = {"height": CROP, "width": CROP}
COLORS = {"image_mean": list(MEAN), "image_std": list(STD)}
ODD = [s for s in sizes(24) if max(s) > 1]
RULES = [rule("anyres"), rule("anyres_max_9"), rule("dynamic"), rule("dynamic", max_tiles=4)]


def processed(rule: LayoutRule, images: list[Image.Image]) -> list[Tensor]:
    """Return the crops of each image of a record as transformers makes them, in levels."""
    if rule.tiling == "dynamic":
        internvl = GotOcr2ImageProcessorPil(
            size=SQUARE,
            crop_to_patches=True,
            min_patches=rule.min_tiles,
            max_patches=rule.max_tiles,
            **COLORS,
        )
        found = internvl(images, return_tensors="pt")
        counts = torch.as_tensor(found["num_patches"]).tolist()
        return [levels(crops) for crops in found["pixel_values"].split(counts)]
    if rule.max_crops is None:
        llava_next = LlavaNextImageProcessorPil(
            size={"shortest_edge": CROP},
            crop_size=SQUARE,
            image_grid_pinpoints=pinpoints(rule),
            **COLORS,
        )
        found = llava_next(images, return_tensors="np")
    else:
        onevision = LlavaOnevisionImageProcessorPil(
            size=SQUARE, image_grid_pinpoints=pinpoints(rule), **COLORS
        )
        found = onevision([images], return_tensors="np")
    layouts = [rule.layout(*image.size, num_images=len(images)) for image in images]
    pairs = zip(found["pixel_values"], layouts, strict=True)
    return [levels(torch.as_tensor(crops[: layout.num_crops])) for crops, layout in pairs]


@pytest.mark.parametrize("rule", RULES)
def test_exact_crops_are_those_of_transformers(rule: LayoutRule) -> None:
    for width, height in ODD:
        image = photo(width, height)
        crops, layout = read_crops(encode(image, "PNG"), rule, SPEC, "pad", "exact")
        (expected,) = processed(rule, [image])
        assert crops.shape == (layout.num_crops, 3, CROP, CROP) == expected.shape
        assert crops.dtype == torch.uint8
        assert (crops - expected).abs().max() <= 1e-3, (width, height)


@pytest.mark.parametrize("rule", RULES)
def test_exact_crops_of_several_images_are_those_of_transformers(rule: LayoutRule) -> None:
    images = [photo(90, 40), photo(40, 100, seed=1), photo(56, 56, seed=2)]
    for image, expected in zip(images, processed(rule, images), strict=True):
        crops, layout = read_crops(
            encode(image, "PNG"), rule, SPEC, "pad", "exact", num_images=len(images)
        )
        assert len(crops) == layout.num_crops
        assert (crops - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_fast_crops_are_within_two_levels_of_exact_ones(
    rule: LayoutRule, interpolation: str
) -> None:
    random_numbers = random.Random(0)
    shapes = [(random_numbers.randint(1, 260), random_numbers.randint(1, 260)) for _ in range(40)]
    spec = ImageSpec(CROP, MEAN, STD, interpolation)
    for number, (width, height) in enumerate([*shapes, (600, 3), (3, 600)]):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        data = encode(Image.fromarray(noise), "JPEG" if number % 2 else "PNG")
        fast, layout = read_crops(data, rule, spec, "pad", "fast")
        exact, same = read_crops(data, rule, spec, "pad", "exact")
        assert layout == same
        assert (fast.int() - exact.int()).abs().max() <= 2, (width, height)


@pytest.mark.parametrize("processing", ["fast", "exact"])
def test_an_image_that_is_not_divided_has_the_pixels_of_one_square(processing: str) -> None:
    data = encode(photo(70, 40), "JPEG")
    expected = read_pixels(data, SPEC, "crop", processing)
    crops, layout = read_crops(data, rule("none"), SPEC, "crop", processing)
    assert torch.equal(crops, expected[None]) and layout.num_tokens == 4


def test_the_layout_is_that_of_the_upright_image() -> None:
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(200, 50).save(buffer, "JPEG", exif=exif)
    crops, layout = read_crops(buffer.getvalue(), rule("anyres"), SPEC, "pad")
    assert layout == rule("anyres").layout(50, 200) != rule("anyres").layout(200, 50)
    assert len(crops) == layout.num_crops
