"""Layouts equal those of transformers' own classes, for sizes that decide between roundings."""

from typing import Any

import pytest
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from tests.data.layouts_for_tests import pinpoints, rule, sizes
from vlm_sft.config.schema import ImageTilingConfig
from vlm_sft.data.image_layout import LayoutRule, layout_rule
from vlm_sft.errors import UserError

SIZES = sizes()
ANYRES = [rule("anyres"), rule("anyres", grid=3), rule("anyres", grid=24, crop=336)]
MAXIMA = [rule(f"anyres_max_{n}", grid=g) for n, g in ((1, 2), (4, 3), (9, 27), (9, 2))]


class Values:
    """Stands for a processor or a model, of which transformers reads a few attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def next_tokens(rule: LayoutRule, width: int, height: int) -> int:
    side = rule.crop_grid[0]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = Values(image_grid_pinpoints=pinpoints(rule))
    processor.patch_size, processor.num_additional_image_tokens = rule.crop_size // side, 0
    return processor._get_number_of_features(height, width, rule.crop_size, rule.crop_size)


def onevision_tokens(rule: LayoutRule, width: int, height: int) -> int:
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = Values(image_grid_pinpoints=pinpoints(rule))
    processor.num_image_tokens = rule.crop_tokens
    processor.vision_aspect_ratio = f"anyres_max_{rule.max_crops}"
    return processor._get_number_of_features(height, width, rule.crop_size, rule.crop_size)


@pytest.mark.parametrize("rule", [r for r in ANYRES if r.crop_size % r.crop_grid[0] == 0])
def test_anyres_has_the_tokens_and_crops_of_llava_next(rule: LayoutRule) -> None:
    for width, height in SIZES:
        layout = rule.layout(width, height)
        assert layout.num_tokens == next_tokens(rule, width, height), (width, height)
        crops = image_size_to_num_patches((height, width), pinpoints(rule), rule.crop_size)
        assert layout.num_crops == crops, (width, height)


@pytest.mark.parametrize("rule", MAXIMA)
def test_anyres_max_has_the_tokens_of_llava_onevision(rule: LayoutRule) -> None:
    scaled = 0
    for width, height in SIZES:
        layout = rule.layout(width, height)
        assert layout.num_tokens == onevision_tokens(rule, width, height), (width, height)
        scaled += layout.scaled is not None
    assert 0 < scaled < len(SIZES)


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 6), (1, 1), (4, 4), (1, 40)])
def test_dynamic_has_the_tiles_of_internvl(least: int, most: int) -> None:
    dynamic = rule("dynamic", min_tiles=least, max_tiles=most)
    for width, height in sizes():
        layout = dynamic.layout(width, height)
        side = (dynamic.crop_size, dynamic.crop_size)
        columns, rows = get_optimal_tiled_canvas((height, width), side, least, most)
        assert layout.tiles == (rows, columns), (width, height)
        assert layout.num_crops == rows * columns + (rows * columns > 1)
        assert layout.num_tokens == layout.num_crops * dynamic.crop_tokens
        assert layout.newline_positions() == []


def test_images_of_a_record_with_several_are_not_divided_by_anyres_max() -> None:
    several = rule("anyres_max_9").layout(300, 100, num_images=2)
    assert (several.num_crops, several.num_tokens) == (1, 4 + 1)
    assert several.newline_positions() == [4]
    assert rule("anyres").layout(300, 100, num_images=2) == rule("anyres").layout(300, 100)


def test_without_tiling_every_image_is_one_crop() -> None:
    layout = rule("none").layout(0, 0)
    assert (layout.num_crops, layout.num_tokens, layout.newline_positions()) == (1, 4, [])


@pytest.mark.parametrize("layout", ["anyres", "anyres_max_4"])
def test_anyres_needs_a_grid_of_tokens(layout: str) -> None:
    tiling = ImageTilingConfig(layout=layout)
    with pytest.raises(UserError, match="have no rows and columns"):
        layout_rule(tiling, 16, 28)
    dynamic = ImageTilingConfig(layout="dynamic")
    assert layout_rule(dynamic, 16, 28).crop_tokens == 16
