import pytest
import torch

from tests.model.tiny import batch_of, images, rows, sums_of, tiny_model
from tests.rounding import assert_near
from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model.hashing import named_state, tensors_digest
from vlm_sft.model.lora import merged_language_model, target_paths
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel


def adapted(targets: list[str] | str = "all-linear") -> VisionLanguageModel:
    model = tiny_model(lora=LoraConfig(r=2, targets=targets, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters_by_part(model)["adapter"]:
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def test_all_linear_means_every_linear_layer_of_the_language_model_but_its_head() -> None:
    paths = target_paths(tiny_model().language_model, "all-linear")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(paths) == 2 * 7
    assert [path.rsplit(".", 1)[1] for path in paths[:7]] == names
    assert paths[0] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_are_never_in_the_tower_though_it_has_layers_of_those_names(
    targets: list[str] | str,
) -> None:
    model = adapted(targets)
    adapters = [name for name, _ in parameters_by_part(model)["adapter"]]
    assert any("q_proj" in name for name, _ in model.vision_tower.named_parameters())
    assert all(name.startswith("language_model.") for name in adapters)
    assert len(adapters) == 2 * (14 if targets == "all-linear" else 4)


def test_one_layer_can_be_named_by_the_end_of_its_path() -> None:
    model = tiny_model().language_model
    assert target_paths(model, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "'q_prj' matches no linear layer of the language model; did you mean 'q_proj'"),
        ("lm_head", "'lm_head' matches no linear layer"),
        ("zzz", "known: down_proj, gate_proj"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest_name(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(["v_proj", target])


def test_fresh_adapters_change_nothing_and_trained_ones_do() -> None:
    batch = rows([5, -1, 6, 100, 101])
    plain = tiny_model()(batch_of(*batch, images(1))).loss_sum
    fresh = tiny_model(lora=LoraConfig(r=2, dropout=0.0))(batch_of(*batch, images(1))).loss_sum
    assert torch.equal(plain, fresh)
    assert not torch.isclose(adapted()(batch_of(*batch, images(1))).loss_sum, plain)


def test_merging_gives_a_plain_model_with_the_same_loss_and_leaves_the_original() -> None:
    model = adapted()
    before = tensors_digest(named_state(model))
    merged = merged_language_model(model)
    assert tensors_digest(named_state(model)) == before
    assert type(merged) is type(tiny_model().language_model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    whole = VisionLanguageModel(model.vision_tower, model.multi_modal_projector, merged)
    batch = rows([5, -1, 6, 100, 101])
    expected = model(batch_of(*batch, images(1))).loss_sum
    assert_near(whole(batch_of(*batch, images(1))).loss_sum, expected, sums_of(model))


def test_a_model_without_adapters_is_its_own_merge() -> None:
    model = tiny_model()
    assert merged_language_model(model) is model.language_model


def test_diverged_adapters_are_not_merged() -> None:
    model = adapted()
    parameters_by_part(model)["adapter"][0][1].data.fill_(float("nan"))
    with pytest.raises(UserError, match="cannot be merged"):
        merged_language_model(model)


def test_training_with_adapters_moves_them_and_the_projector_and_nothing_else() -> None:
    model = tiny_model(lora=LoraConfig(r=2, dropout=0.0))
    set_trainable(model, {"projector", "adapter"})
    before = {part: tensors_digest(named) for part, named in parameters_by_part(model).items()}
    tower = model.vision_tower.digest()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(batch_of(*rows([5, -1, 6, 100, 101]), images(1))).loss_sum.backward()
        optimizer.step()
    moved = {
        part
        for part, named in parameters_by_part(model).items()
        if tensors_digest(named) != before[part]
    }
    assert moved == {"projector", "adapter"}
    assert model.vision_tower.digest() == tower
