"""Records whose images are divided into crops, from files to gradients: padded, packed, alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.data.test_images import photo
from tests.model.tiny import VIT
from tests.train.test_train_step import largest_difference
from tests.train.tiny import in_processes
from vlm_sft.config.schema import (
    DataConfig,
    DataFile,
    ImageTilingConfig,
    LanguageModelConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.batch import Collator, PackedCollator, PaddedCollator
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError
from vlm_sft.model.build import build_model
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.packed_attention import install_packed_attention
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.fsdp import shard
from vlm_sft.train.train_step import accumulate_gradient
from vlm_sft.utils.constants import IMAGE_TOKEN_ID
from vlm_sft.utils.dtensor import full_tensor

SHAPES = {"wide": (120, 40), "tall": (30, 90), "square": (56, 56), "small": (10, 9)}
KINDS = {
    "anyres": ({"layout": "anyres"}, "mlp2x_gelu"),
    "onevision": ({"layout": "anyres_max_2"}, "mlp2x_gelu"),
    "internvl": ({"layout": "dynamic", "max_tiles": 6}, "pixel_shuffle_mlp"),
    "resampler": ({"layout": "dynamic", "max_tiles": 3}, "resampler"),
}


def write_records(folder: Path) -> Path:
    """Write ten records: images of every shape, shared ones, several in a record, and none."""
    for name, shape in SHAPES.items():
        photo(*shape, seed=len(name)).save(folder / f"{name}.png")
    contents = [
        ["wide"],
        ["wide"],
        ["tall"],
        ["wide", "tall"],
        [],
        ["square"],
        ["small", "square", "wide"],
        ["wide"],
        [],
        ["wide", "tall"],
    ]
    rows = []
    for number, names in enumerate(contents):
        question = "<image> and " * len(names) + f"what is {number}?"
        turns = [("human", question), ("gpt", f"It is {number * 11}."), ("human", "And?")]
        turns.append(("gpt", "no" * (1 + number % 3)))
        said = [{"from": who, "value": text} for who, text in turns]
        row: dict[str, Any] = {"id": str(number), "conversations": said}
        if names:
            row["image"] = [f"{name}.png" for name in names]
        rows.append(row)
    path = folder / "records.json"
    path.write_text(json.dumps(rows))
    return path


def model_of(kind: str) -> VisionLanguageModel:
    """Return a model in float64; GPT-2 takes its norms and softmax in the dtype it is given."""
    tiling, projector = KINDS[kind]
    gpt2 = {"model_type": "gpt2", "vocab_size": 261, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = ModelConfig(
        vision_tower=VisionTowerConfig(
            library="transformers", config={"model_type": "clip_vision_model", **VIT}
        ),
        image_tiling=ImageTilingConfig.model_validate(tiling),
        projector_type=projector,
        num_queries=4 if projector == "resampler" else None,
        language_model=LanguageModelConfig(
            config={**gpt2, **dropout, "n_positions": 512}, tokenizer="bytes"
        ),
    )
    model = build_model(config, dtype=torch.float64, seed=1).double()
    set_trainable(model, {"projector", "language_model"})
    return model.double()


def records_of(rule: LayoutRule, spec: ImageSpec, path: Path, **options: Any) -> SupervisedDataset:
    config = DataConfig(train=[DataFile(path=str(path))], **options)
    tokenizer = load_tokenizer(LanguageModelConfig(config={}, tokenizer="bytes"))
    chat_tokenizer = ChatTokenizer.from_name("chatml", tokenizer)
    return SupervisedDataset(
        config.train, chat_tokenizer, spec, layout_rule=rule, config=config, ledger=Ledger()
    )


def packed(max_tokens: int, *, share: bool) -> PackedCollator:
    return PackedCollator(max_tokens, share, round_to=1, image_cost=3.0, pad_token_id=0)


def gradients(
    accelerator: Accelerator, kind: str, path: Path, collator: Collator, *, sharded: bool = False
) -> tuple[dict[str, Any], float, dict[str, float]]:
    model = model_of(kind)
    install_packed_attention(causal_lm(model.language_model))
    records = records_of(model.layout_rule, model.vision_tower.image_spec, path)
    if sharded:
        shard(model, accelerator, "fp32")
    wrapped = model if sharded else accelerator.prepare(model)
    mine = micro_batches_of_rank(
        collator,
        records,
        range(len(records)),
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    (batches,) = load_steps(records, [mine], collator=collator, num_workers=0)
    found = accumulate_gradient(wrapped, batches, accelerator)
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    losses = {name: float(loss) for name, loss in found.record_losses}
    return {n: full_tensor(g).numpy() for n, g in by_name.items()}, found.loss, losses


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_padded_packed_and_shared_records_have_the_losses_of_records_alone(
    kind: str, path: Path
) -> None:
    accelerator = make_accelerator("fp32")
    expected, loss, losses = gradients(accelerator, kind, path, PaddedCollator(1, 0))
    assert len(losses) == 10
    ways = [PaddedCollator(4, 0), packed(400, share=False), packed(900, share=True)]
    for collator in ways:
        found, same_loss, same_losses = gradients(accelerator, kind, path, collator)
        assert same_loss == pytest.approx(loss, rel=1e-10)
        assert same_losses == pytest.approx(losses, rel=1e-10)
        assert all(gradient.dtype == np.float64 for gradient in found.values())
        assert found.keys() == expected.keys()
        assert largest_difference(expected, found) <= 1e-10
    has_newline = kind in ("anyres", "onevision")
    assert ("image_newline" in expected) == has_newline
    assert not has_newline or expected["image_newline"].any()


def both_kinds(accelerator: Accelerator, path: Path) -> list[Any]:
    """On each rank: DDP and FSDP2; micro-batches of one record, so that some have no image."""
    return [
        gradients(accelerator, kind, path, PaddedCollator(1, 0), sharded=sharded)
        for kind, sharded in (("anyres", False), ("onevision", True))
    ]


def test_two_processes_add_up_to_the_same_gradients(path: Path) -> None:
    results = in_processes(2, both_kinds, path)
    for place, kind in enumerate(("anyres", "onevision")):
        expected, loss, _ = gradients(make_accelerator("fp32"), kind, path, PaddedCollator(10, 0))
        for rank in results:
            assert isinstance(rank, list), rank
            found, same_loss, _ = rank[place]
            assert same_loss == pytest.approx(loss, rel=1e-10)
            assert largest_difference(expected, found) <= 1e-10


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_lengths_and_crops_are_those_of_the_examples(kind: str, path: Path) -> None:
    model = model_of(kind)
    records = records_of(model.layout_rule, model.vision_tower.image_spec, path)
    for index in range(len(records)):
        example = records[index]
        assert len(example.input_ids) == records.lengths[index]
        assert len(example.pixel_values) == records.num_crops[index]
        layouts = example.layouts or ()
        assert len(layouts) == records.num_images[index]
        placeholders = int((example.input_ids == IMAGE_TOKEN_ID).sum())
        assert placeholders == sum(layout.num_tokens for layout in layouts)
        rest = records.example(index, first_image=1)
        first = layouts[0].num_crops if layouts else 0
        assert len(rest.pixel_values) == len(example.pixel_values) - first


def test_records_share_an_image_only_if_it_is_divided_alike(path: Path) -> None:
    def prefixes(kind: str) -> Sequence[int]:
        model = model_of(kind)
        return records_of(model.layout_rule, model.vision_tower.image_spec, path).prefix_ids

    anyres, onevision = prefixes("anyres"), prefixes("onevision")
    assert anyres[0] == anyres[1] == anyres[7] == anyres[3] == anyres[9]
    assert onevision[0] == onevision[1] == onevision[7] != onevision[3] == onevision[9]


def test_stage_1_trains_the_newline_with_the_projector(path: Path) -> None:
    model = model_of("anyres")
    set_trainable(model, {"projector"})
    names = [name for name, _ in parameters_by_part(model)["projector"]]
    assert "image_newline" in names
    assert model.image_newline is not None and model.image_newline.requires_grad
    assert "image_newline" in model.projector_state()
    deviation = float(model.image_newline.detach().std())
    assert 0.1 < deviation < 0.5  # 16 ** -0.5 = 0.25


def test_a_record_with_too_many_crops_is_refused_skipped_or_shortened(path: Path) -> None:
    rule = model_of("anyres").layout_rule
    spec = model_of("anyres").vision_tower.image_spec
    with pytest.raises(RecordError, match=r"takes 8 image crops, `max_crops` is 6") as caught:
        records_of(rule, spec, path, max_crops=6)
    assert caught.value.reason == "too_many_crops"
    kept = records_of(rule, spec, path, max_crops=6, length_policy="skip")
    assert "3" not in kept.record_ids and "0" in kept.record_ids
    assert max(kept.num_crops) <= 6


def test_an_image_whose_header_is_broken_is_quarantined_at_the_start(tmp_path: Path) -> None:
    path = write_records(tmp_path)
    (tmp_path / "small.png").write_bytes(b"no image")
    model = model_of("anyres")
    kept = records_of(model.layout_rule, model.vision_tower.image_spec, path, on_error="quarantine")
    assert "6" not in kept.record_ids and len(kept) == 9


def test_an_image_that_got_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_records(tmp_path)
    model = model_of("anyres")
    records = records_of(model.layout_rule, model.vision_tower.image_spec, path)
    old = (tmp_path / "tall.png").stat().st_size
    photo(90, 30).save(tmp_path / "tall.png", compress_level=9)
    data = (tmp_path / "tall.png").read_bytes()
    (tmp_path / "tall.png").write_bytes(data[:old] + bytes(max(0, old - len(data))))
    with pytest.raises(RecordError) as caught:
        records[2]
    assert caught.value.reason in ("image_changed", "image_broken")
