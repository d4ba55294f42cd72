"""How likely each of several answers is to each of several questions about one image.

The computation branches twice: the ids up to the image's end are run once and their keys and
values handed to every question; each question is run once and handed to every answer.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.inference.loaded_model import VlmRun
from vlm_sft.model.vlm import decoder_of, head_logits
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

MAX_ANSWERS = 32
"""Answers that are scored together: the keys and values of an image are held once for each."""


@dataclass(frozen=True)
class Branch:
    """A prompt, and answers (stop token included) of at least one id each."""

    prompt: list[int]
    answers: list[list[int]]


def score_branches(
    run: VlmRun, branches: Sequence[Branch], pixels: Tensor
) -> list[tuple[float, ...]]:
    """Summed log-probability of every answer after its prompt.

    Args:
        run: What is asked.
        branches: Prompts that show one image each, all of them the same one, and go on behind it.
        pixels: That image, uint8 `[3, size, size]`.
    """
    if not branches:
        return []
    scorer = _Scorer(run, _shared([branch.prompt for branch in branches]))
    trunk = scorer.trunk(branches[0].prompt, pixels)
    scores: dict[int, tuple[float, ...]] = {}
    order = sorted(range(len(branches)), key=lambda i: len(branches[i].prompt))
    for group in _groups(order, branches):
        found = scorer.score([branches[i] for i in group], copy.deepcopy(trunk))
        scores.update(zip(group, found, strict=True))
    return [scores[i] for i in range(len(branches))]


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many first ids all prompts share: up to the end of the image, never a whole prompt."""
    first, last = min(prompts), max(prompts)
    images = [i for i, token in enumerate(first) if token == IMAGE_TOKEN_ID]
    limit = min(*map(len, (first, last)), images[-1] + 2 if images else 1) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _groups(order: Sequence[int], branches: Sequence[Branch]) -> Iterator[list[int]]:
    """Consecutive branches with up to `MAX_ANSWERS` answers together, at least one branch each."""
    group: list[int] = []
    count = 0
    for index in order:
        answers = len(branches[index].answers)
        if group and count + answers > MAX_ANSWERS:
            yield group
            group, count = [], 0
        group.append(index)
        count += answers
    yield group


class _Scorer:
    def __init__(self, run: VlmRun, shared: int) -> None:
        self._run, self._shared = run, shared
        self._decoder = cast(Any, decoder_of(run.model.language_model))

    @torch.inference_mode()
    def trunk(self, prompt: Sequence[int], pixels: Tensor) -> Any:
        """Keys and values of what all prompts share."""
        ids = torch.tensor([list(prompt[: self._shared])], device=self._run.device)
        embeds = self._run.model.embed(ids, pixels[None].to(self._run.device))
        return self._decoder(inputs_embeds=embeds, use_cache=True).past_key_values

    @torch.inference_mode()
    def score(self, branches: Sequence[Branch], cache: Any) -> list[tuple[float, ...]]:
        """Scores of each branch's answers; `cache` is used up."""
        device = self._run.device
        tails = [branch.prompt[self._shared :] for branch in branches]
        owners = [i for i, branch in enumerate(branches) for _ in branch.answers]
        answers = [answer for branch in branches for answer in branch.answers]
        rows = torch.tensor(owners, device=device)

        cache.batch_repeat_interleave(len(branches))
        seen = torch.ones(len(branches), self._shared, dtype=torch.long, device=device)
        asked, seen = self._forward(tails, cache, seen)
        ends = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        before = asked[torch.arange(len(tails), device=device), ends][rows]

        states = before[:, None]
        if max(map(len, answers)) > 1:
            cache.batch_select_indices(rows)
            told, _ = self._forward([answer[:-1] for answer in answers], cache, seen[rows])
            states = torch.cat([states, told], dim=1)
        return _split(self._sums(states, answers), branches)

    def _forward(
        self, tails: Sequence[Sequence[int]], cache: Any, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of `tails` behind what the cache holds, and the mask of both.

        Tails are padded on the right, behind everything that the padding could disturb; where the
        cache itself holds padding, `seen` hides it, and positions go on from the last real token.
        """
        device = self._run.device
        ids = [torch.tensor(list(tail), dtype=torch.long, device=device) for tail in tails]
        padded = pad_sequence(ids, batch_first=True, padding_value=self._run.pad_token_id)
        real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        mask = torch.cat([seen, real], dim=1)
        steps = torch.arange(padded.shape[1], device=device)
        hidden = self._decoder(
            inputs_embeds=self._run.model.embed(padded, None),
            attention_mask=mask,
            position_ids=seen.sum(dim=1, keepdim=True) + steps,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden, mask

    def _sums(self, states: Tensor, answers: Sequence[Sequence[int]]) -> list[float]:
        """`states[row, i]` predicts id i of that row's answer."""
        places = [
            (row, i, target)
            for row, answer in enumerate(answers)
            for i, target in enumerate(answer)
        ]
        rows, columns, targets = torch.tensor(places, device=states.device).unbind(dim=1)
        logits = head_logits(self._run.model.language_model, states[rows, columns]).float()
        found = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        sums = torch.zeros(len(answers), device=states.device).index_add(0, rows, found)
        return cast(list[float], sums.tolist())


def _split(scores: Sequence[float], branches: Sequence[Branch]) -> list[tuple[float, ...]]:
    remaining = iter(scores)
    return [tuple(next(remaining) for _ in branch.answers) for branch in branches]
