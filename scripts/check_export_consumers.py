"""Load exports of tiny models with other versions of transformers: check_export_consumers.py DIR.

    python scripts/check_export_consumers.py side              # 5.5.4 and the installed version
    python scripts/check_export_consumers.py side 5.5.4 5.8.0  # these

Makes one environment a version in DIR, from the package index: transformers and the packages that
it pins, in front of everything that is installed here. Exports a model of every kind that an export
holds, loads each folder in each environment in a process of its own, and prints a table. Exit code
1 if a tensor is missing or unexpected, or logits differ by more than 1e-5.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import LanguageModelConfig, ModelConfig, VisionTowerConfig
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.verify import noise_image, reload_here, reload_in_new_process
from vlm_sft.model.build import build_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

LIMIT: Final = 1e-5
INSTALLED_HERE: Final = f"""\
{sysconfig.get_path("purelib")}
import sys; sys.modules["mistral_common"] = None
"""
"""Makes every other package the one that is installed here; packages found first win. The optional
mistral_common goes with one version of transformers and breaks the import of others."""
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
LLAMA: Final[dict[str, Any]] = {"model_type": "llama", "vocab_size": 300, **SIZES}
VIT: Final[dict[str, Any]] = {"image_size": 28, "patch_size": 14, **SIZES}
GROUPED: Final[dict[str, Any]] = {**LLAMA, "num_key_value_heads": 1}
GPT2: Final[dict[str, Any]] = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
}


def main(argv: Sequence[str]) -> int:
    """Export, load everywhere, print the table; returns the exit code."""
    arguments = _parse(argv)
    versions = arguments.versions or ["5.5.4", version("transformers")]
    pythons = {name: environment(arguments.directory, name) for name in versions}
    rows = []
    with tempfile.TemporaryDirectory(prefix="vlm_sft-exports-") as scratch:
        for case in cases():
            folder = Path(scratch, re.sub(r"\W+", "-", case.name))
            inputs, expected = exported(case, folder)
            for name, python in pythons.items():
                rows.append(compared(case, name, folder, inputs, expected, python))
                print(rows[-1], flush=True)
    failed = [row for row in rows if not row.good]
    print(f"{len(rows) - len(failed)} of {len(rows)} loads are exact (within {LIMIT:g})")
    return 1 if failed else 0


@dataclass(frozen=True)
class Case:
    """One kind of model that an export holds."""

    name: str
    tower: dict[str, Any]
    language_model: dict[str, Any]
    projector_type: str = "mlp2x_gelu"


@dataclass(frozen=True)
class Row:
    """One load."""

    case: str
    version: str
    model_class: str
    missing: int
    unexpected: int
    difference: float
    fault: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is missing, unexpected or different."""
        return not (self.fault or self.missing or self.unexpected) and self.difference <= LIMIT

    def __str__(self) -> str:
        if self.fault:
            return f"{self.case:<22} {self.version:<8} FAILED: {self.fault}"
        return (
            f"{self.case:<22} {self.version:<8} {self.model_class:<30} {self.missing:>3} missing "
            f"{self.unexpected:>3} unexpected  difference {self.difference:.1e}"
        )


def cases() -> Iterator[Case]:
    """Yield every kind of tower, projector and language model once."""
    clip = hf_tower("clip_vision_model")
    yield Case("CLIP, Llama", clip, LLAMA)
    yield Case("CLIP, tied Llama", clip, {**LLAMA, "tie_word_embeddings": True})
    yield Case("CLIP, linear", clip, LLAMA, "linear")
    yield Case("CLIP, two layers", {**clip, "feature_layers": [-2, -1]}, LLAMA)
    yield Case("CLIP, Qwen2", clip, {**GROUPED, "model_type": "qwen2"})
    yield Case("CLIP, Mixtral", clip, {**GROUPED, "model_type": "mixtral", "num_local_experts": 2})
    yield Case("CLIP, Granite", clip, {**LLAMA, "model_type": "granite", "logits_scaling": 8.0})
    yield Case("CLIP, GPT-2", clip, GPT2)
    yield Case("SigLIP, Llama", hf_tower("siglip_vision_model"), LLAMA)
    yield Case("DINOv2, Llama", hf_tower("dinov2"), LLAMA)
    yield Case("timm ResNet", timm_tower("resnet18"), LLAMA)
    yield Case("timm Lite0, pooled", timm_tower("tf_efficientnet_lite0", grid_pool=1), LLAMA)


def hf_tower(model_type: str) -> dict[str, Any]:
    """Return a small random tower of transformers."""
    return {"library": "transformers", "config": {"model_type": model_type, **VIT}}


def timm_tower(architecture: str, **keys: Any) -> dict[str, Any]:
    """Return a random convolutional net of timm on small images."""
    config = {"architecture": architecture}
    return {
        "library": "timm",
        "config": config,
        "feature_layers": [-1],
        "image_size": 96,
        **keys,
    }


def exported(case: Case, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Export a random model; return inputs for `reload.py` and the logits that are expected."""
    config = ModelConfig(
        vision_tower=VisionTowerConfig(**case.tower),
        projector_type=case.projector_type,
        language_model=LanguageModelConfig(config=case.language_model, tokenizer="bytes"),
    )
    model = build_model(config, dtype=torch.float32, seed=1).eval()
    report = export_hf_llava(
        model,
        byte_tokenizer(),
        folder,
        image_aspect="pad",
        chat_template=None,
        reload=reload_here,
    )
    ids, pixels = sample(model)
    with torch.no_grad():
        logits = model.logits(ids, pixel_values=pixels)
    inputs = {
        "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_ID, report.image_token_id),
        "pixel_values": model.vision_tower.normalized(pixels),
        "image": noise_image(model.vision_tower.image_spec.size),
    }
    return inputs, logits


def sample(model: VisionLanguageModel) -> tuple[Tensor, Tensor]:
    """Return ids `[1, T]` around one image of noise, and the image."""
    tower = model.vision_tower
    shape = (1, 3, tower.image_spec.size, tower.image_spec.size)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ids = [5, 6, 7, *[IMAGE_TOKEN_ID] * model.layout_rule.crop_tokens, 8, 9]
    return torch.tensor([ids]), pixels


def compared(
    case: Case,
    name: str,
    folder: Path,
    inputs: dict[str, Tensor],
    expected: Tensor,
    python: str,
) -> Row:
    """Load a folder in one environment and compare its logits."""
    try:
        found = reload_in_new_process(folder, inputs, python=python)
    except UserError as error:
        return Row(case.name, name, "", 0, 0, float("inf"), str(error))
    difference = (found.logits[..., : expected.shape[-1]] - expected).abs().max().item()
    missing, unexpected = len(found.missing_keys), len(found.unexpected_keys)
    return Row(case.name, name, found.model_class, missing, unexpected, difference)


def environment(directory: Path, wanted: str) -> str:
    """Return the interpreter that has this version of transformers; made if it is not there."""
    if wanted == version("transformers"):
        return sys.executable
    home = directory / f"transformers-{wanted}"
    python = home / "bin" / "python"
    ready = home / "ready.json"
    if not ready.exists():
        venv.create(home, with_pip=False, clear=True)
        packages = next((home / "lib").glob("python3*")) / "site-packages"
        install(packages, f"transformers=={wanted}")
        metadata = next(packages.glob("transformers-*.dist-info")) / "METADATA"
        pins = pinned(metadata.read_text(encoding="utf-8"))
        install(packages, *pins)
        (packages / "zz_installed_here.pth").write_text(INSTALLED_HERE)
        ready.write_text(json.dumps(pins))
    return str(python.absolute())


def pinned(metadata: str) -> list[str]:
    """Return the requirements on packages whose versions go with transformers' own."""
    found = re.findall(
        r"^Requires-Dist: ((?:huggingface[-_]hub|tokenizers)[^;\n]*)$", metadata, re.M
    )
    return [requirement.strip() for requirement in found]


def install(packages: Path, *requirements: str) -> None:
    """Install packages without their dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(packages), *requirements], check=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_export_consumers.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where environments are kept")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="versions of transformers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
