"""Answer many questions about each of several images together, greedily or by sampling.

The ids that all prompts share, up to the end of the image, run once per image. Their keys and
values are copied for every question about the image; then all questions are answered in one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vlm_sft.data.images import ImageCrops
from vlm_sft.inference.generate import generate_ids
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.sampling import Sampler
from vlm_sft.model.language_model import causal_lm, decoder_of, head_logits
from vlm_sft.utils.constants import IMAGE_TOKEN_ID


@dataclass(frozen=True)
class Prompts:
    """Questions about the same images.

    Attributes:
        images: The images of each prompt, in order; none for questions without images.
        prompts: Token ids of each question's prompt, image tokens included.
        max_tokens: Longest answer to each question, in tokens.
        seeds: Seed of each answer that is sampled.
    """

    images: tuple[ImageCrops, ...]
    prompts: list[list[int]]
    max_tokens: list[int]
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: temperature, and probability mass of the tokens drawn from."""

    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        text: Without special tokens and surrounding white space.
        num_tokens: Its number of tokens, with the stop token.
        ended: Whether the model ended it; otherwise it was cut at the limit.
    """

    text: str
    num_tokens: int
    ended: bool


def answer_prompts(
    loaded: LoadedModel,
    groups: Sequence[Prompts],
    *,
    whole_prompts: bool = False,
    sampling: Sampling | None = None,
) -> list[list[Generated]]:
    """Return the answers to the questions of each group, in order.

    An answer does not depend on the other questions, up to the rounding of batched kernels.

    Args:
        loaded: The model.
        groups: Questions by image; all of them go through the model together.
        whole_prompts: Share no prefixes, as sharded weights need.
        sampling: Sample each answer with its seed; None takes the most likely tokens.
    """
    answers: list[list[Generated]] = [[] for _ in groups]
    for alike in _of_equal_prefix(groups):
        chosen = [groups[index] for index in alike]
        found = iter(_answer(loaded, chosen, whole_prompts, sampling))
        for index in alike:
            answers[index] = [next(found) for _ in groups[index].prompts]
    return answers


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Return how many leading ids all prompts share, at most up to the end of the image.

    It is less than the length of every prompt, so each has at least one id of its own to predict
    the answer from. It is 0 without an image.
    """
    # The common prefix of all prompts is that of the first and the last in sorted order.
    first, last = min(prompts), max(prompts)
    images = [i for i, token in enumerate(first) if token == IMAGE_TOKEN_ID]
    limit = min(*map(len, (first, last)), images[-1] + 2 if images else 1) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


class PrefixRunner:
    """Run the decoder on prefixes and on what follows them, reusing its KV cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._decoder = cast(Any, decoder_of(loaded.model.language_model))

    def run_prefixes(self, prefixes: Sequence[Sequence[int]], images: Sequence[ImageCrops]) -> Any:
        """Return the KV cache of prefixes of equal length, one row each.

        Args:
            prefixes: Token ids, with the tokens of their images; or empty without images.
            images: The images of all prefixes, in order; as many for each prefix.
        """
        model, device = self._loaded.model, self._loaded.device
        if not prefixes[0]:
            return DynamicCache(config=causal_lm(model.language_model).config)
        ids = torch.tensor([list(prefix) for prefix in prefixes], device=device)
        image_embeds = torch.cat(self._loaded.encode_images(images)) if images else None
        embeds = model.embed(ids, image_embeds)
        return self._decoder(inputs_embeds=embeds, use_cache=True).past_key_values

    def forward(
        self, tails: Sequence[Sequence[int]], cache: Any, cache_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states of `tails` after the cached tokens, and the mask of both.

        Tails are padded on the right, where causal attention hides the padding from all real
        tokens. Padding that is already in the cache is hidden by `cache_mask`, and positions
        continue from the last real token.
        """
        device = self._loaded.device
        ids = [torch.tensor(list(tail), dtype=torch.long, device=device) for tail in tails]
        padded = pad_sequence(ids, batch_first=True, padding_value=self._loaded.pad_token_id)
        real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        mask = torch.cat([cache_mask, real], dim=1)
        steps = torch.arange(padded.shape[1], device=device)
        hidden = self._decoder(
            inputs_embeds=self._loaded.model.embed(padded, None),
            attention_mask=mask,
            position_ids=cache_mask.sum(dim=1, keepdim=True) + steps,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden, mask


def _of_equal_prefix(groups: Sequence[Prompts]) -> list[list[int]]:
    """Return the numbers of the groups whose shared prefixes are equally long."""
    by_length: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        by_length.setdefault(shared_length(group.prompts), []).append(index)
    return list(by_length.values())


def _answer(
    loaded: LoadedModel,
    groups: Sequence[Prompts],
    whole_prompts: bool,
    sampling: Sampling | None,
) -> list[Generated]:
    """Return the answers to all questions of groups with equally long prefixes."""
    cache = DynamicCache(config=causal_lm(loaded.model.language_model).config)
    # Layers with a sliding window keep a part of the keys, state-space layers none of them.
    if whole_prompts or any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        return _answer_whole_prompts(loaded, groups, sampling)
    return _answer_tails(loaded, groups, sampling)


@torch.inference_mode()
def _answer_tails(
    loaded: LoadedModel, groups: Sequence[Prompts], sampling: Sampling | None
) -> list[Generated]:
    prompts = [prompt for group in groups for prompt in group.prompts]
    limits = [limit for group in groups for limit in group.max_tokens]
    owners = [number for number, group in enumerate(groups) for _ in group.prompts]
    length = shared_length(groups[0].prompts)
    runner, device = PrefixRunner(loaded), loaded.device
    cache = runner.run_prefixes(
        [group.prompts[0][:length] for group in groups],
        [image for group in groups for image in group.images],
    )
    if length:
        cache.batch_select_indices(torch.tensor(owners, device=device))
    mask = torch.ones(len(prompts), length, dtype=torch.long, device=device)
    tails = [prompt[length:] for prompt in prompts]
    hidden, mask = runner.forward(tails, cache, mask)
    ends = torch.tensor([len(tail) - 1 for tail in tails], device=device)
    states = hidden[torch.arange(len(tails), device=device), ends]

    sampler = _sampler(sampling, [seed for group in groups for seed in group.seeds])
    stop_ids = frozenset(loaded.chat_tokenizer.eot_token_ids)
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    """Numbers of the questions that are still being answered: the rows of the cache."""
    while True:
        logits = head_logits(loaded.model.language_model, states)
        tokens = logits.argmax(dim=-1).tolist() if sampler is None else sampler.choose(logits, rows)
        kept = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            found[row].append(token)
            if token not in stop_ids and len(found[row]) < limits[row]:
                kept.append(place)
        if not kept:
            break
        if len(kept) < len(rows):
            places = torch.tensor(kept, device=device)
            cache.batch_select_indices(places)
            mask, rows = mask[places], [rows[place] for place in kept]
        hidden, mask = runner.forward([[found[row][-1]] for row in rows], cache, mask)
        states = hidden[:, -1]
    return [_decoded(loaded, ids) for ids in found]


def _answer_whole_prompts(
    loaded: LoadedModel, groups: Sequence[Prompts], sampling: Sampling | None
) -> list[Generated]:
    """Return the answers by transformers' `generate`, which computes every prompt from its start.

    Questions with the same limit share a batch, so that none is cut because of another one.
    """
    asked = [
        (group.images, prompt, limit)
        for group in groups
        for prompt, limit in zip(group.prompts, group.max_tokens, strict=True)
    ]
    seeds = [seed for group in groups for seed in group.seeds]
    answers = [Generated("", 0, False)] * len(asked)
    for limit in sorted({limit for _, _, limit in asked}):
        numbers = [number for number, (_, _, own) in enumerate(asked) if own == limit]
        images = [image for number in numbers for image in asked[number][0]]
        found = generate_ids(
            loaded.model,
            loaded.chat_tokenizer,
            [asked[number][1] for number in numbers],
            pixel_values=torch.cat([image.pixels for image in images]) if images else None,
            layouts=[image.layout for image in images],
            max_new_tokens=limit,
            sampler=_sampler(sampling, [seeds[number] for number in numbers] if seeds else []),
        )
        for number, ids in zip(numbers, found, strict=True):
            answers[number] = _decoded(loaded, ids)
    return answers


def _sampler(sampling: Sampling | None, seeds: Sequence[int]) -> Sampler | None:
    return None if sampling is None else Sampler(seeds, sampling.temperature, sampling.top_p)


def _decoded(loaded: LoadedModel, ids: list[int]) -> Generated:
    tokenizer: Any = loaded.tokenizer
    text = cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return Generated(text, len(ids), ids[-1] in loaded.chat_tokenizer.eot_token_ids)
