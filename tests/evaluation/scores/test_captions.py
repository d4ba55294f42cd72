"""CIDEr-D, BLEU and ROUGE-L equal the COCO caption evaluation code."""

import math
import random
import shutil
from collections import Counter

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.captions import bleu, cider_d, rouge_l, score_captions, tokenize
from vlm_sft.evaluation.scores.meteor import score_meteor

WORDS = ["a", "the", "man", "dog", "cat", "on", "of", "in", "red", "with", "is", "two", "sitting",
         "é", "日本", "table"]  # fmt: skip


def sentence(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(length)]


def captions_and_references(count: int, seed: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Ordinary, copied, empty and very long captions."""
    rng = random.Random(seed)
    captions, references = [], []
    for index in range(count):
        group = [sentence(rng, rng.randint(1, 12)) for _ in range(rng.randint(1, 5))]
        choices = [sentence(rng, rng.randint(1, 12)), list(group[0]), [], sentence(rng, 200)]
        captions.append(choices[index % 4])
        references.append(group)
    return captions, references


def test_scores_are_those_that_pycocoevalcap_gave() -> None:
    found = score_captions(*captions_and_references(40, seed=7))
    # pycocoevalcap 1.2 on the same tokens: Cider, Bleu(4), Rouge.
    assert found.cider == pytest.approx(1.0884754344080487, abs=1e-12)
    expected = [0.10056127221697822, 0.07995257867835853, 0.056618341001168256,
                0.044682297278273574]  # fmt: skip
    assert found.bleu == pytest.approx(expected, abs=1e-12)
    assert found.rouge_l == pytest.approx(0.3573698738525959, abs=1e-12)
    assert found.cider_by_caption[:3] == pytest.approx(
        [0.9688812726394873, 2.930635573854561, 0.0], abs=1e-12
    )


def test_scores_equal_pycocoevalcap_where_it_is_installed() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    for count, seed in ((1000, 1), (1, 2)):
        captions, references = captions_and_references(count, seed)
        found = score_captions(captions, references)
        truth = {i: [" ".join(text) for text in group] for i, group in enumerate(references)}
        said = {i: [" ".join(caption)] for i, caption in enumerate(captions)}
        assert abs(found.cider - cider.Cider().compute_score(truth, said)[0]) < 1e-6
        assert found.bleu == pytest.approx(
            bleu_module.Bleu(4).compute_score(truth, said, verbose=0)[0], abs=1e-6
        )
        assert abs(found.rouge_l - rouge.Rouge().compute_score(truth, said)[0]) < 1e-6


def test_cider_is_the_formula_of_the_paper_for_one_n() -> None:
    # Two images, unigrams that occur in one image each have the weight log 2; "a" occurs in both.
    captions = [["a", "dog"], ["a", "cat"]]
    references = [[["a", "dog"]], [["a", "bird"]]]
    first, second = cider_d(captions, references)
    # Image 1: unigrams and bigrams are equal, so 2 of 4 n-gram orders score 1, times 10.
    assert first == pytest.approx(10 * 2 / 4)
    assert second == 0.0


def test_a_single_image_has_no_cider_and_a_perfect_bleu() -> None:
    found = score_captions([["a", "dog", "runs", "fast"]], [[["a", "dog", "runs", "fast"]]])
    assert found.cider == 0.0
    assert found.bleu == pytest.approx((1.0,) * 4)
    assert found.rouge_l == pytest.approx(1.0)


def test_bleu_is_the_geometric_mean_of_clipped_precisions_with_a_brevity_penalty() -> None:
    caption, reference = ["the", "the", "dog"], ["the", "dog", "is", "here"]
    counts, limits = Counter(caption), Counter(reference)
    unigram = sum(min(n, limits[w]) for w, n in counts.items()) / 3
    bigram = 1 / 2  # "the dog" of "the the", "the dog"
    brevity = math.exp(1 - 4 / 3)
    found = bleu([caption], [[reference]])
    assert found[0] == pytest.approx(unigram * brevity)
    assert found[1] == pytest.approx(math.sqrt(unigram * bigram) * brevity)


def test_rouge_l_takes_the_best_precision_and_the_best_recall() -> None:
    caption = ["a", "dog", "runs"]
    references = [["a", "dog"], ["dog", "runs", "to", "a", "park"]]
    precision, recall = 2 / 3, 1.0
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l(caption, references) == pytest.approx(expected)
    assert rouge_l([], references) == 0.0


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, riding a horse.", ["a", "man", "riding", "a", "horse"]),
        ("Don't stop! It's 8:25 a.m.", ["do", "n't", "stop", "it", "'s", "8:25", "a.m."]),
        ("A two-story house (red) with 1,000 T-shirts",
         ["a", "two-story", "house", "-lrb-", "red", "-rrb-", "with", "1,000", "t-shirts"]),
        ("The dogs' bowls cannot  fall", ["the", "dogs", "bowls", "can", "not", "fall"]),
        ("An 18-wheeler's door", ["an", "18-wheeler", "'s", "door"]),
        ("", []),
        ("日本語 café — naïve…", ["日本語", "café", "naïve"]),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_penn_treebank_tokenizer(caption: str, tokens: list[str]) -> None:
    assert tokenize(caption) == tokens


def test_captions_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        score_captions([["a"]], [[]])


@pytest.mark.slow  # loads 60 MB of paraphrases
def test_meteor_equals_pycocoevalcap_where_java_is_installed() -> None:
    library = pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    captions, references = captions_and_references(24, seed=3)
    found, by_caption = score_meteor(captions, references)
    kept = [n for n, caption in enumerate(captions) if caption]  # it ends at an empty caption
    truth = {n: [" ".join(text) for text in references[n]] for n in kept}
    program = library.Meteor()
    try:
        _, expected = program.compute_score(truth, {n: [" ".join(captions[n])] for n in kept})
    finally:
        program.meteor_p.kill()
        for pipe in (program.meteor_p.stdin, program.meteor_p.stdout, program.meteor_p.stderr):
            pipe.close()
        program.meteor_p.wait()
    assert [by_caption[n] for n in kept] == pytest.approx(expected, abs=1e-9)
    assert 0 < found < 1 and all(by_caption[n] == 0 for n in range(24) if n not in kept)


def test_meteor_without_java_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--meteor needs Java"):
        score_meteor([["a"]], [[["a"]]])
