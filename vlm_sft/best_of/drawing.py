"""Draw samples: several answers of a model to each question."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from vlm_sft.best_of.questions import Question
from vlm_sft.best_of.sample_lines import Sample, SampleKey
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.shared_prefix import Prompts, Sampling, answer_prompts


def draw_samples(
    loaded: LoadedModel,
    batches: Sequence[Sequence[tuple[Question, int]]],
    is_drawn: Callable[[SampleKey], bool],
    *,
    sampling: Sampling,
    max_tokens: int,
    seed: int,
) -> Iterator[list[Sample]]:
    """Yield the samples of every batch in which one is missing.

    A batch is drawn as a whole, so that its samples are those of a run without an interruption.

    Args:
        loaded: The model.
        batches: Questions and numbers of samples, of `plan`.
        is_drawn: Whether an earlier start has drawn a sample.
        sampling: Temperature and top-p.
        max_tokens: Longest sample; shorter where the model has no more positions.
        seed: The samples' seeds are derived from it, the question's id and the sample's number.
    """
    for batch in batches:
        if all(is_drawn((question.id, number)) for question, number in batch):
            continue
        yield _drawn(loaded, batch, sampling, max_tokens, seed)


def sample_seed(seed: int, question: str, number: int) -> int:
    """Return the seed of one sample."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {question}".encode()).digest()[:8])


def _drawn(
    loaded: LoadedModel,
    batch: Sequence[tuple[Question, int]],
    sampling: Sampling,
    max_tokens: int,
    seed: int,
) -> list[Sample]:
    """Return the samples of a batch, in its order."""
    samples: list[Sample] = []
    groups: list[Prompts] = []
    asked: list[tuple[Question, int]] = []
    for sources, together in groupby(batch, key=lambda pair: pair[0].prompt.images):
        members = list(together)
        group = Prompts((), [], [], [])
        try:
            images = tuple(loaded.load_image(source, num_images=len(sources)) for source in sources)
            prompts = [
                loaded.prompt_ids(question.prompt, [image.layout for image in images])
                for question, _ in members
            ]
            limits = [min(max_tokens, loaded.free_positions(len(ids))) for ids in prompts]
            seeds = [sample_seed(seed, question.id, number) for question, number in members]
            group = Prompts(images, prompts, limits, seeds)
        except UserError as error:  # an image is missing or broken, or a prompt is too long
            samples += [Sample(q.id, n, "", 0, False, error.reason) for q, n in members]
            continue
        groups.append(group)
        asked += members
    texts = [one for found in answer_prompts(loaded, groups, sampling=sampling) for one in found]
    samples += [
        Sample(question.id, number, text.text, text.num_tokens, text.ended)
        for (question, number), text in zip(asked, texts, strict=True)
    ]
    order = {(question.id, number): place for place, (question, number) in enumerate(batch)}
    return sorted(samples, key=lambda sample: order[sample.key])
