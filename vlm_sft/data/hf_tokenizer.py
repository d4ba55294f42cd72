"""Load the language model's Hugging Face tokenizer, and copy it for exports."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm_sft.config.finished_original import original_language_model
from vlm_sft.config.schema import LanguageModelConfig, means_folder
from vlm_sft.errors import UserError
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.image_paths import looked_for, nearest_existing
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder

BYTE_TOKENIZERS: Final = {"bytes": (), "bytes-img": ("<img>", "</img>")}
"""Names of the built-in byte tokenizers, and the tokens that each adds to those of `bytes`."""

BYTE_TOKENIZER_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(
    config: LanguageModelConfig, where: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model: `config.tokenizer`, or the one of `config.name`.

    Args:
        config: Names the tokenizer.
        where: Where the name comes from, for errors; None: its configuration key.

    Raises:
        UserError: The folder or hub name has no tokenizer, or one without a `tokenizers` backend.
    """
    name = config.tokenizer or config.name
    assert name is not None  # the config guarantees it
    if name in BYTE_TOKENIZERS:
        return byte_tokenizer(BYTE_TOKENIZERS[name])
    key = where or f"model.language_model.{'tokenizer' if config.tokenizer else 'name'}"
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(
            f"{key}: no such folder {name!r}{looked_for(folder)}; give a folder with "
            "tokenizer.json or a hub name"
        )
    action = f"load a tokenizer from {name!r}"
    if not folder.is_dir():
        use_cache_if_hub_unreachable()
        near = nearest_existing(name, folder=True)
        action = f"get the tokenizer of {name!r} from the hub, and there is no such folder{near}"
    with library_call("transformers", key, action), custom_code_refused(key, name):
        options: dict[str, Any] = {}
        if folder.is_dir():
            require_plain_folder(folder)
        # transformers knows neither the model type of an original LLaVA folder nor, from that, its
        # tokenizer: it would read tokenizer.model by other rules.
        if (kind := original_language_model(_description(folder, name))) is not None:
            options["config"] = AutoConfig.for_model(kind)
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else name, trust_remote_code=False, **options
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{key}: the tokenizer of {name!r} is {type(tokenizer).__name__}, which "
            "has no `tokenizers` backend; convert it to a tokenizer.json"
        )
    return tokenizer


def _description(folder: Path, name: str) -> Path:
    """Return the folder with a model's `config.json`, which for a hub name is in the cache."""
    if folder.is_dir():
        return folder
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else folder


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that pads shorter sequences: the tokenizer's pad, else its EOS, else 0.

    Padding is masked by attention and never labeled, so that any id works.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def exported_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """Return a copy of a run's tokenizer for an exported model.

    It has an `<image>` token and pads on the left, which batched generation needs. If the chat
    template writes BOS, the tokenizer does not: the template's text has the same ids with and
    without `add_special_tokens`.

    Args:
        tokenizer: Not changed.
        chat_template: Jinja text of the run's chat template, or None.
    """
    made: Any = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
    made.padding_side = made.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    if chat_template is not None:
        made.chat_template = chat_template
        if made("a")["input_ids"] != made("a", add_special_tokens=False)["input_ids"]:
            made.add_bos_token = made.add_eos_token = False
    return cast(PreTrainedTokenizerBase, made)


def byte_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with the special tokens of ChatML and Llama.

    256 byte tokens, then `<s>`, `</s>`, `<pad>`, `<|im_start|>`, `<|im_end|>`: 261 ids;
    then `more`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *more],
    )
    tokenizer.chat_template = BYTE_TOKENIZER_CHAT_TEMPLATE
    return tokenizer
