"""Measure how exactly llama.cpp computes exported models: python scripts/measure_gguf.py.

Exports tiny random models (`tests/export/gguf_models.py`) to GGUF, also one that an export refuses,
and prints the rows of the table in docs/exports.md: the largest difference of log-probabilities
over the whole vocabulary on 20 images, as `vlm-sft export --to gguf` measures it.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests/export/gguf_models.py

from tests.export.gguf_models import CLIP, LLM, SIGLIP, checkpoint
from vlm_sft.commands.run_command import run_command
from vlm_sft.export.formats import ExportOptions
from vlm_sft.export.gguf.export import export

GROUPED: Final[dict[str, Any]] = {**LLM, "num_key_value_heads": 1}
QWEN_2: Final[dict[str, Any]] = {**GROUPED, "model_type": "qwen2"}
QWEN_3: Final[dict[str, Any]] = {
    **GROUPED,
    "model_type": "qwen3",
    "head_dim": 32,
    "tie_word_embeddings": True,
}
CASES: Final[list[tuple[str, Any, dict[str, Any]]]] = [
    ("SigLIP, Llama, f16", "f16", {}),
    ("SigLIP, Llama, q8_0", "q8_0", {}),
    (
        "SigLIP (layer -1), Qwen2, f16",
        "f16",
        {"tower": {**SIGLIP, "feature_layers": [-1]}, "language_model": QWEN_2},
    ),
    ("SigLIP, Qwen3, tied, f16", "f16", {"language_model": QWEN_3}),
    ("CLIP, Llama, f16", "f16", {"tower": CLIP}),
]


def main(argv: Sequence[str]) -> int:
    """Print a row for each case; returns the exit code."""
    if argv:
        print(__doc__)
        return 0 if set(argv) <= {"-h", "--help"} else 2
    for name, outtype, keys in CASES:
        options = ExportOptions(prompt="Which?", outtype=outtype, unverified=True)
        with tempfile.TemporaryDirectory(prefix="vlm_sft-gguf-") as folder:
            found = export(checkpoint(**keys), Path(folder), options).facts["comparison"]
        print(
            f"| {name} | {found['prepared']:.4f} | {found['as_given']:.2f} | "
            f"{found['between_images']:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
