"""Estimate the tokens and the cost of planned requests, without a tokenizer."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from data_tools.instruct.config import InstructConfig, TeacherConfig
from data_tools.instruct.plan.prompts import TYPES
from data_tools.instruct.schema import Request, SampleType

MESSAGE_TOKENS: Final = 4
"""Tokens that a chat template adds to a message."""
PAID: Final = ("openai", "batch")

_TOKEN: Final = re.compile(r"[^\W\d_]{1,11}| ?[^\w\s]{1,3}|\d{1,3}|\s+(?=\d)|[\r\n]+|_")
"""Vocabularies of 100,000 tokens and more split alike: a word with the space before it, long words
in several, punctuation in groups, up to three digits, a space before a digit."""


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of English text with numbers and JSON in it.

    Within 1 % for Llama 3 and 4 on planned requests, 9 to 14 % too few for vocabularies that spell
    numbers digit by digit (`scripts/benchmarks/bench_token_estimate.py`).
    """
    return len(_TOKEN.findall(text))


@dataclass
class Tally:
    """Sums over the requests that `through` has yielded."""

    templates: Mapping[str, Any]
    requests: Counter[SampleType] = field(default_factory=Counter)
    context_tokens: Counter[SampleType] = field(default_factory=Counter)
    of_template: Counter[tuple[SampleType, str]] = field(default_factory=Counter)
    images: int = 0
    boxes_listed: int = 0
    boxes_counted: int = 0
    _last: int | None = None

    def through(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests unchanged and count them."""
        for request in requests:
            self.requests[request.type] += 1
            self.of_template[request.type, request.template] += 1
            self.context_tokens[request.type] += estimate_tokens(request.context) + MESSAGE_TOKENS
            if request.image != self._last:
                self._last = request.image
                self.images += 1
                self.boxes_listed += len(request.shown.boxes)
                self.boxes_counted += sum(map(len, request.shown.summarised.values()))
            yield request

    def as_dict(self, teacher: TeacherConfig) -> dict[str, Any]:
        """Return numbers of boxes, requests and tokens, by type and in total, and US dollars."""
        types = {name: self._of(name, teacher) for name in TYPES if self.requests[name]}
        total = {key: sum(of[key] for of in types.values()) for key in next(iter(types.values()))}
        return {
            "boxes": {"listed": self.boxes_listed, "by_number_only": self.boxes_counted},
            "requests": {**types, "all": total},
            "usd": _usd(total, teacher),
        }

    def _of(self, name: SampleType, teacher: TeacherConfig) -> dict[str, int]:
        """Return the figures of a type.

        Answers are assumed to be as long as the examples; as the limit allows if there are none.
        """
        count, prefix, repeated, length = self.requests[name], 0, 0, 0.0
        for (sample_type, template), number in self.of_template.items():
            if sample_type != name:
                continue
            fixed = self.templates[template]["messages"]
            tokens = sum(estimate_tokens(message["content"]) + MESSAGE_TOKENS for message in fixed)
            prefix, repeated = prefix + tokens * number, repeated + tokens * (number - 1)
            answers = [m["content"] for m in fixed if m["role"] == "assistant"]
            typical = float(teacher.max_tokens)
            if answers:
                typical = sum(map(estimate_tokens, answers)) / len(answers)
            length += min(typical, teacher.max_tokens) * number
        return {
            "requests": count,
            "tokens_in": prefix + self.context_tokens[name],
            "repeated_prefix": repeated,
            "tokens_out": round(length),
            "tokens_out_at_most": teacher.max_tokens * count,
        }


def _usd(total: Mapping[str, int], teacher: TeacherConfig) -> dict[str, float] | None:
    if teacher.prices is None or teacher.kind not in PAID:
        return None
    prices = teacher.prices
    cached = prices.input if prices.cached is None else prices.cached
    output = total["tokens_out"] * prices.output
    full = total["tokens_in"] * prices.input + output
    saved = total["repeated_prefix"] * (prices.input - cached)
    most = full - output + total["tokens_out_at_most"] * prices.output
    amounts = {"nothing_cached": full, "prefixes_cached": full - saved, "longest_answers": most}
    return {name: round(amount / 1e6, 4) for name, amount in amounts.items()}


def estimate_lines(plan: Mapping[str, Any], config: InstructConfig) -> Iterator[str]:
    """Yield the estimate in `plan.json` for a terminal."""
    boxes = plan["boxes"]
    yield (
        f"{boxes['listed']:,} boxes are shown, {boxes['by_number_only']:,} are only counted "
        "(small, or more than requests.max_boxes)"
    )
    yield f"{'type':<14}{'requests':>10}{'tokens in':>15}{'(same prefix)':>15}{'tokens out':>14}"
    for name, of in plan["requests"].items():
        yield (
            f"{name:<14}{of['requests']:>10,}{of['tokens_in']:>15,}"
            f"{of['repeated_prefix']:>15,}{of['tokens_out']:>14,}"
        )
    if config.verify.judge is not None:
        yield "the judge (verify.judge) is not in the estimate: `verify` asks it about every sample"
    if config.teacher.kind not in PAID:
        yield f"teacher {config.teacher.kind}: nothing is sent and nothing is paid"
        return
    total, usd = plan["requests"]["all"], plan["usd"]
    share = total["repeated_prefix"] / total["tokens_in"]
    yield (
        "estimated without a tokenizer, for answers as long as the examples; a server's prefix "
        f"cache can save {share:.0%} of the tokens in"
    )
    if usd is None:
        yield "no estimate of the cost, since teacher.prices is not set"
    else:
        yield (
            f"about {usd['prefixes_cached']:,.2f} US dollars with every prefix cached, "
            f"{usd['nothing_cached']:,.2f} with none; {usd['longest_answers']:,.2f} if every "
            f"answer has teacher.max_tokens"
        )
    limits = config.limits
    for name, limit, need in (
        ("requests", limits.requests, total["requests"]),
        ("tokens", limits.tokens, total["tokens_in"] + total["tokens_out"]),
        ("usd", limits.usd, usd["nothing_cached"] if usd else 0),
    ):
        if limit is not None and need > limit:
            yield f"limits.{name} {limit:,} is lower than that: `generate` will stop there"
