"""Every defect of a tokenizer with a template is found on a real tokenizer that has it."""

import copy
import json
import shutil
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tokenizers_for_tests import load, missing, sentencepiece_tokenizer
from vlm_sft import check
from vlm_sft.checks.tokenizer.check import (
    build_chat_tokenizer,
    check_tokenizer,
    read_generation_config,
    summary,
)
from vlm_sft.checks.tokenizer.under_test import Finding, TokenizerUnderTest
from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.hf_tokenizer import BYTE_TOKENIZER_CHAT_TEMPLATE, byte_tokenizer, load_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import UserError
from vlm_sft.utils.constants import IGNORE_INDEX

ROOT = Path(__file__).parent.parent
CHATML = BYTE_TOKENIZER_CHAT_TEMPLATE
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] INSIDE }}{% endgeneration %}"
    "{{ OUTSIDE '\n' }}{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def findings(
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    generation_config: dict[str, Any] | None = None,
    chat_tokenizer: ChatTokenizer | None = None,
) -> dict[str, Finding]:
    chat_tokenizer = chat_tokenizer or ChatTokenizer.from_name(template, tokenizer)
    return {
        f.code: f for f in check_tokenizer(tokenizer, template, chat_tokenizer, generation_config)
    }


def with_template(jinja: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        ("bytes", "auto"),
        ("bytes", "chatml"),
        ("bytes", "vicuna_v1"),
        ("bytes", "plain"),
        ("bpe", "auto"),
        ("bpe", "chatml"),
        ("sentencepiece", "vicuna_v1"),
        ("sentencepiece", "plain"),
        ("llama_2_file", "llava_llama_2"),
        ("gemma", "gemma"),
        ("phi_3", "phi_3"),
        ("llama_3", "llama_3"),
        ("qwen", "auto"),
        ("smollm2", "smollm2"),
    ],
)
def test_a_healthy_pair_has_nothing_bad(tokenizer: str, template: str) -> None:
    if reason := missing(tokenizer):
        pytest.skip(reason)
    found = findings(load(tokenizer), template)
    assert [f for f in found.values() if f.level == "bad"] == []
    assert {"prompt", "control"} <= found.keys()
    assert "BAD" not in summary(list(found.values()))
    if tokenizer == template:
        assert found.keys() & {"own_template", "own_template_ends_differently"}


def test_the_models_own_chatml_is_good_throughout() -> None:
    found = findings(byte_tokenizer(), "chatml", {"eos_token_id": [257, 260]})
    assert {code for code, f in found.items() if f.level == "warning"} == set()
    assert found["own_template"].level == found["export"].level == "good"
    assert found["generation_config"].level == "good"
    assert "260" in found["stop_is_not_eos"].found
    assert "all 18 sequences" in found["export"].found
    assert found["control"].found.startswith("5 strings (5 special, 0 added)")


def test_the_check_does_not_change_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    findings(tokenizer, "vicuna_v1")
    assert (len(tokenizer), tokenizer.chat_template) == (261, CHATML)


def test_a_generation_config_without_the_stop_is_a_warning_that_names_the_id() -> None:
    found = findings(byte_tokenizer(), "chatml", {"eos_token_id": 257})
    finding = found["generation_config_without_stop"]
    assert finding.level == "warning"
    assert "257 (</s>)" in finding.found and "add 260 to eos_token_id" in finding.advice


def test_an_absent_generation_config_is_a_note() -> None:
    assert findings(byte_tokenizer())["generation_config_absent"].level == "note"


def test_a_template_that_writes_bos_twice_is_bad() -> None:
    found = findings(with_template("{{ bos_token }}{{ bos_token }}" + CHATML))
    assert found["bos_doubled"].level == "bad"


def test_a_tokenizer_that_adds_a_bos_that_the_template_lacks_is_a_warning() -> None:
    tokenizer = copy.deepcopy(sentencepiece_tokenizer())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    assert findings(tokenizer, "chatml")["bos_not_trained"].level == "warning"
    assert findings(tokenizer, "vicuna_v1")["bos_added_by_both"].level == "note"


@pytest.mark.parametrize(("pad", "code"), [("</s>", "pad_is_eos"), ("<s>", "pad_is_other")])
def test_a_padding_token_with_another_meaning_is_a_note_that_counts_what_others_lose(
    pad: str, code: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    finding = findings(tokenizer, "vicuna_v1")[code]
    assert finding.level == "note" and "harmless here" in finding.found
    if pad == "</s>":
        assert "every stop token among them" in finding.advice


def test_no_padding_token_is_a_note() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    finding = findings(tokenizer, "vicuna_v1")["pad_missing"]
    assert "</s> (id 257) is used, which is the stop token and EOS" in finding.found


def test_a_jinja_template_that_trims_is_exported_without_trimming() -> None:
    trimming = CHATML.replace("message['content']", "message['content']|trim")
    chat_tokenizer = ChatTokenizer.from_name("auto", with_template(trimming))
    text = TokenizerUnderTest(
        chat_tokenizer.tokenizer, "auto", chat_tokenizer, None
    ).exported.apply_chat_template(
        [{"role": "user", "content": "  Is there a dog?\n"}], tokenize=False
    )
    assert text == "<|im_start|>user\n  Is there a dog?\n<|im_end|>\n"


def test_an_own_template_that_accepts_no_system_text_is_compared_without_one() -> None:
    found = findings(sentencepiece_tokenizer(), "vicuna_v1")
    assert found["own_template_differs"].level == "warning"


def test_header_markers_that_are_ordinary_text_are_bad() -> None:
    jinja = CHATML.replace("'<|im_start|>' + message", "'<|start|>' + message")
    jinja = jinja.replace("<|im_start|>assistant", "<|start|>assistant")
    finding = findings(with_template(jinja))["header_is_text"]
    assert finding.level == "bad" and "<|start|> is 9 tokens" in finding.found


def test_markers_in_brackets_are_noted_as_ordinary_text() -> None:
    jinja = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    finding = findings(with_template(jinja))["ordinary_marks"]
    assert finding.level == "note" and "[INST], [/INST]" in finding.found


def test_another_format_than_the_models_own_is_a_warning_that_shows_where() -> None:
    finding = findings(byte_tokenizer(), "vicuna_v1")["own_template_differs"]
    assert finding.level == "warning"
    assert "<s>A chat between" in finding.found and "<|im_start|>system" in finding.found


LLAVA_15 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As in llava-1.5-7b-hf: it skips contents that are plain text, and writes no EOS after answers."""


def test_a_template_that_reads_parts_only_is_compared_with_its_texts() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = LLAVA_15
    chosen = ChatTokenizer.from_name("vicuna_v1", tokenizer, default_system="")
    found = findings(tokenizer, "auto", chat_tokenizer=chosen)
    shown = [f.found for name, f in found.items() if name.startswith("own_template")]
    assert shown and not any(f.level == "warning" for f in found.values() if "own_" in f.found)
    assert "own_template_differs" not in found
    assert not any("'USER: ASSISTANT: '" in text for text in shown)


def test_a_template_of_stage_1_need_not_write_a_chat() -> None:
    found = findings(byte_tokenizer(), "plain")
    assert found["own_template_unused"].level == "note"
    assert "own_template_differs" not in found
    assert findings(byte_tokenizer(), "llava_plain")["no_stop"].level == "note"


def test_a_custom_system_text_is_no_other_format() -> None:
    brief = ChatTokenizer.from_name("chatml", byte_tokenizer(), default_system="Be brief.")
    assert (
        findings(byte_tokenizer(), "chatml", chat_tokenizer=brief)["own_template"].level == "good"
    )


def test_a_template_with_todays_date_is_a_warning() -> None:
    assert findings(with_template("{{ strftime_now('%d') }}" + CHATML))["dated"].level == "warning"


@pytest.mark.parametrize(
    ("inside", "outside", "code"),
    [
        ("+ '<|im_end|>'", "", "generation_mask"),
        ("", "'<|im_end|>' +", "generation_mask_differs"),
    ],
)
def test_generation_markers_are_compared_with_our_mask(
    inside: str, outside: str, code: str
) -> None:
    jinja = MARKED.replace("INSIDE", inside).replace("OUTSIDE", outside)
    finding = findings(with_template(jinja))[code]
    if outside:
        assert "trained only by vlm_sft: <|im_end|>" in finding.found
        assert finding.level == "note"


def test_absent_generation_markers_are_a_note() -> None:
    assert findings(byte_tokenizer())["no_generation_markers"].level == "note"


def letters(
    unk: str | None, *, special: bool, normalizer: Any = None, alphabet: str = ""
) -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters without byte fallback."""
    known = [chr(i) for i in range(32, 127)] + ["\n", *alphabet]
    vocabulary = {letter: i for i, letter in enumerate(known)}
    if unk is not None:
        vocabulary[unk] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unk))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk if special else None,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_characters_that_the_vocabulary_lacks_are_named() -> None:
    finding = findings(letters("<unk>", special=True))["unspellable"]
    assert finding.level == "warning"
    assert "'图' (U+56FE)" in finding.found and "combining characters" in finding.found


def test_characters_that_are_lost_silently_are_bad() -> None:
    assert findings(letters(None, special=False))["text_changed"].level == "bad"


def test_a_normalizer_that_rewrites_is_noted() -> None:
    tokenizer = letters("<unk>", special=True, normalizer=normalizers.Lowercase())
    assert findings(tokenizer)["normalized"].level == "note"


def test_a_chat_template_without_a_stop_token_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "endless.yaml"
    file.write_text(
        'name: endless\ndescription: no stop\nbegin: "{bos}"\n'
        'user: {prefix: "Q: ", suffix: "\\n"}\n'
        'assistant: {prefix: "A:", stop: "", answer_suffix: "\\n"}\n'
    )
    assert findings(byte_tokenizer(), str(file))["no_stop"].level == "warning"


def test_an_answer_with_nothing_before_it_is_a_warning() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    finding = findings(tokenizer, "plain")["nothing_before_answer"]
    assert finding.level == "warning" and "in: text only;" in finding.found


def test_padding_with_unk_is_noted() -> None:
    tokenizer = letters("<unk>", special=True)
    tokenizer.pad_token = "<unk>"
    assert "is also UNK" in findings(tokenizer)["pad_is_other"].found


def test_labels_that_cannot_be_proven_are_bad() -> None:
    tokenizer = byte_tokenizer()
    shouting = ChatTokenizer.from_name("chatml", tokenizer)
    decode = shouting.encoder.decode_all

    def shout(rows: Sequence[list[int]]) -> list[str]:
        return [text.upper() for text in decode(rows)]

    shouting.encoder.decode_all = shout  # type: ignore[method-assign]
    finding = findings(tokenizer, "chatml", chat_tokenizer=shouting)["mask_proof"]
    assert finding.level == "bad"
    assert "text only, 3 turns, system" in finding.found and "'YES, ON THE" in finding.found


class Faulty(ChatTokenizer):
    """A chat tokenizer with a defect that is added after its labels were verified."""

    fault: str

    def tokenize(self, conversation: Conversation) -> TokenizedRecord:
        tokenized = super().tokenize(conversation)
        if self.fault == "stop":
            for span in tokenized.answer_spans:
                tokenized.labels[span.end - 1] = IGNORE_INDEX
        return tokenized

    def prompt(self, conversation: Conversation) -> list[int]:
        ids = super().prompt(conversation)
        return {"prompt": [*ids, 32], "begin": [256, *ids]}.get(self.fault, ids)

    def to_jinja(self) -> str:
        jinja = super().to_jinja()
        return {
            "format": jinja.replace("<|im_end|>", "</s>"),
            "words": jinja.replace("<|im_start|>user", "<|im_start|>User"),
            "crash": "{{ raise_exception('no') }}",
        }.get(self.fault, jinja)


@pytest.mark.parametrize(
    ("fault", "code", "level"),
    [
        ("stop", "stop_not_supervised", "bad"),
        ("prompt", "prompt_is_no_prefix", "bad"),
        ("begin", "begin_differs", "bad"),
        ("format", "export_format_differs", "bad"),
        ("words", "export_ids_differ", "warning"),
        ("crash", "export_fails", "bad"),
    ],
)
def test_a_faulty_chat_tokenizer_is_found(fault: str, code: str, level: str) -> None:
    tokenizer = byte_tokenizer()
    faulty = Faulty.from_name("chatml", tokenizer)
    assert isinstance(faulty, Faulty)
    faulty.fault = fault
    assert findings(tokenizer, "chatml", chat_tokenizer=faulty)[code].level == level


def test_text_that_becomes_a_special_token_is_bad() -> None:
    tokenizer = byte_tokenizer()
    leaky = ChatTokenizer.from_name("chatml", tokenizer)

    def encode_all(texts: Iterable[str]) -> dict[str, Any]:
        return {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}

    leaky.encoder.encode_all = encode_all  # type: ignore[method-assign]
    finding = findings(tokenizer, "chatml", chat_tokenizer=leaky)["control_from_data"]
    assert finding.level == "bad" and "<|im_end|>" in finding.found


def sentencepiece_folder(folder: Path, **settings: object) -> Path:
    model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copy(str(model), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizers_backend_is_compared_with_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    found = findings(load_tokenizer(LanguageModelConfig(name=str(folder))), "vicuna_v1")
    assert found["sentencepiece_differs_rarely"].level == "note"
    assert "3 of 33 texts" in found["sentencepiece_differs_rarely"].found
    assert found["legacy_differs"].level == "note"
    assert "▁" in found["legacy_differs"].found


def test_a_backend_that_lost_its_leading_space_is_a_warning(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, add_prefix_space=False)
    found = findings(load_tokenizer(LanguageModelConfig(name=str(folder))), "vicuna_v1")
    assert found["sentencepiece_differs"].level == "warning"


def test_without_the_sentencepiece_file_nothing_is_compared() -> None:
    found = findings(sentencepiece_tokenizer(), "vicuna_v1")
    assert found["sentencepiece_absent"].level == "note"
    assert "sentencepiece" not in findings(byte_tokenizer())


def test_a_template_for_one_exchange_lists_what_it_does_not_accept() -> None:
    finding = findings(byte_tokenizer(), "plain")["template_limits"]
    assert "would refuse 3 turns, system, 3 turns about an image" in finding.found


def test_a_template_that_accepts_nothing_is_bad() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role != 'user' %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    finding = findings(tokenizer)["template_misfit"]
    assert finding.level == "bad" and "accepts none" in finding.found


def test_a_stop_token_that_the_tokenizer_lacks_is_a_misfit() -> None:
    finding = build_chat_tokenizer(sentencepiece_tokenizer(), "chatml")
    assert isinstance(finding, Finding)
    assert (finding.code, finding.level) == ("template_misfit", "bad")
    assert "<|im_end|>" in finding.found


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = check.main(arguments)
    return code, capsys.readouterr().out


def test_the_command_prints_a_summary_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out = run(["--tokenizer", "bytes", "--template", "chatml"], capsys)
    assert code == 0
    assert "exact prefixes of the training ids" in out
    assert out.splitlines()[-1].startswith(
        "good: training, inference and export use the same tokens"
    )


def test_bad_findings_exit_with_2_and_strict_makes_warnings_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(sentencepiece_folder(tmp_path))
    code, out = run(["--tokenizer", folder, "--template", "chatml"], capsys)
    assert code == 2 and "BAD" in out and "template_misfit" in out
    vicuna = ["--tokenizer", "bytes", "--template", "vicuna_v1"]
    assert run(vicuna, capsys)[0] == 0
    assert run([*vicuna, "--strict"], capsys)[0] == 2


def test_json_has_every_finding_and_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    byte_tokenizer().save_pretrained(tmp_path)
    arguments = ["--tokenizer", str(tmp_path), "--system", "Be brief.", "--json"]
    code, out = run(arguments, capsys)
    result = json.loads(out)
    assert (code, result["good"]) == (0, True)
    by_code = {finding["code"]: finding for finding in result["findings"]}
    assert by_code["generation_config_without_stop"]["level"] == "warning"
    assert set(by_code["prompt"]) == {"code", "level", "what", "found", "advice"}


def test_the_check_of_a_configuration_has_the_findings_as_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = ["configs/tiny/stage2.yaml", "--no-model"]
    code, out = run(config, capsys)
    assert code == 0 and "special tokens in data" in out and "the run can start" in out
    own = ["configs/tiny/stage2.yaml", "--no-model", "--strict", "data.template=vicuna_v1"]
    code, out = run(own, capsys)
    assert code == 2 and "another format" in out and "check failed" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give CONFIG.yaml, or --tokenizer DIR"),
        (
            ["--tokenizer", "bytes", "--template", "chatlm"],
            "--template: no template 'chatlm'; did you mean 'chatml'",
        ),
        (["--tokenizer", "/nowhere/at-all"], "no such folder"),
        (["--tokenizer", "bytes", "--no-model"], "--no-model: needs CONFIG.yaml"),
        (["my.yaml", "--template", "chatml"], "--template: give CONFIG.yaml or --tokenizer"),
        (["--tokenizer", "bytes", "--generation-config", "/nowhere"], "no generation_config.json"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        check.main(arguments)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json:1:2: not valid JSON"):
        read_generation_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        read_generation_config(tmp_path)
