"""Compiled layers: the same losses, no compiling after the first batches, clean names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.model.tiny import batch_of, images, rows, sums_of, tiny_model
from tests.rounding import BACKWARD, assert_near, rounding, terms_of_a_run
from tests.tiny_runs import rows as read_rows
from tests.tiny_runs import run
from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.batch import Batch
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.language_model import causal_lm, decoder_layers
from vlm_sft.model.packed_attention import install_packed_attention
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.compile import compile_errors, compile_layers, eager
from vlm_sft.utils.constants import Segment

# The compiler looks at tensors in ways that torch warns of, and hides that elsewhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, alpha=8, dropout=0.2, targets=["q_proj", "down_proj"])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adapted(
    policy: CheckpointPolicy = "none", lora: LoraConfig | None = LORA
) -> VisionLanguageModel:
    model = tiny_model(lora=lora)
    set_trainable(model, {"projector", "adapter"} if lora else {"projector"})
    set_activation_checkpointing(model, policy)
    return model.train()


def learned(model: nn.Module, lengths: list[int]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of records of these numbers of words."""
    torch.manual_seed(sum(lengths))  # dropout
    model.zero_grad(set_to_none=True)
    ids = rows(*([5, -1] + [6, 100] * length for length in lengths))
    output = model(batch_of(*ids, images(len(lengths))))
    output.loss_sum.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss_sum.item(), found


@pytest.mark.parametrize(
    ("policy", "lora", "backend"),
    [
        ("none", None, "eager"),
        pytest.param("selective", LORA, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_after_the_first_batches_nothing_is_compiled_again(
    policy: CheckpointPolicy, lora: LoraConfig | None, backend: str
) -> None:
    model, plain = adapted(policy, lora), adapted("none", lora)
    compile_layers(model, CPU, backend=backend)
    for lengths in ([3, 5], [4, 4], [6]):  # padded, not padded, a single record
        learned(model, lengths)
    # One compilation serves all layers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([2, 9], [7, 7], [11], [1, 2, 3], [13, 4, 8, 2], [5, 5, 5], [30]):
            loss, gradients = learned(model, lengths)
            expected, reference = learned(plain, lengths)
            terms = sums_of(plain)
            assert loss == pytest.approx(expected, rel=rounding(terms))
            for name, gradient in reference.items():
                assert_near(gradients[name], gradient, BACKWARD * terms)


def test_names_stay_and_eager_steps_are_the_plain_ones() -> None:
    model, plain = adapted(), adapted()
    compile_layers(model, CPU, backend="eager")
    assert list(model.state_dict()) == list(plain.state_dict())
    with eager(True):
        loss, gradients = learned(model, [3, 5])
    expected, reference = learned(plain, [3, 5])
    assert loss == expected and all(torch.equal(gradients[n], reference[n]) for n in reference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_what_cannot_be_compiled_is_told_in_one_sentence() -> None:
    model = adapted()
    layer = decoder_layers(model.language_model)[0]
    layer.input_layernorm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compile_layers(model, CPU, backend="eager")
    told = r"train.compile: a layer of the language model cannot be compiled \(Unsupported: [^\n]+$"
    with pytest.raises(ConfigError, match=told), compile_errors(True):
        learned(model, [3, 5])


def test_a_missing_compiler_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="C\\+\\+ compiler 'no-such-compiler' that a CPU needs"):
        compile_layers(adapted(), CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton, which a GPU needs"):
        compile_layers(adapted(), torch.device("cuda"))


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = adapted()
    causal_lm(model.language_model).config.num_hidden_layers += 1
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 3 decoder layers"):
        compile_layers(model, CPU)


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_repository")
def test_a_compiled_run_loses_as_the_plain_one_and_its_checkpoint_has_the_same_names(
    tmp_path: Path,
) -> None:
    asked = ["projector=null", "train.max_steps=3", "train.eval_samples=1"]
    for name in ("false", "true"):
        compiled = f"train.compile={name}"
        assert run("stage2", tmp_path / name, *asked, compiled, config="stage2_lora") == 0
    plain, compiled_losses = (
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("false", "true")
    )
    assert (
        compiled_losses == pytest.approx(plain, rel=rounding(terms_of_a_run())) and len(plain) == 3
    )
    for file in ("adapter/adapter_model.safetensors", "projector.safetensors"):
        ours, theirs = (load_file(tmp_path / n / "final" / file) for n in ("false", "true"))
        assert ours.keys() == theirs.keys()


def test_layers_are_compiled_around_packed_attention_and_rows_of_any_segments_fit() -> None:
    model, plain = adapted(lora=None), adapted(lora=None)
    for each in (model, plain):
        set_trainable(each, {"projector", "language_model"})
        install_packed_attention(causal_lm(each.language_model))
    compile_layers(model, CPU, backend="eager", packed=True)

    def losses(segments: list[Segment]) -> tuple[float, float]:
        count = sum(length for length, _ in segments)
        ids = torch.randint(5, 90, (1, count), generator=torch.Generator().manual_seed(count))
        sources = torch.arange(0, count - 1, 3)
        batch = Batch(
            ("record",),
            ids,
            attention_mask=None,
            segments=tuple(segments),
            target_positions=sources,
            target_ids=ids[0, sources + 1],
            target_records=torch.zeros_like(sources),
            unique_target_positions=sources,
        )
        found = []
        for each in (model, plain):
            output = each(batch)
            output.loss_sum.backward()
            found.append(float(output.loss_sum.detach()))
        return found[0], found[1]

    for segments in ([(7, -1), (5, -1)], [(9, -1), (2, 0), (4, 0)]):
        losses(segments)
    with torch.compiler.set_stance("fail_on_recompile"):
        for segments in ([(3, -1), (8, -1), (6, 1)], [(20, -1)], [(4, -1)] * 6):
            ours, expected = losses(segments)
            assert ours == pytest.approx(expected, rel=rounding(sums_of(plain)))
