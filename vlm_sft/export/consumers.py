"""List which programs load an exported folder, by layout and configuration, and why not.

The rules are those of the programs' sources in the versions that are named: vLLM's
`model_executor/models/{registry,llava}.py` and `layers/activation.py`, SGLang's
`srt/models/llava.py` and `srt/multimodal/processors/llava.py`, mistral.rs'
`vision_models/llava/config.rs`, llama.cpp's `conversion/llava.py`, lmms-eval's
`models/simple/{llava,llava_hf,internvl_hf}.py` and LLaVA's `model/builder.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from transformers import PretrainedConfig, __version__

TRANSFORMERS: Final = "transformers >= 5.6"
TRANSFORMERS_5_5: Final = "transformers 5.5"
VLLM: Final = "vLLM 0.32"
SGLANG: Final = "SGLang 0.5"
LLAMA_CPP: Final = "llama.cpp"
LMMS_EVAL: Final = "lmms-eval 0.7"
MISTRAL_RS: Final = "mistral.rs 0.9"

PROGRAMS: Final = (
    TRANSFORMERS,
    TRANSFORMERS_5_5,
    VLLM,
    SGLANG,
    LLAMA_CPP,
    LMMS_EVAL,
    MISTRAL_RS,
)
"""The programs that a table of consumers always has, in this order."""

Evidence = Literal["tried here", "by its source"]


@dataclass(frozen=True)
class Consumer:
    """A program, and whether it loads an exported folder.

    Attributes:
        name: The program with its version.
        loads: Whether it loads the folder and computes with it what the checkpoint does.
        reason: What was compared, or what the program lacks.
        evidence: "tried here": this kind of folder was loaded with the program; "by its source":
            its source says so, and nothing was run.
    """

    name: str
    loads: bool
    reason: str
    evidence: Evidence = "by its source"


def hf_consumers(config: PretrainedConfig) -> list[Consumer]:
    """Return the table for a folder of transformers with this configuration."""
    found: Any = config
    return [
        Consumer(TRANSFORMERS, True, f"this folder was compared in {__version__}", "tried here"),
        Consumer(
            TRANSFORMERS_5_5,
            True,
            "folders of this kind were compared in 5.5.4"
            if found.model_type in ("llava", "fast_vlm")
            else "the tensors have the released names",
            "tried here" if found.model_type in ("llava", "fast_vlm") else "by its source",
        ),
        _vllm(found),
        _sglang(found),
        Consumer(
            LLAMA_CPP,
            False,
            "its converter refuses the vision towers of LLaVA folders; export --to gguf",
        ),
        _lmms_eval(found),
        _mistral_rs(found),
    ]


def llava_consumers(
    tree: Mapping[str, Any], contents: str, *, tower_is_readable: bool = True
) -> list[Consumer]:
    """Return the table for a folder of the original LLaVA code.

    Args:
        tree: Its `config.json`.
        contents: `full`, `lora` or `projector`.
        tower_is_readable: Whether older versions of transformers read the named vision tower.
    """
    class_name = tree["architectures"][0]
    no_class = f"it has no {class_name}; export --to hf"
    is_siglip = "siglip" in str(tree["mm_vision_tower"]).lower()
    # LLaVA puts adapters and projectors on its Llama class only.
    is_llama = class_name == "LlavaLlamaForCausalLM"
    is_mistral = class_name == "LlavaMistralForCausalLM"
    only_next = is_siglip or not (is_llama or (is_mistral and contents == "full"))
    code = "LLaVA-NeXT's code" if only_next else "LLaVA 1.2"
    whole = contents == "full"
    served = "" if whole else "it loads folders with all weights only; export with --merge"
    return [
        Consumer("vlm_sft", True, "this folder was compared (model.from_checkpoint)", "tried here"),
        _llava_code(tree, code, tower_is_readable),
        Consumer(TRANSFORMERS, False, no_class),
        Consumer(TRANSFORMERS_5_5, False, no_class),
        Consumer(VLLM, False, no_class),
        Consumer(SGLANG, not served, served or f"it has {class_name}, with a CLIP or SigLIP tower"),
        Consumer(
            LLAMA_CPP,
            False,
            "its legacy scripts split such a folder, but it computes CLIP towers wrongly",
        ),
        Consumer(
            LMMS_EVAL, whole, "--model llava, with LLaVA's code installed" if whole else served
        ),
        Consumer(MISTRAL_RS, False, no_class),
    ]


def _llava_code(tree: Mapping[str, Any], code: str, tower_is_readable: bool) -> Consumer:
    if not tower_is_readable:
        lacks = (
            f"{Path(tree['mm_vision_tower']).name} was saved by transformers 5.6 or newer, of "
            "which older versions read no tensor; name the released vision tower with --tower"
        )
        return Consumer(code, False, lacks)
    is_tried = tree["architectures"] == ["LlavaLlamaForCausalLM"] and code.endswith("1.2")
    if is_tried and tree.get("image_aspect_ratio") != "anyres":
        return Consumer(
            code, True, "folders of this kind were compared in 1.2.2 (float16)", "tried here"
        )
    return Consumer(code, True, "class, settings and names are its own")


def peft_consumers(config: PretrainedConfig) -> list[Consumer]:
    """Return the table for adapters that go with an exported base of this configuration."""
    merge = "it does not load the projector's weights from adapters; export --to hf merges them"
    return [
        Consumer(
            TRANSFORMERS, True, f"with peft: compared on the base in {__version__}", "tried here"
        ),
        Consumer(TRANSFORMERS_5_5, True, "with peft 0.18 or newer on the base"),
        Consumer(VLLM, False, merge),
        Consumer(SGLANG, False, merge),
        Consumer(LLAMA_CPP, False, merge),
        Consumer(LMMS_EVAL, False, "llava_hf loads no adapters; export --to hf merges them"),
        Consumer(MISTRAL_RS, False, merge),
    ]


def gguf_consumers(loads: bool, reason: str, *, tried: bool) -> list[Consumer]:
    """Return the table for GGUF files of a language model and an image encoder.

    Args:
        loads: Whether llama.cpp computes with them what the checkpoint does.
        reason: What was compared, or what llama.cpp computes differently.
        tried: Whether llama.cpp was run.
    """
    no_encoder = "it reads no LLaVA image encoder from GGUF; export --to hf"
    return [
        Consumer(TRANSFORMERS, False, no_encoder),
        Consumer(TRANSFORMERS_5_5, False, no_encoder),
        Consumer(VLLM, False, no_encoder),
        Consumer(SGLANG, False, no_encoder),
        Consumer(LLAMA_CPP, loads, reason, "tried here" if tried else "by its source"),
        Consumer("ollama", loads, "it runs llama.cpp's image encoder" if loads else reason),
        Consumer(LMMS_EVAL, loads, "--model openai with llama-server" if loads else reason),
        Consumer(MISTRAL_RS, False, no_encoder),
    ]


def describe_consumers(found: Sequence[Consumer]) -> str:
    """Return a sentence on which programs load an exported folder and which do not, and why."""
    loading = [c.name if c.evidence == "tried here" else f"{c.name} ({c.reason})" for c in found]
    loading = [text for text, consumer in zip(loading, found, strict=True) if consumer.loads]
    others = [f"{c.name} ({c.reason})" for c in found if not c.loads]
    text = f"would load the exported folder: {', '.join(loading)}"
    return f"{text}; would not: {', '.join(others)}" if others else text


def consumer_rows(found: Sequence[Consumer]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table: program, loads or not, evidence, reason."""
    return [
        (
            consumer.name,
            "loads" if consumer.loads else "does not",
            consumer.evidence,
            consumer.reason,
        )
        for consumer in found
    ]


def _vllm(config: Any) -> Consumer:
    classes = ("llava", "llava_next", "llava_onevision")
    return _served(VLLM, config, classes, towers=("clip_vision_model", "siglip_vision_model"))


def _sglang(config: Any) -> Consumer:
    return _served(SGLANG, config, ("llava",), towers=("clip_vision_model",))


def _mistral_rs(config: Any) -> Consumer:
    """Return the row of mistral.rs, which takes what LLaVA 1.5 and 1.6 of Llama and Mistral are."""
    found = _served(MISTRAL_RS, config, ("llava", "llava_next"), towers=("clip_vision_model",))
    text = config.text_config.model_type
    lacks = None
    if not found.loads:
        return found
    if text not in ("llama", "mistral"):
        lacks = f"it holds Llama and Mistral in LLaVA, this one is {text}"
    elif config.tie_word_embeddings:
        lacks = "it does not tie the output head of LLaVA to the embeddings"
    elif config.vision_config.hidden_act != "quick_gelu":
        lacks = f"it computes quick_gelu in CLIP, this one has {config.vision_config.hidden_act}"
    if lacks is not None:
        return Consumer(MISTRAL_RS, False, lacks)
    if config.model_type == "llava" and text == "llama":
        loaded = "a folder of this kind loads in 0.9.5; its answers were not compared"
        return Consumer(MISTRAL_RS, True, loaded, "tried here")
    return found


def _lmms_eval(config: Any) -> Consumer:
    models = {
        "llava": "llava_hf",
        "llava_next": "llava_hf",
        "llava_onevision": "llava_hf",
        "internvl": "internvl_hf",
    }
    if config.model_type not in models:
        return Consumer(LMMS_EVAL, False, f"it has no model for {config.model_type}")
    return Consumer(LMMS_EVAL, True, f"--model {models[config.model_type]}, batch size 1")


def _served(
    name: str, config: Any, classes: tuple[str, ...], *, towers: tuple[str, ...]
) -> Consumer:
    """Return whether a server supports this class, tower and projector."""
    tower = config.vision_config.model_type
    if config.model_type not in classes:
        return Consumer(name, False, f"it is not known to support {config.model_type} with {tower}")
    if tower not in towers:
        return Consumer(name, False, f"it supports {_listed(towers)} towers, this one is {tower}")
    if not isinstance(config.vision_feature_layer, int):
        return Consumer(name, False, "it supports one feature layer, this model has several")
    if config.projector_hidden_act == "linear":
        return Consumer(name, False, "it has no linear projector (projector_hidden_act: linear)")
    kind = config.text_config.model_type
    return Consumer(name, True, f"if it supports the language model ({kind})")


def _listed(towers: tuple[str, ...]) -> str:
    return " and ".join(name.removesuffix("_vision_model").upper() for name in towers)
