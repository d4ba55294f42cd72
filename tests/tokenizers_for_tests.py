"""Real tokenizers that tests share: SentencePiece from a package, BPE trained on the spot."""

import functools
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from vlm_sft.data.tokenizer import BYTE_TOKENIZER_CHAT_TEMPLATE


@functools.cache
def sentencepiece_tokenizer() -> LlamaTokenizer:
    """The 32,000-piece SentencePiece vocabulary of Mistral v1: Llama's and Vicuna's kind."""
    model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(str(model), Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


@functools.cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges (GPT-2's pre-tokenisation), ChatML tokens and template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        Path(__file__).read_text() + Path(__file__).with_name("test_masking_text.txt").read_text()
    )
    backend.train_from_iterator([text] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<tool>"],
    )
    tokenizer.chat_template = BYTE_TOKENIZER_CHAT_TEMPLATE
    return tokenizer
