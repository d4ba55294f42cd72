"""How far `plan`'s estimate of tokens is from real tokenizers, on a planned run's own requests.

    python scripts/benchmarks/bench_token_estimate.py RUN_FOLDER

Vocabularies are those of installed packages: llama-models and mistral-common (the `dev` extra).
"""

import argparse
from collections.abc import Callable
from importlib.resources import files
from itertools import islice
from pathlib import Path

from data_tools.instruct.plan import command as planning
from data_tools.instruct.plan.estimate import estimate_tokens
from data_tools.instruct.run_folder import RunFolder

Count = Callable[[str], int]


def main() -> None:
    """Print the estimate's error for fixed beginnings and for contexts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = RunFolder(parser.parse_args().run)
    templates = planning.read_templates(folder).values()
    prefixes = [message["content"] for template in templates for message in template["messages"]]
    answers = [
        message["content"]
        for template in templates
        for message in template["messages"]
        if message["role"] == "assistant"
    ]
    contexts = [request.context for request in islice(planning.read_requests(folder), 500)]
    print(f"{'vocabulary':<14}{'size':>9}{'prefixes':>10}{'contexts':>10}{'answers':>10}{'all':>8}")
    for name, (size, count) in _vocabularies().items():
        errors = [_error(texts, count) for texts in (prefixes, contexts, answers)]
        whole = _error([*prefixes, *contexts], count)
        print(
            f"{name:<14}{size:>9,}"
            + "".join(f"{error:>+10.1%}" for error in errors)
            + f"{whole:>+8.1%}"
        )


def _error(texts: list[str], count: Count) -> float:
    return sum(map(estimate_tokens, texts)) / sum(map(count, texts)) - 1


def _vocabularies() -> dict[str, tuple[int, Count]]:
    import sentencepiece
    import tiktoken
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from tiktoken.load import load_tiktoken_bpe

    found: dict[str, tuple[int, Count]] = {}
    for name in ("llama3", "llama4"):
        ranks = load_tiktoken_bpe(str(files("llama_models").joinpath(name, "tokenizer.model")))
        encoding = tiktoken.Encoding(name, pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={})
        found[name] = len(ranks), lambda text, e=encoding: len(e.encode_ordinary(text))
    data = files("mistral_common").joinpath("data")
    tekken = Tekkenizer.from_file(str(data.joinpath("tekken_240911.json")))
    found["tekken"] = tekken.n_words, lambda text: len(tekken.encode(text, False, False))
    pieces = sentencepiece.SentencePieceProcessor(str(data.joinpath("tokenizer.model.v1")))
    found["mistral v1"] = pieces.vocab_size(), lambda text: len(pieces.encode(text))
    return found


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the llama_models package splits text before merging."""


if __name__ == "__main__":
    main()
