"""The tokens of an image equal those of transformers' own classes."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from tests.data.layouts_for_tests import pinpoints, rule, sizes
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.model.image_tokens import image_tokens

WIDTH = 3
NEWLINE = torch.tensor([-1.0, -2.0, -3.0])


def crops(rule: LayoutRule, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, rule.crop_tokens, WIDTH, generator=generator)


def expected(rule: LayoutRule, crops: Tensor, width: int, height: int) -> Tensor:
    """Return the tokens of an image as transformers joins them."""
    patch = rule.crop_size // rule.crop_grid[0]
    config = SimpleNamespace(
        image_grid_pinpoints=pinpoints(rule),
        vision_config=SimpleNamespace(image_size=rule.crop_size, patch_size=patch),
    )
    model, sizes = SimpleNamespace(config=config), [(height, width)]
    if rule.max_crops is None:
        pack = LlavaNextModel.pack_image_features
        (tokens,), _ = pack(model, [crops], sizes, "full", image_newline=NEWLINE)
    else:
        pack = LlavaOnevisionModel.pack_image_features
        (tokens,), _ = pack(model, [crops], sizes, NEWLINE, f"anyres_max_{rule.max_crops}")
    return tokens


@pytest.mark.parametrize(
    "rule", [rule("anyres"), rule("anyres", grid=4), rule("anyres_max_9"), rule("anyres_max_2")]
)
def test_tokens_and_newlines_are_those_of_transformers(rule: LayoutRule) -> None:
    for width, height in sizes():
        layout = rule.layout(width, height)
        found = crops(rule, layout.num_crops)
        tokens = image_tokens(found, [layout], NEWLINE)
        assert len(tokens) == layout.num_tokens
        newlines = (tokens == NEWLINE).all(-1).nonzero().flatten().tolist()
        assert newlines == layout.newline_positions(), (width, height)
        if layout.scaled is None or 0 not in layout.scaled:  # which transformers cannot scale
            torch.testing.assert_close(tokens, expected(rule, found, width, height))


def test_several_images_keep_their_order_and_get_a_newline_each() -> None:
    onevision = rule("anyres_max_9")
    layout = onevision.layout(100, 30, num_images=2)
    found = crops(onevision, 2)
    tokens = image_tokens(found, [layout, layout], NEWLINE)
    torch.testing.assert_close(tokens[:4], found[0])
    torch.testing.assert_close(tokens[5:9], found[1])
    assert torch.equal(tokens[4], NEWLINE) and torch.equal(tokens[9], NEWLINE)


def test_dynamic_tiles_come_before_the_overview() -> None:
    dynamic = rule("dynamic", max_tiles=6)
    layout = dynamic.layout(300, 100)
    found = crops(dynamic, layout.num_crops)
    assert (layout.tiles, layout.overview) == ((1, 3), "last")
    assert torch.equal(image_tokens(found, [layout], None), found.flatten(0, 1))
