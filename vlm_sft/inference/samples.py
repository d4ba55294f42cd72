"""Answers of the model to a few validation records, generated during training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import LoadError
from vlm_sft.data.build import Language
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.tokenize import expand
from vlm_sft.errors import RecordError
from vlm_sft.model.vlm import VisionLanguageModel

MAX_ANSWER_TOKENS = 64
"""Length of the answers that are generated during training."""


@dataclass(frozen=True)
class Answers:
    """Greedy answers of the model to the first question of a few held-out records."""

    config: RunConfig
    language: Language
    model: VisionLanguageModel
    data: SupervisedDataset
    max_new_tokens: int = MAX_ANSWER_TOKENS

    def __call__(self, on_error: Callable[[LoadError], None] | None) -> list[dict[str, Any]]:
        """Return rows of `id`, `question`, `answer`, `expected`, spread over the held-out records.

        Args:
            on_error: Called with each record whose image cannot be read, which has no row; None:
                such a record raises.

        Raises:
            RecordError: An image cannot be read and `on_error` is None.
        """
        count = min(self.config.train.eval_samples, len(self.data))
        rows = []
        for index in (i * len(self.data) // count for i in range(count)):
            try:
                rows.append(self._row(index))
            except RecordError as error:
                if on_error is None:
                    raise
                on_error(LoadError.of(index, error))
        return rows

    def _row(self, index: int) -> dict[str, Any]:
        conversation = self.data.conversation(index)
        first = next(i for i, t in enumerate(conversation.turns) if t.role == "assistant")
        turns = conversation.turns[:first]
        num_images = len(list(Conversation("", turns).image_parts()))
        asked = Conversation(conversation.id, turns, conversation.images[:num_images])
        return {
            "id": conversation.id,
            "question": turns[-1].text if turns else "",
            "answer": self._answer(asked, self._pixels(index, num_images)),
            "expected": conversation.turns[first].text,
        }

    def _pixels(self, index: int, count: int) -> list[torch.Tensor]:
        return [self.data.pixels(index, number) for number in range(count)]

    def _answer(self, asked: Conversation, pixels: list[torch.Tensor]) -> str:
        tower, tokenizer = self.model.vision_tower, self.language.tokenizer
        device = tower.device
        ids = expand(self.language.chat_tokenizer.prompt(asked), tower.num_tokens)
        input_ids = torch.tensor([ids], device=device)
        generated = self.model.generate(
            input_ids,
            torch.ones_like(input_ids),
            torch.stack(pixels).to(device) if pixels else None,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.language.chat_tokenizer.eot_token_ids),
            pad_token_id=self.language.pad_token_id,
        )
        return str(tokenizer.decode(generated[0], skip_special_tokens=True)).strip()
