"""Score how well an image agrees with a text: the cosine of their embeddings by CLIP or SigLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.images import open_image
from vlm_sft.errors import ImageError, UserError
from vlm_sft.model.pretrained import load_pretrained, require_all_tensors
from vlm_sft.utils.model_folders import refuse_remote_kernels, report_unused_code

_CLASSES: Final[dict[str, Any]] = {"clip": CLIPModel, "siglip": SiglipModel}
_IMAGES_AT_ONCE: Final = 16
_MAX_ASPECT: Final = 64
_TEXTS_AT_ONCE: Final = 64


@dataclass(frozen=True)
class ClipScore:
    """Agreement of a record's answers with its images.

    Attributes:
        clip: Cosine of the answers' text and an image, the mean over the images; None without any.
        truncated: Whether the text was longer than the model's context and was cut.
    """

    clip: float | None
    truncated: bool


class ClipScorer:
    """Scores records with a model of two towers, an image and a text encoder.

    Texts are padded as the families were trained: CLIP's to the longest of a batch, SigLIP's to the
    whole context.

    Args:
        name: Folder or hub name of transformers' `CLIPModel` or `SiglipModel`, with tokenizer and
            `preprocessor_config.json`.
        device: E.g. `cuda:1`; None uses CUDA if it is available.
        where: The setting that names the model, for messages.

    Raises:
        UserError: It cannot be loaded, is of another kind, or lacks tensors.
    """

    def __init__(self, name: str, *, device: str | None = None, where: str = "clip_model") -> None:
        config = load_pretrained(AutoConfig.from_pretrained, name, where)
        refuse_remote_kernels(where, name, config)
        report_unused_code(where, name, config)
        if config.model_type not in _CLASSES:
            raise UserError(
                f"{where}: {name} holds a {config.model_type!r} model, expected one with an image "
                f"and a text encoder: {' or '.join(_CLASSES)}"
            )
        self._tokenizer: Any = load_pretrained(AutoTokenizer.from_pretrained, name, where)
        self._processor: Any = load_pretrained(AutoImageProcessor.from_pretrained, name, where)
        model, info = load_pretrained(
            _CLASSES[config.model_type].from_pretrained, name, where,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
        require_all_tensors(info, where, name, f"{config.model_type} model")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = model.to(self._device).eval()
        self._context: int = config.text_config.max_position_embeddings
        is_clip = config.model_type == "clip"
        self._padding = "longest" if is_clip else "max_length"
        # SigLIP was trained without a mask of the padding.
        self._inputs = ("input_ids", "attention_mask") if is_clip else ("input_ids",)

    @torch.inference_mode()
    def score(self, records: Sequence[Conversation]) -> list[ClipScore | UserError]:
        """Return the scores of records in order; an error for one with an unreadable image."""
        found: list[ClipScore | UserError] = [ClipScore(None, False)] * len(records)
        images: list[Tensor] = []
        owners: list[int] = []
        for number, record in enumerate(records):
            try:
                pixels = [self._pixels(image) for image in record.images]
            except UserError as error:
                found[number] = error
                continue
            images += pixels
            owners += [number] * len(pixels)
        asked = sorted(set(owners))
        if not asked:
            return found
        texts, truncated = self._embed_texts([answers_of(records[number]) for number in asked])
        shown = self._embed_images(images)
        rows = {number: row for row, number in enumerate(asked)}
        places = torch.tensor([rows[owner] for owner in owners], device=self._device)
        cosines = (shown * texts[places]).sum(1).double()
        sums = cosines.new_zeros(len(asked)).index_add(0, places, cosines)
        means = (sums / torch.bincount(places, minlength=len(asked))).tolist()
        for number, mean, cut in zip(asked, means, truncated, strict=True):
            found[number] = ClipScore(mean, cut)
        return found

    def _pixels(self, source: ImageSource) -> Tensor:
        """Return an image as the model takes it, `[3, H, W]`, so that no whole one stays.

        Raises:
            ImageError: It cannot be opened, or is so narrow that resizing it would take gigabytes.
        """
        image = open_image(source)
        if max(image.size) > _MAX_ASPECT * min(image.size):
            raise ImageError(
                "image_too_large",
                f"{source if isinstance(source, Path) else 'an embedded image'}: one side is over "
                f"{_MAX_ASPECT} times the other, which CLIP's resizing cannot take; crop it",
            )
        pixels: Tensor = self._processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return pixels

    def _embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of images, `[N, D]` of length 1."""
        parts = []
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            pixels = torch.stack(list(images[start : start + _IMAGES_AT_ONCE]))
            output = self._model.get_image_features(pixel_values=pixels.to(self._device))
            parts.append(output.pooler_output)
        return torch.nn.functional.normalize(torch.cat(parts))

    def _embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Return the embeddings of texts, `[N, D]` of length 1, and which of them were cut."""
        whole = self._tokenizer(list(texts), verbose=False)["input_ids"]
        truncated = [len(ids) > self._context for ids in whole]
        # Texts of similar length together; each gets its own place again.
        order = sorted(range(len(texts)), key=lambda place: len(whole[place]))
        parts = []
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            several = [texts[place] for place in order[start : start + _TEXTS_AT_ONCE]]
            inputs = self._tokenizer(
                several, padding=self._padding, truncation=True, max_length=self._context,
                return_tensors="pt",
            ).to(self._device)  # fmt: skip
            output = self._model.get_text_features(**{name: inputs[name] for name in self._inputs})
            parts.append(output.pooler_output)
        embedded = torch.nn.functional.normalize(torch.cat(parts))
        return embedded[torch.tensor(order).argsort().to(self._device)], truncated


def answers_of(record: Conversation) -> str:
    """Return the supervised answers of a record as one text."""
    turns = (turn for turn in record.turns if turn.role == "assistant" and turn.supervised)
    return "\n".join(turn.text.strip() for turn in turns)
