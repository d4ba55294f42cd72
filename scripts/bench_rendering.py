"""Records a second through template, tokeniser, mask and proof, beside transformers' own mask.

    .venv/bin/python scripts/bench_rendering.py                          # SmolLM2 of the quickstart
    .venv/bin/python scripts/bench_rendering.py --tokenizer DIR --template vicuna_v1

All ways go over the same conversations, in turns, on one thread; figures are medians over rounds of
conversations per CPU-second (process time). The conversations have the turns and lengths of
LLaVA-1.5's 665K mixture by component (its table of counts; lengths after its papers' examples).
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when tokenizers is imported

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from vlm_sft.config import LanguageModelConfig
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.masking import Renderer
from vlm_sft.data.render_cache import CachedRenderer
from vlm_sft.data.tokenizer import load_tokenizer
from vlm_sft.errors import run_command
from vlm_sft.progress import track

# Thousands of records, exchanges, words a question, words an answer.
MIXTURE = (
    (58, (2, 4), (8, 14), (15, 45)),  # conversation
    (23, (1, 1), (6, 14), (80, 130)),  # detailed description
    (77, (1, 1), (12, 24), (80, 150)),  # complex reasoning
    (40, (1, 5), (10, 60), (80, 250)),  # ShareGPT
    (83, (3, 8), (8, 14), (1, 2)),  # VQAv2
    (72, (5, 15), (8, 14), (1, 2)),  # GQA
    (80, (3, 5), (6, 10), (1, 8)),  # OCR-VQA
    (75, (1, 2), (12, 30), (1, 3)),  # OKVQA, A-OKVQA
    (22, (1, 1), (12, 24), (8, 14)),  # TextCaps
    (134, (4, 12), (8, 16), (4, 12)),  # RefCOCO, Visual Genome
)
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
    renderer = Renderer.from_name(arguments.template, tokenizer)
    with tempfile.TemporaryDirectory() as cache_dir:
        ways = _ways(renderer, tokenizer, conversations, cache_dir)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(arguments.rounds), arguments.rounds, "rounds"):
            for name, way in ways.items():
                start = time.process_time()
                way()
                rates[name].append(len(conversations) / (time.process_time() - start))
    _print(rates, renderer, conversations)
    return 0


def make_conversations(count: int) -> list[Conversation]:
    """`count` conversations of the mixture, none equal to another, of English words."""
    draw = random.Random(0)
    words = [w for w in Path(__file__).parent.parent.joinpath("LICENSE").read_text().split() if w]
    components = draw.choices(MIXTURE, weights=[row[0] for row in MIXTURE], k=count)
    return [_conversation(number, row, words, draw) for number, row in enumerate(components)]


def _conversation(
    number: int, row: tuple[Any, ...], words: Sequence[str], draw: random.Random
) -> Conversation:
    _, exchanges, question, answer = row

    def text(length: tuple[int, int]) -> str:
        start = draw.randrange(len(words) - length[1])
        return " ".join(words[start : start + draw.randint(*length)])

    turns: list[Turn] = []
    for index in range(draw.randint(*exchanges)):
        asked: list[Part] = [TextPart(text(question))]
        if index == 0:
            asked = [ImagePart(0), TextPart(f"\n{number} {text(question)}")]
        turns += [Turn("user", tuple(asked)), Turn("assistant", (TextPart(text(answer)),))]
    return Conversation(str(number), tuple(turns), (b"",))


def _ways(
    renderer: Renderer,
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
    cached = CachedRenderer(renderer, cache_dir)
    list(cached.render_all(conversations))

    def masked_by_transformers(chat: Any) -> Any:
        return tokenizer.apply_chat_template(
            chat,
            chat_template=GENERATION_CHATML,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )

    return {
        "vlm_sft: render, mask, proof": lambda: [
            renderer.render(conversation) for conversation in conversations
        ],
        "vlm_sft: the same, batched": lambda: list(renderer.render_all(conversations)),
        "vlm_sft: found in data.cache_dir": lambda: list(cached.render_all(conversations)),
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
    rates: dict[str, list[float]], renderer: Renderer, conversations: Sequence[Conversation]
) -> None:
    lengths = [len(renderer.render(c).input_ids) for c in conversations[:1000]]
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
        prog="scripts/bench_rendering.py",
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
