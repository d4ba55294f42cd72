"""Generation for a batch of prompts: greedy, or sampled with a seed for each prompt."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.inference.sampling import Sampler
from vlm_sft.model.vlm import VisionLanguageModel


@torch.no_grad()
def generate_greedy(
    model: VisionLanguageModel,
    chat_tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    pixel_values: Tensor | None = None,
    layouts: Sequence[ImageLayout] | None = None,
    image_embeds: Sequence[Tensor] | None = None,
    max_new_tokens: int,
) -> list[str]:
    """Return one response per prompt, without special tokens and surrounding white space.

    Args:
        model: In evaluation mode.
        chat_tokenizer: Its tokenizer decodes; its template says which tokens end a response.
        prompts: Token ids of each prompt, with `IMAGE_TOKEN_ID` once per image token.
        pixel_values: The crops of all images in order, uint8 `[N, 3, H, W]`; or None.
        layouts: The layout of each image; None: every image is one crop.
        image_embeds: Instead of `pixel_values`, what the language model sees of each image,
            `[tokens, D]`.
        max_new_tokens: Longer responses are cut.
    """
    tokenizer: Any = chat_tokenizer.tokenizer
    generated = generate_ids(
        model, chat_tokenizer, prompts, pixel_values=pixel_values, layouts=layouts,
        image_embeds=image_embeds, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    return [cast(str, tokenizer.decode(row, skip_special_tokens=True)).strip() for row in generated]


@torch.no_grad()
def generate_ids(
    model: VisionLanguageModel,
    chat_tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    pixel_values: Tensor | None = None,
    layouts: Sequence[ImageLayout] | None = None,
    image_embeds: Sequence[Tensor] | None = None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
) -> list[list[int]]:
    """Return the token ids of one response per prompt, up to its stop token, which is included.

    Args:
        model: As for `generate_greedy`, like all arguments but the last.
        chat_tokenizer: See there.
        prompts: See there.
        pixel_values: See there.
        layouts: See there.
        image_embeds: See there.
        max_new_tokens: See there.
        sampler: Chooses the tokens, row by row; None takes the most likely ones.
    """
    tokenizer: Any = chat_tokenizer.tokenizer
    device, pad_token_id = model.vision_tower.device, padding_id(tokenizer)
    width = max(map(len, prompts))
    # Padded on the left: generation continues at the last position of every row.
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[row, width - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "eos_token_id": list(chat_tokenizer.eot_token_ids),
        "pad_token_id": pad_token_id,
    }
    if sampler is not None:
        settings["logits_processor"] = LogitsProcessorList([_SampledOnly(sampler)])
    if image_embeds is None:
        # The one entry point that FSDP gathers sharded weights for (see `train.fsdp.shard`).
        pixels = None if pixel_values is None else pixel_values.to(device)
        generated = model.generate(input_ids, attention_mask, pixels, layouts, **settings)
    else:
        embeds = model.embed(input_ids, torch.cat(list(image_embeds)))
        generated = model.generate_from_embeds(embeds, attention_mask, **settings)
    stop_ids = frozenset(chat_tokenizer.eot_token_ids)
    return [_up_to_stop(row, stop_ids) for row in generated.tolist()]


def _up_to_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


class _SampledOnly(LogitsProcessor):
    """Leave only the sampled token of each row, which greedy decoding then takes."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, _input_ids: Any, scores: Any) -> Any:
        chosen = self._sampler.choose(scores, range(len(scores)))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)
