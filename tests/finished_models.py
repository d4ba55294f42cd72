"""Tiny finished vision-language models, in folders as other programs write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tests.model.tiny import LLAMA, tiny_model
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.verify import reload_here
from vlm_sft.model.lora import with_adapters
from vlm_sft.model.vlm import VisionLanguageModel

SMALL_LLAMA = {**LLAMA, "num_key_value_heads": 2, "max_position_embeddings": 512}


def released_folder(
    out: Path,
    model: VisionLanguageModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: str = "vicuna_v1",
    aspect: Any = "pad",
) -> VisionLanguageModel:
    """Write a folder of `LlavaForConditionalGeneration` with the released names; its model."""
    model = model or tiny_model(language_model=SMALL_LLAMA)
    tokenizer = tokenizer or byte_tokenizer()
    chat_tokenizer = ChatTokenizer.from_name(template, tokenizer)
    export_hf_llava(
        model,
        tokenizer,
        out,
        image_aspect=aspect,
        chat_template=chat_tokenizer.to_jinja(),
        eot_token_ids=chat_tokenizer.eot_token_ids,
        reload=reload_here,
    )
    return model.eval()


def rename_tensors(folder: Path, renamed: Mapping[str, str]) -> None:
    """Replace beginnings of tensor names, the first that fits."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        begin = next((b for b in renamed if name.startswith(b)), "")
        tensors[renamed.get(begin, "") + name.removeprefix(begin)] = value
    save_file(tensors, path, metadata={"format": "pt"})


def change_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(path), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def change_image_processor(folder: Path, **changes: Any) -> None:
    """Change settings of the image processor in both files that have them."""
    change_json(folder / "preprocessor_config.json", **changes)
    path = folder / "processor_config.json"
    nested = json.loads(path.read_text())["image_processor"]
    change_json(path, image_processor={**nested, **changes})


class OriginalParts:
    """A model whose parts are written as the original LLaVA code does.

    Args:
        root: Gets `clip/`, the vision tower as a folder of its own.
        projector_type: `linear` or `mlp2x_gelu`.
        pinpoints: Width and height of canvases, as LLaVA 1.6 has them; None: one square an image.
    """

    def __init__(
        self,
        root: Path,
        projector_type: str = "mlp2x_gelu",
        pinpoints: list[list[int]] | None = None,
    ) -> None:
        self.root = root
        tiling: dict[str, Any] = {}
        if pinpoints is not None:
            grids = [[height // 28, width // 28] for width, height in pinpoints]
            tiling = {"layout": "anyres", "grids": grids}
        self.model = tiny_model(
            language_model={**SMALL_LLAMA, "max_position_embeddings": 4096},
            projector_type=projector_type,
            tiling=tiling,
        ).eval()
        self.clip = root / "clip"
        encoder: Any = self.model.vision_tower.encoder
        encoder.save_pretrained(self.clip)
        preprocessing = {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": 28, "width": 28},
            "size": {"shortest_edge": 28},
            "do_center_crop": True,
            "image_mean": list(self.model.vision_tower.image_spec.mean),
            "image_std": list(self.model.vision_tower.image_spec.std),
            "resample": 3,
        }
        (self.clip / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        self.config: dict[str, Any] = {
            **self.model.language_model.config.to_dict(),
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": str(self.clip),
            "mm_hidden_size": 32,
            "mm_projector_type": projector_type,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 2048,
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }
        if pinpoints is not None:
            self.config |= {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": pinpoints,
                "mm_patch_merge_type": "spatial_unpad",
            }

    def projector(self, prefix: str) -> dict[str, Tensor]:
        """The projector's tensors under the original names."""
        state = self.model.multi_modal_projector.state_dict()
        index = {"linear_1": "0.", "linear_2": "2."}
        named = {
            f"{prefix}model.mm_projector.{index.get(k.split('.')[0], '')}{k.split('.')[-1]}": v
            for k, v in state.items()
        }
        if self.model.image_newline is not None:
            named[f"{prefix}model.image_newline"] = self.model.image_newline.data
        return named

    def full(self, out: Path, *, tower: bool = False, pickled: bool = False) -> Path:
        """A folder with all weights, with or without the vision tower."""
        out.mkdir()
        state = {k: v.clone() for k, v in self.model.language_model.state_dict().items()}
        state |= self.projector("")
        if tower:
            for name, value in self.model.vision_tower.encoder.state_dict().items():
                state[f"model.vision_tower.vision_tower.vision_model.{name}"] = value + 0.01
        if pickled:
            torch.save(state, out / "pytorch_model.bin")
        else:
            save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        self._write_rest(out)
        return out

    def projector_alone(self, out: Path) -> Path:
        """The result of the original stage 1: `mm_projector.bin` and a configuration."""
        out.mkdir()
        torch.save(self.projector(""), out / "mm_projector.bin")
        self._write_rest(out, tokenizer=False, _name_or_path=str(self.base()))
        return out

    def lora(self, out: Path) -> Path:
        """A folder of the original LoRA training; the adapters are put on `self.model`, merged."""
        out.mkdir()
        base = self.base()
        settings = PeftLoraConfig(
            r=2,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        adapted: Any = with_adapters(self.model.language_model, settings)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(out, safe_serialization=False)
        (out / "adapter_model.safetensors").unlink(missing_ok=True)
        state = {
            k.replace(".default.", "."): v for k, v in adapted.state_dict().items() if ".lora_" in k
        }
        torch.save(state, out / "adapter_model.bin")
        torch.save(self.projector("base_model.model."), out / "non_lora_trainables.bin")
        self.model.language_model = adapted.merge_and_unload()
        self._write_rest(out, tokenizer=False)
        return out

    def base(self) -> Path:
        """The language model alone, as a folder of transformers with its tokenizer."""
        folder = self.root / "vicuna"
        if not folder.exists():
            self.model.language_model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    def _write_rest(self, out: Path, *, tokenizer: bool = True, **keys: Any) -> None:
        (out / "config.json").write_text(json.dumps({**self.config, **keys}))
        if tokenizer:
            byte_tokenizer().save_pretrained(out)
