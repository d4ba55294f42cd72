"""What is predicted for a micro-batch against what real ones keep and compute."""

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.model.tiny import (
    CLIP,
    LLAMA,
    OPEN_CLIP,
    TOKENS,
    batch_of,
    images,
    model_config,
    rows,
    tiny_model,
)
from vlm_sft.config.schema import LanguageModelConfig, LoraConfig, ModelConfig, VisionTowerConfig
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.parts import set_trainable
from vlm_sft.planning.meta_model import MetaModel
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.simulate import Footprint, Simulation, TowerSimulation
from vlm_sft.train.live_bytes import LiveBytes

CLIP_LARGE: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
DEEP_LLAMA = {**LLAMA, "num_hidden_layers": 4}
QWEN2 = {**DEEP_LLAMA, "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 24}
TRAINABLE_PARTS = {
    "stage1": {"projector"},
    "lora": {"projector", "adapter"},
    "full": {"projector", "language_model"},
}
RECORDS = ([7, -1, *range(100, 140)], [7, -1, 8, 9, *range(100, 120)], [*range(90, 130)])
"""44, 26 and 40 tokens with their images; what is above 99 is supervised."""


def simulation(config: ModelConfig, method: str, dtype: torch.dtype) -> Simulation:
    meta_model = MetaModel(config, dtype=dtype)
    return Simulation(
        meta_model,
        TowerSimulation(meta_model.tower),
        TRAINABLE_PARTS[method],
        lora=LoraConfig(r=4, dropout=0.05) if method == "lora" else None,
        precision="fp32" if dtype == torch.float32 else "bf16",
    )


@pytest.fixture(scope="module")
def llava_7b() -> MetaModel:
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", config=CLIP_LARGE),
        language_model=LanguageModelConfig(config=VICUNA, tokenizer="bytes"),
    )
    return MetaModel(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def simulated() -> Simulation:
    return simulation(model_config(), "stage1", torch.bfloat16)


def test_the_flops_of_llava_7b_are_those_of_the_published_arithmetic(llava_7b: MetaModel) -> None:
    tower = TowerSimulation(llava_7b.tower)
    stage1 = {"tokens": 600, "attention_pairs": 600**2, "targets": 24, "crops": 1.0}
    stage2 = {"tokens": 822, "attention_pairs": 822**2, "targets": 117, "crops": 0.94}
    published = {"stage1": (stage1, 16.26), "lora": (stage2, 22.32), "full": (stage2, 33.00)}
    for method, (shape, teraflop) in published.items():
        # r = 1: the published figure leaves the adapters' own products out
        lora = LoraConfig(r=1) if method == "lora" else None
        simulated = Simulation(
            llava_7b, tower, TRAINABLE_PARTS[method], lora=lora, precision="bf16"
        )
        flops = simulated.flops
        assert flops.of(**shape) / 1e12 == pytest.approx(teraflop, rel=0.003)
        forward = shape["tokens"] * flops.decoder.forward
        again = flops.of(**shape, policy="full") - flops.of(**shape)
        assert again == pytest.approx(forward, rel=0.02)  # and its attention


class Saved:
    """A tensor for as long as autograd keeps it: the loss has a graph of its own, which goes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def bytes_of(saved: Iterable[Saved]) -> int:
    storages = (kept.tensor.untyped_storage() for kept in saved)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def real_step(
    language: dict[str, Any],
    method: str,
    dtype: torch.dtype,
    policy: CheckpointPolicy,
    projector_type: str = "mlp2x_gelu",
) -> tuple[Footprint, MicroBatch]:
    """A real forward and backward: bytes saved between them, and most alive in each."""
    lora = LoraConfig(r=4, dropout=0.05) if method == "lora" else None
    model = tiny_model(
        language_model=language, lora=lora, dtype=dtype, projector_type=projector_type
    )
    set_trainable(model, TRAINABLE_PARTS[method])
    model.train()
    set_activation_checkpointing(model, policy)
    ids, mask, labels = rows(*RECORDS, tokens=model.layout_rule.crop_tokens)
    pixels = images(2)
    batch = batch_of(ids, mask, labels, pixels)
    given = [t for t in vars(batch).values() if isinstance(t, torch.Tensor) and t is not pixels]
    known = [*model.parameters(), *model.buffers(), *given]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    weights = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        kept = Saved(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.add(kept)
        return kept

    live = LiveBytes([*known, pixels])
    with live:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            loss = model(batch).loss_sum
        forward_peak = live.peak + pixels.nbytes
        alive = bytes_of(saved)
        live.restart()
        loss.backward()
    targets = int((labels[:, 1:] != -100).sum())
    shape = MicroBatch.padded([ids.shape[1]] * 3, targets=targets, images=2, crops=2)
    return Footprint(0, alive, 0, forward_peak, live.peak), shape


@pytest.mark.parametrize(
    ("language", "dtype", "policy", "method"),
    [
        (DEEP_LLAMA, torch.float32, "none", "stage1"),
        (QWEN2, torch.bfloat16, "none", "lora"),
        (GEMMA2, torch.float32, "none", "full"),
        (DEEP_LLAMA, torch.bfloat16, "full", "full"),
        pytest.param(QWEN2, torch.bfloat16, "full", "stage1", marks=pytest.mark.slow),
        pytest.param(QWEN2, torch.bfloat16, "none", "full", marks=pytest.mark.slow),
    ],
)
def test_predicted_saved_and_peak_bytes_are_those_of_a_real_step(
    language: dict[str, Any], dtype: torch.dtype, policy: CheckpointPolicy, method: str
) -> None:
    real, batch = real_step(language, method, dtype, policy)
    config = model_config(language_model=language)
    predicted = simulation(config, method, dtype).footprint(batch, policy)
    if policy == "none":  # checkpointing keeps its inputs outside of autograd
        kept = predicted.images + predicted.activations + predicted.loss
        kept -= 2 * 3 * 28 * 28  # the pixels: alive, and not saved for the backward pass
        assert kept == pytest.approx(real.activations, rel=0.1)
    assert predicted.forward_peak == pytest.approx(real.forward_peak, rel=0.1)
    assert predicted.backward_peak == pytest.approx(real.backward_peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projector_type", ["pixel_shuffle_mlp", "resampler"])
def test_predicted_bytes_of_each_connector_are_those_of_a_real_step(
    projector_type: str, dtype: torch.dtype
) -> None:
    real, batch = real_step(LLAMA, "stage1", dtype, "none", projector_type)
    config = model_config(projector_type=projector_type)
    predicted = simulation(config, "stage1", dtype).footprint(batch, "none")
    kept = predicted.images + predicted.activations + predicted.loss - 2 * 3 * 28 * 28
    assert kept == pytest.approx(real.activations, rel=0.1)
    assert predicted.forward_peak == pytest.approx(real.forward_peak, rel=0.1)
    assert predicted.backward_peak == pytest.approx(real.backward_peak, rel=0.1)


def test_the_flops_of_a_resampler_are_its_projections_and_its_attention() -> None:
    width, hidden, features, queries = 32, 48, 4, 256
    config = model_config(projector_type="resampler")
    meta_model = MetaModel(config, dtype=torch.float32)
    tower = TowerSimulation(meta_model.tower)
    simulated = Simulation(meta_model, tower, {"projector"}, lora=None, precision="fp32")
    # Weights of features, keys, values; of queries; of output and `proj`. The queries of one
    # image are projected once, and the gradient of the frozen features is not computed.
    inputs = features * (2 * width * hidden * 2 + 2 * 2 * hidden**2 * 3)
    outputs = queries * 2 * 3 * hidden**2 * 3
    attention = 2 * 2 * queries * features * hidden * 3.5
    found = simulated.flops.crop - tower.flops
    assert found == pytest.approx(inputs + outputs + attention, rel=0.01)
    assert meta_model.layout_rule.crop_tokens == queries


def test_a_single_row_needs_no_mask_however_long(simulated: Simulation) -> None:
    short, long = (
        simulated.footprint(MicroBatch(1, length, 8, 1, 1, 1, length**2), "none").peak
        for length in (2048, 65536)
    )
    assert long < 32 * short


def test_recomputed_activations_are_not_saved(simulated: Simulation) -> None:
    batch = MicroBatch.padded([64] * 4, targets=20, images=4, crops=4)
    none, selective, full = (
        simulated.footprint(batch, policy).activations for policy in ("none", "selective", "full")
    )
    assert full < 0.3 * none
    assert full < selective < none


def test_memory_grows_with_the_rows_by_the_same_for_each(simulated: Simulation) -> None:
    two, three, eight = (
        simulated.footprint(
            MicroBatch.padded([64] * n, targets=10 * n, images=n, crops=n), "none"
        ).peak
        for n in (2, 3, 8)
    )
    assert eight - three == pytest.approx(5 * (three - two), rel=1e-3)


def test_a_model_of_seven_billion_weights_is_planned_without_memory(
    llava_7b: MetaModel,
) -> None:
    model = llava_7b.build({"projector"})
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616 + 20_979_712
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (llava_7b.num_layers, llava_7b.has_identical_layers) == (32, True)
    assert llava_7b.tower.num_tokens == 576


def test_a_mixture_of_experts_is_refused() -> None:
    mixtral = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2}
    with pytest.raises(UserError, match="mixture of experts"):
        _ = simulation(model_config(language_model=mixtral), "stage1", torch.float32).flops


def test_pytorchs_fused_attention_counts_as_its_four_projections_and_its_square() -> None:
    meta_model = MetaModel(model_config(OPEN_CLIP), dtype=torch.float32)
    block = 5 * (8 + 16) * 32**2 + 4 * 5**2 * 32  # attention 4, MLP 8 squares of the width
    patches = 2 * 4 * 14 * 14 * 3 * 32
    found = TowerSimulation(meta_model.tower).flops
    assert found == 2 * block + patches  # all but the last of three blocks


def test_live_bytes_follow_tensors_from_their_making_to_their_end() -> None:
    there_before = torch.zeros(1000)
    with LiveBytes([there_before]) as live:
        first = torch.ones(100)
        view = first[10:].view(9, 10)
        twice = there_before * 2
        assert live.now == 400 + 4000
        del twice
        assert (live.now, live.peak) == (400, 4400)
        live.restart()
        del first
        assert live.now == 400  # the view still holds it
        del view
    assert (live.now, live.peak) == (0, 400)


def test_the_tower_of_the_tiny_models_gives_its_tokens() -> None:
    assert MetaModel(model_config(CLIP), dtype=torch.float32).tower.num_tokens == TOKENS


def test_a_loss_of_many_chunks_takes_no_more_logits_than_one_of_two(simulated: Simulation) -> None:
    two, sixteen = (
        simulated.footprint(MicroBatch(8, 2048, targets, 1, 1, 8, 8 * 2048**2), "none").loss
        for targets in (1024, 8192)
    )
    width, ids = 48, 8
    # Gradients of states, in their numbers, and the loss of each.
    assert sixteen - two == pytest.approx(7168 * (width * 2 + ids), rel=0.1)
