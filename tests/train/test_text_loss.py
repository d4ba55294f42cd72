"""`data.eval_text`: the loss of held-out text before and after stage 2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import TINY, rows, run
from vlm_sft.config.method import trainable_parts
from vlm_sft.config.schema import RunConfig, load_stored_config
from vlm_sft.data.build import load_chat_tokenizer
from vlm_sft.data.records import read_records
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.inspection.run_data import read_run
from vlm_sft.inspection.run_report import write_run_report
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.setup import load_model
from vlm_sft.train.trackers import tracker_values

PACKED = ("train.micro_batch_size=null", "train.packing.max_tokens=256")
QUIET = ("projector=null", "train.eval_samples=0", "data.eval=[]")


def text_file(folder: Path, **more: Any) -> str:
    """Write two conversations without images, and return the setting that names them."""
    turns = [("What is two plus three?", "Five."), ("And four?", "Nine, of course.")]
    talks = [turns, [("Name a fruit.", "An apple.")]]
    records: list[dict[str, Any]] = [
        {
            "id": f"t{i}",
            "conversations": [
                {"from": who, "value": text}
                for exchange in talk
                for who, text in zip(("human", "gpt"), exchange, strict=True)
            ],
        }
        for i, talk in enumerate(talks)
    ]
    records[0] |= more
    (folder / "text.json").write_text(json.dumps(records))
    return f"data.eval_text=[{{path: {folder / 'text.json'}}}]"


def plain_loss(config: RunConfig, model: VisionLanguageModel) -> tuple[float, int]:
    """The mean loss of the supervised tokens, one record and one token at a time."""
    tokenizer, total, count = load_chat_tokenizer(config), 0.0, 0
    language_model = causal_lm(model.language_model).eval()
    for record in read_records(config.data.eval_text[0]):
        assert not isinstance(record, Exception)
        tokens = tokenizer.tokenize(record)
        with torch.no_grad():
            logits = language_model(input_ids=torch.tensor([tokens.input_ids])).logits[0]
        for position, label in enumerate(tokens.labels[1:]):
            if label >= 0:
                total -= float(torch.log_softmax(logits[position].double(), -1)[label])
                count += 1
    return total / count, count


@pytest.mark.parametrize(("config", "batches"), [("stage2", PACKED), ("stage2_lora", ())])
def test_the_loss_of_text_is_that_of_a_plain_loop_before_and_after(
    tmp_path: Path, config: str, batches: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    assert run("stage2", out, text_file(tmp_path), *QUIET, *batches, config=config) == 0
    before, after = [row for row in rows(out / "metrics.jsonl") if "text_loss" in row]
    stored = load_stored_config(out / "config.yaml")
    starting, _ = load_model(stored, trainable_parts(stored))
    wanted = [plain_loss(stored, starting), plain_loss(stored, load_checkpoint(out).model)]
    for row, (loss, count) in zip((before, after), wanted, strict=True):
        assert row["text_loss"] == pytest.approx(loss, abs=1e-5)
        assert row["text_num_targets"] == count
    assert (before["step"], after["step"]) == (0, 4) and before["text_loss"] != after["text_loss"]
    assert "eval/text_loss" in tracker_values(before)

    found = read_run(out).as_dict()
    assert found["text_loss"]["change"] == after["text_loss"] - before["text_loss"]
    assert [bucket["records"] for bucket in found["records"]["held-out text"]] == [2]
    shown = f"{before['text_loss']:.4f} → {after['text_loss']:.4f}"
    assert shown in write_run_report(out).read_text()


def test_a_resumed_run_keeps_the_loss_before_training_or_says_that_it_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, longer = text_file(tmp_path), ["train.max_steps=6", "--allow-change", "train.max_steps"]
    assert run("stage2", tmp_path / "a", text, *QUIET) == 0
    assert run("stage2", tmp_path / "a", text, *QUIET, *longer) == 0
    found = [row["step"] for row in rows(tmp_path / "a/metrics.jsonl") if "text_loss" in row]
    assert found == [0, 4, 6] and "cannot be measured" not in capsys.readouterr().err

    assert run("stage2", tmp_path / "b", *QUIET) == 0
    assert (
        run("stage2", tmp_path / "b", text, *QUIET, *longer, "--allow-change", "data.eval_text")
        == 0
    )
    said = "the run is at step 4, so the loss before training cannot be measured"
    assert said in capsys.readouterr().err
    assert read_run(tmp_path / "b").text_loss is None


def test_images_and_stage_1_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(next((TINY / "data/images").iterdir()).read_bytes())
    text = text_file(tmp_path, image="a.png")
    first = json.loads((tmp_path / "text.json").read_text())
    first[0]["conversations"][0]["value"] = "<image>\nWhat is it?"
    (tmp_path / "text.json").write_text(json.dumps(first))
    with pytest.raises(UserError, match=r"data\.eval_text: record 't0' has an image"):
        run("stage2", tmp_path / "run", text, *QUIET)
    with pytest.raises(ConfigError, match="stage 1 does not train the language model"):
        run("stage1", tmp_path / "one", text)
