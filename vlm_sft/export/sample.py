"""The image and prompt on which the logits of a checkpoint and of its export are compared."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm_sft.data.image_layout import ImageLayout, Size
from vlm_sft.data.images import to_crops, upright_size
from vlm_sft.data.records import read_records
from vlm_sft.errors import RecordError
from vlm_sft.export.verify import noise_image
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID


class Sample(NamedTuple):
    """An image and ids, on which the logits of the model and of the export are compared.

    Attributes:
        pixels: Crops of the image, `[N, 3, H, W]` uint8; N = 0 for none.
        ids: `[1, T]`, with `IMAGE_TOKEN_ID` once for each token of the image.
        layout: The layout of the image, if the model divides images.
        size: Width and height of the image, likewise.
    """

    pixels: Tensor
    ids: Tensor
    layout: ImageLayout | None = None
    size: Size | None = None


def image_sample(checkpoint: LoadedModel, image: Path, prompt: str) -> Sample:
    """Return the sample of an image file and a question about it.

    Raises:
        ImageError: The image cannot be read.
    """
    shown = checkpoint.load_image(image)
    ids = checkpoint.prompt_ids(user_message(prompt, [image]), [shown.layout])
    sample = Sample(shown.pixels, torch.tensor([ids]))
    if checkpoint.model.layout_rule.needs_sizes:
        sample = sample._replace(layout=shown.layout, size=upright_size(image)[:2])
    return sample


def first_image(checkpoint: LoadedModel) -> Path | None:
    """Return an image of the training data, or None if none of its files exists."""
    for file in checkpoint.config.data.train if checkpoint.config is not None else ():
        if not Path(file.path).exists():
            continue
        for record in read_records(file):
            if isinstance(record, RecordError):
                continue
            for image in record.images:
                if isinstance(image, Path) and image.is_file():
                    return image
    return None


def noise_sample(model: VisionLanguageModel) -> Sample:
    """Return a noise image, and ids with the image between text tokens."""
    spec, rule = model.vision_tower.image_spec, model.layout_rule
    text = torch.arange(16) % causal_lm(model.language_model).get_input_embeddings().weight.shape[0]
    if rule.needs_sizes:
        noise = Image.fromarray(noise_image(spec.size).numpy())
        crops = to_crops(noise, rule, spec, "pad")
        image = torch.full((crops.layout.num_tokens,), IMAGE_TOKEN_ID)
        ids = torch.cat([text[:4], image, text[4:]])
        return Sample(crops.pixels, ids.unsqueeze(0), crops.layout, noise.size)
    size = spec.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    image = torch.full((rule.crop_tokens,), IMAGE_TOKEN_ID)
    return Sample(pixels, torch.cat([text[:4], image, text[4:]]).unsqueeze(0))


@torch.no_grad()
def sample_logits(model: VisionLanguageModel, sample: Sample) -> Tensor:
    """Return the model's logits `[1, T, V]` in float32 on the CPU."""
    training = model.training
    model.eval()
    device = next(model.language_model.parameters()).device
    mask = torch.ones_like(sample.ids, dtype=torch.bool, device=device)
    logits = model.logits(
        sample.ids.to(device),
        pixel_values=sample.pixels,
        layouts=None if sample.layout is None else [sample.layout],
        attention_mask=mask,
    )
    model.train(training)
    return logits.float().cpu()
