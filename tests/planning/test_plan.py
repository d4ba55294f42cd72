"""`python -m vlm_sft.plan`: data as training reads it, memory by part, what fits, and errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from vlm_sft.config.method import Method, training_method
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.data.batch import Collator
from vlm_sft.data.build import (
    load_chat_tokenizer,
    load_data,
    make_collator,
    make_sampler,
    num_steps,
)
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.data.sampler import StepSampler
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import CheckpointPolicy
from vlm_sft.model.costs import image_cost
from vlm_sft.model.quantization import _quantized, quantized_bytes
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.plan import main
from vlm_sft.planning.calibrate import calibrate, micro_batch_of
from vlm_sft.planning.data_stats import read_data_stats
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.gpus import GPUS, NETWORK
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.speed import estimate_speed
from vlm_sft.planning.step_stats import StepStats, plan_steps
from vlm_sft.train.setup import load_model

pytestmark = pytest.mark.usefixtures("in_the_repository")

STAGE2 = "configs/tiny/stage2.yaml"
LORA = "configs/tiny/stage2_lora.yaml"
QLORA = "configs/tiny/stage2_qlora.yaml"
EIGHT_BIT = ["optim.optimizer=adamw_8bit"]
PACKED = [
    "train.micro_batch_size=null",
    "train.packing={max_tokens: 512}",
    "train.share_image_prefix=true",
]
SHALLOW = ["projector=null", "model.language_model.config.num_hidden_layers=1"]


def config_of(path: str = STAGE2, *overrides: str) -> RunConfig:
    return load_config(path, [*SHALLOW, *overrides])


def estimator(config: RunConfig, gpu: str = "4090", gpus: int = 1) -> Estimator:
    device = find_device(gpu, torch.float32)
    return Estimator(config, device, gpus=gpus, efficiency=0.5)


def step_stats(config: RunConfig, *, image_cost: float = 0.0) -> StepStats:
    chat_tokenizer = load_chat_tokenizer(config)
    data = read_data_stats(config, chat_tokenizer, layout_rule=LayoutRule(9), sample=0)
    return plan_steps(config, data, gpus=1, image_cost=image_cost)


def test_the_command_prints_memory_by_part_and_every_training_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([STAGE2, "--gpu", "l4", "--json", *SHALLOW]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["data"]["records_per_epoch"] == 24
    assert plan["data"]["every_record_tokenized"] is True
    options = plan["by_method"]
    assert [option["method"] for option in options] == ["stage1", "lora", "qlora", "full"]
    assert [option["method"] for option in options if option["configured"]] == ["full"]
    assert all(option["fits"] and option["largest_micro_batch"] > 100 for option in options)
    for option in [*plan["by_policy"], *options]:
        memory = option["memory"]
        weights = memory.pop("weights")
        parts = [memory[key] for key in memory if key not in ("allocated", "total", "overhead")]
        assert sum(weights.values()) + sum(parts) == pytest.approx(memory["allocated"], abs=10)
        assert memory["allocated"] + memory["overhead"] == pytest.approx(memory["total"], abs=10)
    configured = plan["by_policy"][0]["memory"]
    assert configured["optimizer"] == 2 * configured["gradients"]
    assert any("assumed" in note for note in plan["notes"])


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load_model(config_of(), {"projector", "language_model"})[0]


def data_of(
    config: RunConfig, model: VisionLanguageModel
) -> tuple[StepSampler, Collator, SupervisedDataset]:
    chat_tokenizer, tower = load_chat_tokenizer(config), model.vision_tower
    data = load_data(config, chat_tokenizer, tower.image_spec, LayoutRule(tower.num_tokens))
    collator = make_collator(config, padding_id(chat_tokenizer.tokenizer), image_cost(model))
    return make_sampler(config, data.train), collator, data.train


def test_records_and_micro_batches_are_those_of_training(model: VisionLanguageModel) -> None:
    config = config_of(STAGE2, "train.group_by_length=true", "train.micro_batch_size=3")
    (sampler, collator, data), work = data_of(config, model), step_stats(config)
    assert work.num_steps == num_steps(config, sampler)
    chunks = [
        chunk
        for step in range(3)
        for chunk in micro_batches_of_rank(
            collator, data, sampler.step_indices(step), world_size=1, rank=0
        )
    ]
    assert len(work.micro_batches) == len(chunks)
    for batch, chunk in zip(work.micro_batches, chunks, strict=True):
        examples = [data[i] for i in chunk]
        assert batch.rows == batch.records == len(chunk)
        assert batch.length == max(len(e.input_ids) for e in examples)
        assert batch.targets == sum(int((e.labels != -100).sum()) for e in examples)
        assert batch.images == sum(len(e.pixel_values) for e in examples)


def test_packs_are_those_of_training_with_shared_prefixes(
    model: VisionLanguageModel, tmp_path: Path
) -> None:
    file = records_of_two_images(tmp_path)
    config = config_of(STAGE2, f"data.train=[{{path: {file}, image_root: {tmp_path}}}]", *PACKED)
    sampler, collator, data = data_of(config, model)
    cost = estimator(config).image_cost("full")
    assert cost == pytest.approx(image_cost(model))
    work = step_stats(config, image_cost=cost)
    steps = [
        micro_batches_of_rank(collator, data, sampler.step_indices(step), world_size=1, rank=0)
        for step in range(math.ceil(len(data) / config.train.global_batch_size))
    ]
    loaded = next(
        load_steps(
            data, [[pack for step in steps for pack in step]], collator=collator, num_workers=0
        )
    )
    assert work.micro_batches == tuple(micro_batch_of(batch) for batch in loaded)
    assert work.packing is not None and work.packing.saved > 0.2
    assert work.total("images") < len(data) == work.total("records")


def records_of_two_images(folder: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (48, 48), "red").save(folder / f"{name}.png")
    rows = [
        {
            "id": f"{name}{n}",
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "why? " * n},
                {"from": "gpt", "value": "so"},
            ],
        }
        for name in ("a", "b")
        for n in range(1, 9)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_a_sample_represents_all_records_within_its_reported_error(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(1, 201)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = config_of(STAGE2, f"data.train=[{{path: {file}, weight: 2}}]", "data.max_length=180")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"length_policy": "skip"})}
    )
    chat_tokenizer = load_chat_tokenizer(config)
    whole = read_data_stats(config, chat_tokenizer, layout_rule=LayoutRule(9), sample=0)
    part = read_data_stats(config, chat_tokenizer, layout_rule=LayoutRule(9), sample=100)
    assert whole.is_complete and whole.mean_length_error() == 0
    assert whole.files[0].skipped["too_long"] == 200 - len(whole.files[0].lengths) > 0
    assert whole.records_per_epoch == 2 * len(whole.files[0].lengths)
    assert not part.is_complete and part.files[0].num_tokenized == 100
    assert part.records_per_epoch == pytest.approx(whole.records_per_epoch, rel=0.15)
    error = abs(part.mean("lengths") / whole.mean("lengths") - 1)
    assert 0 < error < 1.5 * part.mean_length_error() < 0.25
    steps = [plan_steps(config, data, gpus=1).num_steps for data in (whole, part)]
    assert steps[1] == pytest.approx(steps[0], rel=0.15)


@pytest.mark.parametrize(
    ("path", "method", "policy", "overrides"),
    [
        (STAGE2, "full", "none", ["train.precision=fp32", "train.micro_batch_size=8"]),
        (STAGE2, "full", "selective", PACKED),
        pytest.param(LORA, "lora", "full", [], marks=pytest.mark.slow),
        pytest.param(LORA, "lora", "none", PACKED, marks=pytest.mark.slow),
        pytest.param(QLORA, "qlora", "none", [], marks=pytest.mark.slow),
        pytest.param(STAGE2, "full", "none", EIGHT_BIT, marks=pytest.mark.slow),
    ],
)
def test_calibration_finds_the_predicted_memory(
    path: str, method: Method, policy: CheckpointPolicy, overrides: list[str]
) -> None:
    config = load_config(path, ["projector=null", *overrides])
    assert training_method(config) == method
    found = calibrate(estimator(config, "cpu"), method, policy)
    assert abs(found.memory_error) < 0.05, found
    assert found.measured_seconds > 0 and 0 < found.efficiency < 1.5


def test_full_fine_tuning_is_sharded_over_the_ranks() -> None:
    config, batch = config_of(), MicroBatch.padded([90] * 4, targets=40, images=4, crops=4)
    one = estimator(config).static_memory("full")
    four = estimator(config, gpus=4).static_memory("full")
    assert four.optimizer == one.optimizer / 4 and four.gradients == one.gradients / 4
    assert four.weights["language_model"] == one.weights["language_model"] / 4
    assert four.weights["vision_tower"] == one.weights["vision_tower"]
    assert four.communication > 0 == one.communication
    lora = estimator(config_of("configs/tiny/stage2_lora.yaml"), gpus=4)
    assert lora.static_memory("lora").communication == lora.static_memory("lora").gradients
    apart = estimator(config_of(STAGE2, "train.sharding=none"), gpus=4).memory(
        "full", "none", batch
    )
    assert apart.optimizer == one.optimizer


def test_qlora_quantizes_the_linear_layers_and_nothing_else() -> None:
    planner = estimator(config_of(LORA, "train.precision=bf16"))
    lora, qlora = planner.static_memory("lora"), planner.static_memory("qlora")
    hidden, inner, kv = 64, 128, 32  # of the tiny Llama: q, k, v, o and the three of its MLP
    sizes = [hidden * hidden, kv * hidden, kv * hidden, hidden * hidden, *[hidden * inner] * 3]
    assert planner.quantized_layer_sizes("qlora") == sizes
    saved = lora.weights["language_model"] - qlora.weights["language_model"]
    assert saved == 2 * sum(sizes) - sum(
        quantized_bytes(size, double_quantization=True) for size in sizes
    )
    assert qlora.communication == 2 * hidden * inner
    assert qlora.optimizer == lora.optimizer


@pytest.mark.parametrize("double", [True, False])
def test_four_bits_take_what_bitsandbytes_packs(double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    layer: Any = _quantized(torch.nn.Linear(300, 200), torch.bfloat16, "nf4", double)
    state = layer.quant_state
    kept = [layer.weight, state.absmax, state.code]
    if double:
        kept += [state.offset, state.state2.absmax, state.state2.code]
    assert quantized_bytes(300 * 200, double_quantization=double) == sum(
        tensor.nbytes for tensor in kept
    )


def test_vicuna_7b_in_four_bits_takes_the_counted_gigabytes() -> None:
    per_layer = [4096 * 4096] * 4 + [4096 * 11008] * 3
    head_and_table = 2 * 2 * 32000 * 4096
    packed = (
        32 * sum(quantized_bytes(size, double_quantization=True) for size in per_layer)
        + head_and_table
    )
    assert packed / 1e9 == pytest.approx(3.87, abs=0.005)
    assert (2 * 32 * sum(per_layer) + head_and_table) / 1e9 == pytest.approx(13.48, abs=0.005)


def test_eight_bit_moments_take_a_quarter() -> None:
    eight = estimator(config_of(STAGE2, *EIGHT_BIT)).static_memory("full")
    full = estimator(config_of()).static_memory("full")
    assert full.optimizer == 2 * full.gradients
    assert eight.gradients == full.gradients
    assert 2.03 / 8 <= eight.optimizer / full.optimizer < 0.35  # small tensors keep all eight


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    planner = estimator(config_of(STAGE2, "train.precision=bf16"))

    def of(rows: int) -> MicroBatch:
        return MicroBatch.padded([2000] * rows, targets=2 * rows, images=rows, crops=rows)

    found = planner.largest("full", "none", of, limit=4_000)
    assert found > 100
    memory = planner.memory("full", "none", of(found))
    assert planner.fits(memory) and memory.total > 0.99 * GPUS["4090"].memory
    assert not planner.fits(planner.memory("full", "none", of(round(1.02 * found) + 1)))


def test_slow_image_loading_is_reported_as_the_bottleneck() -> None:
    config = config_of()
    planner, work = estimator(config), step_stats(config)
    fast = estimate_speed(planner, "full", "none", work, images_per_second=1e12)
    slow = estimate_speed(planner, "full", "none", work, images_per_second=2.0)
    assert fast.bottleneck != "image loading" == slow.bottleneck
    assert slow.samples_per_second == pytest.approx(2.0)  # each of its records has one image
    assert slow.hours == pytest.approx(work.num_records / 2.0 / 3600)


def test_more_gpus_than_a_machine_has_communicate_over_the_network() -> None:
    config = config_of("configs/tiny/stage2_lora.yaml")
    work = step_stats(config)

    def seconds(gpu: str, gpus: int) -> float:
        planner = estimator(config, gpu, gpus)
        speed = estimate_speed(planner, "lora", "none", work, images_per_second=None)
        return speed.seconds["links between GPUs"]

    ring = (15 / 16) / (7 / 8)  # a rank of a longer ring sends more
    nvlink, pcie = GPUS["h100-80"].link, GPUS["l40s"].link
    assert pcie < NETWORK < nvlink
    assert seconds("h100-80", 16) / seconds("h100-80", 8) == pytest.approx(ring * nvlink / NETWORK)
    assert seconds("l40s", 16) / seconds("l40s", 8) == pytest.approx(ring)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "--gpu h1000: not known"),
        (["--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--efficiency", "1.5"], "--efficiency 1.5: expected"),
        (["--calibrate", "--gpu", "h200"], "remove --gpu and --gpus"),
        (
            ["model.language_model={name: someone/never-fetched}"],
            "not on this machine and planning downloads nothing",
        ),
        (
            ["model.vision_tower={library: transformers, name: someone/never-fetched}"],
            "model.vision_tower.name: the configuration of 'someone/never-fetched'",
        ),
        (
            ["model.vision_tower={library: timm, name: 'hf-hub:someone/never-fetched'}"],
            "only known to the hub",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        main([STAGE2, *arguments])
