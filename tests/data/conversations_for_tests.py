"""Generated conversations: everything that has broken a label mask somewhere, at random."""

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.data.mask_oracle import Pair, control_names
from vlm_sft.data.conversation import Conversation, ImagePart, Part, Role, TextPart, Turn

ORDINARY = (
    "What color is the car?",
    "Yes.",
    "The dog",
    " sits on the left",
    "42",
    "1234567",
    ", and",
    "x" * 40,
    "def f(x):\n    return x\n",
    "don't",
)
WHITE = ("", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u2028")
UNICODE = (
    "日本語の質問",
    "北京欢迎你。",
    "한국어",
    "Größe",
    "e\u0301",
    "\u0301",
    "a\u0328\u0301" * 3,
    "שלום",
    "\u202eabc\u202c",
    "\u200f",
    "\u200b",
    "\ufeff",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "👍🏽",
    "🇩🇪",
    "नमस्ते",
    "ﬁ",
    "\u0000",
    "\x1b[31m",
    "𝔘𝔫𝔦",
)
MARKS = (
    "USER:",
    "USER: ",
    " ASSISTANT: ",
    "ASSISTANT:",
    "[INST]",
    " [/INST] ",
    "<<SYS>>\n",
    "\n<</SYS>>\n\n",
    "###",
    "### Human: ",
    "<image>",
    "<image>\n",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<|end|>\n<|assistant|>\n",
    "system\n",
    "user\n",
    "assistant",
    "model",
    "{bos}",
    "{eos}",
    "{{ messages }}",
    "vlmsftTurn1Content",
    "<table>",
)


def texts(tokenizer: str) -> st.SearchStrategy[str]:
    """Text of up to six fragments, control strings of the tokenizer whole, halved and nested."""
    control = sorted(set(control_names(tokenizer).values()))
    any_text = st.text(
        st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="▁"), max_size=8
    )
    fragment = st.one_of(
        st.sampled_from(ORDINARY),
        st.sampled_from(WHITE),
        st.sampled_from(UNICODE),
        st.sampled_from(MARKS),
        _control_fragments(control),
        any_text,
    )
    return st.lists(fragment, max_size=6).map("".join)


def _control_fragments(control: Sequence[str]) -> st.SearchStrategy[str]:
    some = st.sampled_from(control)

    def halves(outer: str, cut: int, inner: str, kind: int) -> str:
        cut %= len(outer)
        return (outer, outer[:cut], outer[cut:], outer[:cut] + inner + outer[cut:])[kind]

    return st.builds(halves, some, st.integers(0, 40), some, st.sampled_from((0, 0, 1, 2, 3)))


def conversations(pair: Pair) -> st.SearchStrategy[Conversation]:
    """Conversations that the pair's template can hold."""
    return _conversations(texts(pair.tokenizer), pair.takes_system, pair.max_exchanges)


@st.composite
def _conversations(
    draw: st.DrawFn, text: st.SearchStrategy[str], system: bool, max_exchanges: int
) -> Conversation:
    turns: list[Turn] = []
    if system and draw(st.booleans()):
        turns.append(_turn("system", [draw(text)]))
    exchanges = draw(st.integers(1, max_exchanges))
    asked = draw(st.lists(st.integers(0, exchanges - 1), max_size=4)) if draw(st.booleans()) else []
    images = 0
    for exchange in range(exchanges):
        parts: list[str | int] = [draw(text)]
        for _ in range(asked.count(exchange)):
            parts += [images, draw(text)]
            images += 1
        turns.append(_turn("user", parts))
        turns.append(_turn("assistant", [draw(text)], draw(st.integers(0, 3)) > 0))
    return Conversation("generated", tuple(turns), (b"",) * images, "generated.json[0]")


def _turn(role: Role, parts: Sequence[str | int], supervised: bool = True) -> Turn:
    made: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts]
    return Turn(role, tuple(p for p in made if p != TextPart("")), supervised)
