"""Compare captions with reference captions: CIDEr-D, BLEU-1 to BLEU-4, ROUGE-L.

The results equal those of the COCO caption evaluation code (package pycocoevalcap 1.2) for equal
tokens. Its tokenizer is a Java program; `tokenize` follows its rules in Python and can differ on
rare text (URLs, fractions, emoticons).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.evaluation.scores.files import Answers, Row, match
from vlm_sft.evaluation.scores.meteor import score_meteor
from vlm_sft.evaluation.scores.results import Options, Results

MAX_N: Final = 4
"""Longest n-grams of CIDEr and BLEU."""

CIDER_SIGMA: Final = 6.0
"""Standard deviation of CIDEr-D's penalty for a different length (arXiv 1411.5726, section 4)."""

ROUGE_BETA: Final = 1.2
"""Weight of recall against precision in ROUGE-L, as in the COCO evaluation code."""

_BLEU_SMALL: Final = 1e-9
_BLEU_TINY: Final = 1e-15

Ints = NDArray[np.int64]

_TOKEN: Final = re.compile(
    r"(?:[^\W\d_]\.){2,}"  # u.s.
    r"|\w+://\S+"
    r"|\d+(?:-[^\W_]+)+"  # 18-wheeler
    r"|\.?\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?![^\W_])"  # 1,000  8:25  1st
    r"|[^\W_]+(?:(?:[-_&/]|(?=')'(?!(?:s|m|d|ll|re|ve|t)\b))[^\W_]+)*"  # words, x-ray, o'clock
    r"|'(?:s|m|d|ll|re|ve|t)\b"
    r"|\S"
)
_NEGATION: Final = re.compile(r"\b(\w+)(n't)\b")
_PUNCTUATION: Final = frozenset(
    ("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "“", "”", "‘", "’",
     "–", "—", "…")
)  # fmt: skip
_BRACKETS: Final = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
"""Brackets as the COCO code has them: it means to drop `-LRB-`, but its tokens are lower-case."""
_SPLIT_WORDS: Final = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"),
    "wanna": ("wan", "na"), "lemme": ("lem", "me"), "gimme": ("gim", "me"),
}  # fmt: skip


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        bleu: BLEU-1 to BLEU-4 of the whole set.
        rouge_l: Mean ROUGE-L.
        cider: Mean CIDEr-D.
        cider_by_caption: CIDEr-D of each caption.
        rouge_l_by_caption: ROUGE-L of each caption.
    """

    bleu: tuple[float, ...]
    rouge_l: float
    cider: float
    cider_by_caption: tuple[float, ...]
    rouge_l_by_caption: tuple[float, ...]


def score_captions(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> CaptionScores:
    """Return the scores of tokenized captions.

    The document frequencies of CIDEr are those of `references`, so scores of different sets cannot
    be compared, and a set of one image scores 0.

    Args:
        captions: Tokens of each caption.
        references: Tokens of each reference of each caption; at least one each.

    Raises:
        ValueError: The lengths differ, or a caption has no reference.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError("every caption needs at least one reference")
    cider = cider_d(captions, references)
    rouge = [rouge_l(*pair) for pair in zip(captions, references, strict=True)]
    return CaptionScores(
        bleu=bleu(captions, references),
        rouge_l=sum(rouge) / len(rouge),
        cider=sum(cider) / len(cider),
        cider_by_caption=tuple(cider),
        rouge_l_by_caption=tuple(rouge),
    )


def score_caption(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return CIDEr-D, BLEU and ROUGE-L of captions by image id.

    An image without a caption counts as one with an empty caption.
    """
    references: dict[str, list[list[str]]] = {}
    for row in truth:
        caption = tokenize(row.text("caption", "text", "answer"))
        references.setdefault(row.text("image_id", "image", "id"), []).append(caption)
    coverage = match(answers, list(references))
    captions = [tokenize(answers.by_id.get(name, "")) for name in references]
    found = score_captions(captions, list(references.values()))
    interval = cluster_bootstrap_interval(
        found.cider_by_caption, list(references), seed=options.seed
    )
    scores: dict[str, Any] = {
        "kind": "caption",
        **coverage.as_dict(),
        "references": sum(map(len, references.values())),
        "cider_d": found.cider,
        "cider_d_interval": [interval.low, interval.high],
        **{f"bleu_{n}": value for n, value in enumerate(found.bleu, 1)},
        "rouge_l": found.rouge_l,
        "mean_words": sum(map(len, captions)) / len(captions),
        "meteor": "not computed: --meteor, needs Java and the package pycocoevalcap",
        "spice": "not computed: needs Java and a download of CoreNLP 3.6",
    }
    rows: list[dict[str, Any]] = [
        {"id": name, "image": name, "answer": answers.by_id.get(name), "score": cider, "rouge_l": r}
        for name, cider, r in zip(
            references, found.cider_by_caption, found.rouge_l_by_caption, strict=True
        )
    ]
    if options.meteor:
        scores["meteor"], by_caption = score_meteor(captions, list(references.values()))
        for result, value in zip(rows, by_caption, strict=True):
            result["meteor"] = value
    return Results(scores, rows)


def tokenize(caption: str) -> list[str]:
    """Return the lower-case tokens of a caption without punctuation, in the Penn Treebank's manner.

    `don't` becomes `do n't`, `dog's` becomes `dog 's`; words with hyphens and numbers are kept.
    """
    text = _NEGATION.sub(r"\1 \2", " ".join(caption.lower().split()).replace("’", "'"))
    tokens: list[str] = []
    for word in text.split(" "):
        if word == "n't":
            tokens.append(word)
            continue
        for token in _TOKEN.findall(word):
            tokens += _SPLIT_WORDS.get(token, (_BRACKETS.get(token, token),))
    return [token for token in tokens if token not in _PUNCTUATION]


def cider_d(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return CIDEr-D of each caption, from 0 to 10 (arXiv 1411.5726)."""
    groups = np.array([len(group) for group in references])
    image = np.repeat(np.arange(len(references)), groups)
    texts = [*captions, *(reference for group in references for reference in group)]
    image_of_text = np.concatenate([np.arange(len(captions)), image])
    lengths = np.array([max(0, len(text) - 1) for text in texts])  # of bigrams, as COCO's code has
    gap = lengths[: len(captions)][image] - lengths[len(captions) :]
    penalty = np.exp(-(gap.astype(float) ** 2) / (2 * CIDER_SIGMA**2))
    total = np.zeros(len(image))
    for text, ngram, count in _counted_ngrams(texts):
        is_reference = text >= len(captions)
        pairs = np.unique(image_of_text[text[is_reference]] * _span(ngram) + ngram[is_reference])
        frequency = np.bincount(pairs % _span(ngram), minlength=_span(ngram))
        weight = count * (math.log(len(references)) - np.log(np.maximum(1, frequency[ngram])))
        norm = np.sqrt(np.bincount(text, weight**2, minlength=len(texts)))
        # The weights of the caption's n-grams, looked up for each n-gram of a reference.
        ours = text[~is_reference] * _span(ngram) + ngram[~is_reference]
        theirs = image_of_text[text[is_reference]] * _span(ngram) + ngram[is_reference]
        place = np.minimum(np.searchsorted(ours, theirs), max(0, len(ours) - 1))
        if not len(ours):
            continue
        found = np.where(ours[place] == theirs, weight[~is_reference][place], 0.0)
        product = np.minimum(found, weight[is_reference]) * weight[is_reference]
        sums = np.bincount(
            text[is_reference] - len(captions), product, minlength=len(image)
        ).astype(float)
        norms = norm[: len(captions)][image] * norm[len(captions) :]
        total += np.divide(sums, norms, out=sums, where=norms > 0) * penalty
    by_caption = np.bincount(image, total, minlength=len(captions))
    return [float(value) for value in 10.0 * by_caption / MAX_N / groups]


def bleu(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, ...]:
    """Return BLEU-1 to BLEU-4 of the set; the reference length is the closest one."""
    length = sum(map(len, captions))
    reference_length = sum(
        min((abs(len(reference) - len(caption)), len(reference)) for reference in group)[1]
        for caption, group in zip(captions, references, strict=True)
    )
    texts = [*captions, *(reference for group in references for reference in group)]
    images = np.repeat(np.arange(len(references)), [len(group) for group in references])
    image_of_text = np.concatenate([np.arange(len(captions)), images])
    scores, product = [], 1.0
    for n, (text, ngram, count) in enumerate(_counted_ngrams(texts), 1):
        is_reference = text >= len(captions)
        key = image_of_text[text] * _span(ngram) + ngram
        known, place = np.unique(key[is_reference], return_inverse=True)
        limits = np.zeros(len(known), np.int64)  # the most that one reference has
        np.maximum.at(limits, place, count[is_reference])
        at = np.minimum(np.searchsorted(known, key[~is_reference]), max(0, len(known) - 1))
        matched = 0
        if len(known):
            limit = np.where(known[at] == key[~is_reference], limits[at], 0)
            matched = int(np.minimum(count[~is_reference], limit).sum())
        possible = sum(max(0, len(caption) - n + 1) for caption in captions)
        product *= (matched + _BLEU_TINY) / (possible + _BLEU_SMALL)
        scores.append(product ** (1 / n))
    ratio = (length + _BLEU_TINY) / (reference_length + _BLEU_SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(score * brevity for score in scores)


def _counted_ngrams(texts: Sequence[Sequence[str]]) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield, for n from 1 to `MAX_N`, the n-grams of each text.

    Returns:
        Text numbers in ascending order, numbers that stand for n-grams (equal in all texts), and
        how often the text has the n-gram.
    """
    vocabulary: dict[str, int] = {}
    words = np.array(
        [vocabulary.setdefault(word, len(vocabulary)) for text in texts for word in text], np.int64
    )
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    ngrams, starts = words, np.arange(len(words))
    for n in range(1, MAX_N + 1):
        if n > 1:
            # An n-gram is an (n-1)-gram and a word, if both are in the same text.
            keep = starts + n - 1 < len(words)
            keep[keep] = owner[starts[keep] + n - 1] == owner[starts[keep]]
            starts, ngrams = starts[keep], ngrams[keep]
            ngrams = ngrams * len(vocabulary) + words[starts + n - 1]
            ngrams = np.unique(ngrams, return_inverse=True)[1]
        span = _span(ngrams)
        pairs, counts = np.unique(owner[starts] * span + ngrams, return_counts=True)
        yield pairs // span, pairs % span, counts


def _span(ngrams: Ints) -> int:
    """Return a number above all numbers of n-grams."""
    return int(ngrams.max()) + 1 if len(ngrams) else 1


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L: precision and recall of the longest common subsequence, each the best one."""
    # The COCO code splits text at spaces, so that an empty caption has one empty token.
    caption = caption or [""]
    common = [common_length(reference or [""], caption) for reference in references]
    precision = max(common) / len(caption)
    recall = max(
        n / len(reference or [""]) for n, reference in zip(common, references, strict=True)
    )
    if not precision or not recall:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
