"""Load an exported folder with transformers alone, and save what the model computes.

    python vlm_sft/export/reload.py FOLDER INPUTS.safetensors OUTPUTS.safetensors

This is a stand-alone program that does not import vlm_sft. An export runs it in a new process, and
`scripts/check_export_consumers` runs it with other versions of transformers.

INPUTS holds `input_ids` [1, T], `pixel_values` [N, 3, H, W] (N may be 0) and `image`, a test image
[H, W, 3] uint8. OUTPUTS receives `logits` [1, T, V] and `pixels`, the test image as the exported
image processor prepares it; its metadata has the missing and unexpected keys of the load.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(argv: Sequence[str]) -> int:
    """Load the folder, compute on the inputs, save the outputs; return the exit code."""
    folder, inputs, outputs = argv
    tensors, metadata = reload(folder, load_file(inputs))
    save_file(tensors, outputs, metadata=metadata)
    return 0


@torch.no_grad()
def reload(
    folder: str, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of OUTPUTS; see the module docstring."""
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    model: Any = loaded.eval()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    sizes = {key: inputs[key] for key in ("image_sizes", "batch_num_images") if key in inputs}
    if sizes:
        pixels = pixels[None]  # the crops of one image
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels.to(model.dtype) if len(pixels) else None,
        **sizes,
    ).logits
    processor: Any = AutoProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    image = Image.fromarray(inputs["image"].numpy())
    found = processor.image_processor(image, return_tensors="pt")
    prepared = found["pixel_values"]
    if "num_patches" not in found:  # InternVL's: the crops of all images
        prepared = prepared[0]
    counts = []
    for width, height in inputs.get("token_sizes", torch.empty(0, 2)).tolist():
        blank = Image.new("RGB", (width, height))
        found = processor(images=blank, text=processor.image_token, return_tensors="pt")
        counts.append(int((found["input_ids"] == processor.image_token_id).sum()))
    metadata = {
        "token_counts": json.dumps(counts),
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "missing": json.dumps(sorted(map(str, info["missing_keys"]))),
        "unexpected": json.dumps(sorted(map(str, info["unexpected_keys"]))),
    }
    return {"logits": logits.float().contiguous(), "pixels": prepared.contiguous()}, metadata


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
