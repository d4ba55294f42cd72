"""GGUF files hold the checkpoint's tensors, and llama.cpp computes what the checkpoint does."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch

from tests.export.gguf_models import CLIP, LLM, SIGLIP, checkpoint
from tests.model.tiny import OPEN_CLIP
from tests.tokenizers_for_tests import load
from vlm_sft.errors import UserError
from vlm_sft.export.formats import ExportOptions
from vlm_sft.export.gguf import compare
from vlm_sft.export.gguf.export import export, obstacles, text_file
from vlm_sft.export.gguf.files import write_gguf
from vlm_sft.export.gguf.template import llama_cpp_template
from vlm_sft.export.gguf.tokenizer import pre_tokenizer
from vlm_sft.export.gguf.vision import vision_file
from vlm_sft.inference.loaded_model import LoadedModel

GROUPED: dict[str, Any] = {**LLM, "num_key_value_heads": 1}
LLAMA_3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
runs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp, which runs llama.cpp, is not installed: pip install 'vlm-sft[gguf]'",
)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a GGUF file in float32, and its metadata."""
    reader = gguf.GGUFReader(path)
    tensors = {
        one.name: np.array(gguf.quants.dequantize(one.data, one.tensor_type)).reshape(
            one.shape[::-1]
        )
        for one in reader.tensors
    }
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


def written(found: LoadedModel, folder: Path, outtype: Any = "f16") -> tuple[Path, Path]:
    model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    write_gguf(model, text_file(found), outtype)
    write_gguf(mmproj, vision_file(found.model, found.image_aspect, "tiny"), "f16")
    return model, mmproj


def unrotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Meta's order in transformers' order: first all even rows of a head, then the odd."""
    per_head = np.split(rows, heads)
    return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in per_head])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_language_models_tensors_are_those_of_the_checkpoint(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    found = checkpoint(
        language_model={**GROUPED, "model_type": kind, "tie_word_embeddings": tied, "head_dim": 32}
    )
    tensors, fields = read(written(found, tmp_path)[0])
    state = found.model.language_model.state_dict()
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, fields["general.architecture"].upper()), 2
    )
    expected = {}
    for key, value in state.items():
        if tied and key == "lm_head.weight":
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        expected[name] = value.to(torch.float16 if value.ndim > 1 else torch.float32).numpy()
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        stored = tensors[name]
        if kind in ("llama", "mistral") and ("attn_q." in name or "attn_k." in name):
            stored = unrotated(stored, 2 if "attn_q." in name else 1)
        assert np.array_equal(stored, value), name
    arch = fields["general.architecture"]
    assert fields[f"{arch}.attention.head_count_kv"] == 1
    assert fields[f"{arch}.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 264


@pytest.mark.parametrize("tower", [SIGLIP, CLIP])
def test_the_towers_tensors_are_those_of_the_checkpoint(
    tower: dict[str, Any], tmp_path: Path
) -> None:
    found = checkpoint(tower=tower)
    tensors, fields = read(written(found, tmp_path)[1])
    clip = tower is CLIP
    depth = 3 if clip else 2  # SigLIP's ends with the layer that is used, -2 of 3
    assert fields["clip.vision.block_count"] == depth
    assert fields["clip.projector_type"] == ("mlp" if clip else "janus_pro")
    projector = found.model.multi_modal_projector.state_dict()
    state = found.model.vision_tower.encoder.state_dict()
    pairs = {
        "v.position_embd.weight": state["embeddings.position_embedding.weight"],
        "v.patch_embd.weight": state["embeddings.patch_embedding.weight"].half(),
        "v.blk.1.attn_out.weight": state["encoder.layers.1.self_attn.out_proj.weight"].half(),
        "v.blk.0.ffn_up.bias": state["encoder.layers.0.mlp.fc1.bias"],
        "v.blk.0.ffn_down.weight": state["encoder.layers.0.mlp.fc2.weight"].half(),
        "mm.0.weight": projector["linear_1.weight"].half(),
        f"mm.{2 if clip else 1}.bias": projector["linear_2.bias"],
    }
    for name, value in pairs.items():
        assert np.array_equal(tensors[name], value.float().numpy()), name
    assert len(tensors) == 16 * depth + 4 + (5 if clip else 3)
    assert not any(name.startswith("v.post_ln") for name in tensors)


def test_eight_bits_are_within_half_a_step_and_the_rest_is_exact(tmp_path: Path) -> None:
    found = checkpoint()
    exact, _ = read(written(found, tmp_path)[0])
    eight, fields = read(written(found, tmp_path, "q8_0")[0])
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for name, value in exact.items():
        step = np.abs(value).max() / 127
        assert np.abs(eight[name] - value).max() <= (0.6 * step if value.ndim > 1 else 0), name


def test_special_tokens_and_the_template_are_in_the_file(tmp_path: Path) -> None:
    found = checkpoint("sentencepiece", "vicuna_v1")
    _, fields = read(written(found, tmp_path)[0])
    prefix = "tokenizer.ggml."
    assert fields[prefix + "model"] == "llama" and fields[prefix + "add_bos_token"] is True
    assert (fields[prefix + "bos_token_id"], fields[prefix + "eos_token_id"]) == (1, 2)
    types = fields[prefix + "token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[-1] == 5 and types[400] == 1
    chatml, _ = checkpoint(), None
    _, fields = read(written(chatml, tmp_path)[0])
    assert fields[prefix + "model"] == "gpt2" and fields[prefix + "pre"] == "gpt-2"
    assert fields[prefix + "eos_token_id"] == 260  # <|im_end|>
    assert fields[prefix + "token_type"][260] == 3


@pytest.mark.parametrize(
    ("name", "pre"),
    [("bytes", "gpt-2"), ("bpe", "gpt-2"), ("qwen", "qwen2"), ("llama_3", "llama-bpe")],
)
def test_llama_cpps_name_of_the_pre_tokenizer(name: str, pre: str) -> None:
    state = json.loads(load(name).backend_tokenizer.to_str())  # type: ignore[attr-defined]
    assert pre_tokenizer(state) == pre
    state["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match=r"pre-tokenizers of GPT-2, SmolLM2.*Whitespace"):
        pre_tokenizer(state)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"projector_type": "linear"}, "GELU after the first layer of a projector.*linear"),
        ({"projector_type": "mlp3x_gelu"}, "a projector of two layers"),
        ({"aspect": "crop"}, "pads images to a square.*image_aspect: crop"),
        ({"tower": {**CLIP, "feature_select": "cls_patch"}}, "drops the class token"),
        ({"tower": {**CLIP, "feature_layers": [-1, -2]}}, "in ascending order"),
        ({"tower": {**SIGLIP, "feature_layers": [-2, -1]}}, "reads one layer of a SigLIP tower"),
        (
            {"tower": {**CLIP, "config": {**CLIP["config"], "model_type": "dinov2"}}},
            "CLIP and SigLIP towers, and this one is Dinov2Model",
        ),
        ({"tower": {**OPEN_CLIP, "grid_pool": 1}}, "averages the feature grid"),
        ({"language_model": {**LLM, "model_type": "granite"}}, "and this one is granite"),
        ({"language_model": {**LLM, "hidden_act": "gelu"}}, "hidden_act = gelu"),
        (
            {
                "language_model": {
                    **LLM,
                    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "this model has yarn",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_by_name(
    keys: dict[str, Any], message: str
) -> None:
    found = obstacles(checkpoint(**keys))
    assert len(found) == 1 and re.search(message, found[0]), found


def test_other_square_colors_are_refused_by_name() -> None:
    found = checkpoint()
    spec = found.model.vision_tower.image_spec
    object.__setattr__(spec, "mean", (0.2, 0.2, 0.2))
    assert "this model was trained with (51, 51, 51)" in obstacles(found)[0]


def test_images_get_the_separators_of_training_in_llama_cpps_messages() -> None:
    body = "{%- for m in messages -%}[{{- m['content'] -}}]{%- endfor -%}"
    template = jinja2.Environment().from_string(llama_cpp_template(body, "\n"))

    def rendered(content: str) -> str:
        return template.render(messages=[{"role": "user", "content": content}])

    assert rendered("<__media_aB1__>What?") == "[<__media_aB1__>\nWhat?]"
    assert rendered("<__media__>\nWhat?") == "[<__media__>\nWhat?]"
    assert rendered("<__media__><__media__>What?") == "[<__media__>\n<__media__>\nWhat?]"
    assert rendered("See<__media__>") == "[See\n<__media__>]"
    assert rendered("no image") == "[no image]"


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    found = checkpoint()
    found.model.language_model.get_input_embeddings().weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"token_embd.weight has a weight of 1e\+06"):
        written(found, tmp_path)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SIZES", ((56, 56), (200, 90), (75, 160)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@runs_llama_cpp
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize(
    ("outtype", "keys"),
    [
        ("f16", {"language_model": {**GROUPED, "rope_parameters": LLAMA_3_ROPE}}),
        ("q8_0", {"language_model": {**GROUPED, "model_type": "qwen3", "head_dim": 32}}),
        ("f16", {"tokenizer": "bpe", "language_model": {**GROUPED, "model_type": "qwen2"}}),
    ],
)
def test_llama_cpp_computes_what_the_checkpoint_does(
    outtype: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    result = export(checkpoint(**keys), tmp_path, ExportOptions(prompt="Which?", outtype=outtype))
    found = result.facts["comparison"]
    assert found["prepared"] < (0.02 if outtype == "f16" else 0.15)
    assert found["between_images"] > 5 * found["prepared"]
    assert found["same_prompts"] and not found["fault"]
    assert [c.evidence for c in result.consumers if c.loads][:2] == ["tried here", "by its source"]


@runs_llama_cpp
@pytest.mark.usefixtures("few_images")
def test_a_clip_tower_is_refused_with_the_measured_difference(tmp_path: Path) -> None:
    found = checkpoint(tower=CLIP)
    refusal = r"differ by up to \d\.\d+ on 3 images, expected at most .*CLIP.*--unverified"
    with pytest.raises(UserError, match=refusal):
        export(found, tmp_path, ExportOptions(prompt="Which?"))


@runs_llama_cpp
@pytest.mark.usefixtures("few_images")
def test_other_tokens_of_a_prompt_are_a_fault_that_is_kept_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_sft.export.gguf.export.llama_cpp_template", lambda text, _: text)
    options = ExportOptions(prompt="Which?", unverified=True)
    result = export(checkpoint(), tmp_path, options)
    assert result.summary.startswith("WARNING: llama.cpp reads the prompt 'Which?' as the tokens")
    assert not any(consumer.loads for consumer in result.consumers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmproj-f16.gguf", "model-f16.gguf"]


def test_without_the_runtime_nothing_is_written_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SIZES", ((56, 56),))
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.exit(\"ModuleNotFoundError: No module named 'xllamacpp'\")")
    monkeypatch.setattr(compare, "_PROGRAM", program)
    with pytest.raises(UserError, match=r"'xllamacpp'.*is not installed.*\[gguf\].*--unverified"):
        export(checkpoint(), tmp_path, ExportOptions(prompt="Which?"))
    result = export(checkpoint(), tmp_path, ExportOptions(prompt="Which?", unverified=True))
    assert result.summary.startswith("WARNING: not compared with llama.cpp")
