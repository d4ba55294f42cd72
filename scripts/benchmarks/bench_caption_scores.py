"""Measure the time that scores of captions take: bench_caption_scores.py [CAPTIONS]."""

import random
import sys
import time
from collections.abc import Callable

from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.evaluation.scores.captions import bleu, cider_d, rouge_l, tokenize


def main() -> None:
    """Print the CPU-seconds of each step, for captions with five references."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    rng = random.Random(0)
    vocabulary = [f"w{number}" for number in range(8000)]
    weights = [1 / (number + 1) for number in range(8000)]

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, weights, k=rng.randint(8, 14))) + "."

    said = [sentence() for _ in range(count)]
    truth = [[sentence() for _ in range(5)] for _ in range(count)]
    captions: list[list[str]] = []
    references: list[list[list[str]]] = []
    values: list[float] = []

    def tokenize_all() -> None:
        captions.extend(map(tokenize, said))
        references.extend([tokenize(text) for text in group] for group in truth)

    steps: dict[str, Callable[[], object]] = {
        "tokens": tokenize_all,
        "CIDEr-D": lambda: values.extend(cider_d(captions, references)),
        "BLEU": lambda: bleu(captions, references),
        "ROUGE-L": lambda: [rouge_l(*pair) for pair in zip(captions, references, strict=True)],
        "interval": lambda: cluster_bootstrap_interval(values, range(count), seed=0),
    }
    for name, step in steps.items():
        begun = time.process_time()
        step()
        print(f"{name:<10} {time.process_time() - begun:6.1f} s")


if __name__ == "__main__":
    main()
