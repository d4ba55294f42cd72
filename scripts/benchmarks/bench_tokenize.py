"""Tokenization: records per second with a verified loss mask, compared with transformers' mask.

    .venv/bin/python scripts/benchmarks/bench_tokenize.py  # SmolLM2 of the quickstart
    .venv/bin/python scripts/benchmarks/bench_tokenize.py --tokenizer DIR --template vicuna_v1

All variants process the same conversations, in turns, on one thread. The figures are medians over
rounds of conversations per CPU-second (process time). The conversations have the shape of
LLaVA-1.5's mixture (`scripts/benchmarks/bench_rows.py`).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when tokenizers is imported

from bench_rows import Row, make_rows
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.data.tokenize_cache import CachedChatTokenizer
from vlm_sft.utils.progress import track

GENERATION_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)


def main(argv: Sequence[str]) -> int:
    """Time every way and print the table."""
    arguments = _parse(argv)
    tokenizer = load_tokenizer(LanguageModelConfig(name=arguments.tokenizer))
    conversations = make_conversations(arguments.count)
    chat_tokenizer = ChatTokenizer.from_name(arguments.template, tokenizer)
    with tempfile.TemporaryDirectory() as cache_dir:
        ways = _ways(chat_tokenizer, tokenizer, conversations, cache_dir)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(arguments.rounds), arguments.rounds, "rounds"):
            for name, way in ways.items():
                start = time.process_time()
                way()
                rates[name].append(len(conversations) / (time.process_time() - start))
    _print(rates, chat_tokenizer, conversations)
    return 0


def make_conversations(count: int) -> list[Conversation]:
    """`count` conversations of the benchmarks' rows, none equal to another."""
    return [_conversation(number, row) for number, row in enumerate(make_rows(count, seed=0))]


def _conversation(number: int, row: Row) -> Conversation:
    turns = []
    for index, turn in enumerate(row["conversations"]):
        text = turn["value"].removeprefix("<image>\n")
        parts: list[Part] = [TextPart(text)]
        if index == 0:
            parts = [TextPart(f"{number} {text}")]
            if "image" in row:
                parts = [ImagePart(0), TextPart(f"\n{number} {text}")]
        turns.append(Turn("user" if turn["from"] == "human" else "assistant", tuple(parts)))
    return Conversation(str(number), tuple(turns), (b"",) if "image" in row else ())


def _ways(
    chat_tokenizer: ChatTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    cache_dir: str,
) -> dict[str, Callable[[], Any]]:
    messages = [_messages(conversation) for conversation in conversations]
    texts = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        for chat in messages
    ]
    backend: Any = tokenizer.backend_tokenizer
    cached = CachedChatTokenizer(chat_tokenizer, cache_dir)
    list(cached.tokenize_all(conversations))

    def masked_by_transformers(chat: Any) -> Any:
        return tokenizer.apply_chat_template(
            chat,
            chat_template=GENERATION_CHATML,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )

    return {
        "vlm_sft: tokenize, mask, proof": lambda: [
            chat_tokenizer.tokenize(conversation) for conversation in conversations
        ],
        "vlm_sft: the same, batched": lambda: list(chat_tokenizer.tokenize_all(conversations)),
        "vlm_sft: found in data.cache_dir": lambda: list(cached.tokenize_all(conversations)),
        "transformers: assistant mask, one by one": lambda: [
            masked_by_transformers(chat) for chat in messages
        ],
        "transformers: assistant mask, batched": lambda: masked_by_transformers(messages),
        "tokenizers: ids alone, batched, no mask": lambda: backend.encode_batch(
            texts, add_special_tokens=False
        ),
    }


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [
        {
            "role": turn.role,
            "content": "".join(
                p.text if isinstance(p, TextPart) else "<image>" for p in turn.parts
            ),
        }
        for turn in conversation.turns
    ]


def _print(
    rates: dict[str, list[float]],
    chat_tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
) -> None:
    lengths = [len(chat_tokenizer.tokenize(c).input_ids) for c in conversations[:1000]]
    ours = statistics.median(next(iter(rates.values())))
    table = Table(
        title=f"{len(conversations):,} conversations, {statistics.mean(lengths):.0f} text tokens "
        "on average; per CPU-second"
    )
    for column in ("way", "median", "least", "most", "first way is faster by"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, found in rates.items():
        median = statistics.median(found)
        table.add_row(
            name,
            f"{median:,.0f}",
            f"{min(found):,.0f}",
            f"{max(found):,.0f}",
            f"{ours / median:.2f}",
        )
    Console(file=sys.stdout, width=110).print(table)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/bench_tokenize.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", default="demo/pieces/smollm2-135m-instruct", metavar="DIR")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--count", type=int, default=2000, help="conversations (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="times over all ways (5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
