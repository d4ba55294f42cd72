"""Answers that share an image's prefix equal those of each question alone."""

from dataclasses import replace

import pytest
import torch

from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.images import ImageCrops
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.inference.sampling import Sampler
from vlm_sft.inference.shared_prefix import Generated, Prompts, Sampling, answer_prompts

QUESTIONS = ("Is there a dog?", "How many?", "Describe the image in a few words, please.")


def noise(seed: int) -> ImageCrops:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (1, 3, 28, 28), generator=generator, dtype=torch.uint8)
    return ImageCrops(pixels, ImageLayout(crop_tokens=4))


def asked(loaded: LoadedModel, image: ImageCrops | None, *questions: str) -> Prompts:
    images, layouts = ([], []) if image is None else ([b""], [image.layout])
    prompts = [loaded.prompt_ids(user_message(text, images), layouts) for text in questions]
    shown = () if image is None else (image,)
    return Prompts(shown, prompts, [7 + len(text) % 3 for text in questions])


def alone(loaded: LoadedModel, group: Prompts) -> list[Generated]:
    return [
        answer_prompts(loaded, [Prompts(group.images, [p], [n])], whole_prompts=True)[0][0]
        for p, n in zip(group.prompts, group.max_tokens, strict=True)
    ]


def test_answers_about_several_images_equal_those_of_each_question(run: LoadedModel) -> None:
    groups = [
        asked(run, noise(1), *QUESTIONS),
        asked(run, noise(2), QUESTIONS[1]),
        asked(run, None, *QUESTIONS[:2]),
    ]
    found = answer_prompts(run, groups)
    texts = [[answer.text for answer in answers] for answers in found]
    assert texts == [[answer.text for answer in alone(run, group)] for group in groups]
    for group, answers in zip(groups, found, strict=True):
        for limit, answer in zip(group.max_tokens, answers, strict=True):
            assert 1 <= answer.num_tokens <= limit


def test_an_answer_ends_at_the_stop_token(
    run: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = asked(run, noise(1), QUESTIONS[0])
    every_token = tuple(range(len(run.tokenizer)))
    monkeypatch.setattr(type(run.chat_tokenizer), "eot_token_ids", every_token)
    (cut,) = answer_prompts(run, [group])[0]
    assert cut.num_tokens == 1


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(run: LoadedModel) -> None:
    group = asked(run, noise(1), *[QUESTIONS[0]] * 4)
    seeded = replace(group, seeds=[5, 6, 7, 5])
    sampling = Sampling(temperature=1.0, top_p=0.9)
    (found,) = answer_prompts(run, [seeded], sampling=sampling)
    assert found[0] == found[3] and len({answer.text for answer in found}) > 1
    single = replace(group, prompts=group.prompts[:1], max_tokens=group.max_tokens[:1], seeds=[6])
    other = replace(asked(run, noise(2), *QUESTIONS), seeds=[1, 2, 3])
    whole = answer_prompts(run, [single, other], whole_prompts=True, sampling=sampling)
    assert [whole[0][0], *whole[1]] == [
        found[1],
        *answer_prompts(run, [other], sampling=sampling)[0],
    ]


@pytest.mark.parametrize(
    ("top_p", "expected"), [(1.0, [0.6, 0.3, 0.0, 0.1]), (0.85, [2 / 3, 1 / 3, 0.0, 0.0])]
)
def test_tokens_are_drawn_by_their_probabilities(top_p: float, expected: list[float]) -> None:
    logits = torch.tensor([0.36, 0.09, 0.0, 0.01]).log().repeat(4000, 1)
    sampler = Sampler(range(4000), temperature=2.0, top_p=top_p)  # takes square roots
    counts = torch.bincount(torch.tensor(sampler.choose(logits, range(4000))), minlength=4)
    assert (counts / 4000 - torch.tensor(expected)).abs().max() < 0.02
    assert (counts == 0).tolist() == [share == 0 for share in expected]
