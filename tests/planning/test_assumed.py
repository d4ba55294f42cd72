"""Plans without data, tokenizer or downloads: assumed records and published shapes."""

import json
from pathlib import Path

import pytest
import torch

from tests.finished_models import released_folder
from vlm_sft.config.finished import resolve
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError
from vlm_sft.plan import main
from vlm_sft.planning import local_configs
from vlm_sft.planning.assumed import AssumedRecords, assumed_data_stats, parse_assumed
from vlm_sft.planning.local_configs import known_shapes, language_model_config
from vlm_sft.planning.meta_model import MetaModel
from vlm_sft.planning.step_stats import plan_steps

pytestmark = pytest.mark.usefixtures("in_the_repository")

STAGE2 = "configs/tiny/stage2.yaml"
NO_DATA = ["data.train.0.path=nowhere.json", "data.eval=[]"]
NO_DATA += ["projector=null", "model.language_model.config.num_hidden_layers=1"]


def test_a_plan_with_assumed_records_reads_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpu", "l4", "--json", "--assume", "1000,120,30,2"]
    assert main([STAGE2, *options, *NO_DATA]) == 0
    plan = json.loads(capsys.readouterr().out)
    data = plan["data"]
    assert data["assumed"] is True and data["every_record_tokenized"] is False
    found = (data[key] for key in ("records_per_epoch", "mean_tokens", "mean_targets"))
    assert tuple(found) == (1000, 120, 30)
    assert plan["run"]["steps"] == 40 * 1000 / 8
    largest = plan["run"]["largest_micro_batch"]
    assert (largest["rows"], largest["length"], largest["images"]) == (4, 120, 8)
    assert "image loading: not considered (no records read)" in plan["notes"]
    assert main([STAGE2, "--gpu", "l4", "--assume", "1000,120,30,2", *NO_DATA]) == 0
    assert "1,000 records per epoch (assumed, all alike)" in capsys.readouterr().out


def test_assumed_records_are_packed_like_others() -> None:
    packing = ["train.micro_batch_size=null", "train.packing.max_tokens=256"]
    config = load_config(STAGE2, packing)
    steps = plan_steps(config, assumed_data_stats(parse_assumed("64,100,10"), config), gpus=1)
    assert {(batch.records, batch.length) for batch in steps.micro_batches} == {(2, 200)}


@pytest.mark.parametrize(
    "text", ["", "10", "10,20", "0,20,1", "1,2,1,0", "a,2,1", "1,2,1,1,1", "-1,2,1"]
)
def test_wrong_assumptions_are_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=f"--assume {text}: expected RECORDS,TOKENS,SUPERVISED"):
        parse_assumed(text)


def test_impossible_assumptions_are_refused() -> None:
    with pytest.raises(UserError, match="30 of 20 tokens cannot be supervised"):
        parse_assumed("10,20,30")
    with pytest.raises(UserError, match=r"longer than data.max_length \(256\)"):
        assumed_data_stats(AssumedRecords(1, 300, 10, 1), load_config(STAGE2))
    with pytest.raises(UserError, match="remove --assume"):
        main([STAGE2, "--calibrate", "--assume", "10,20,3"])


def test_published_shapes_are_used_where_no_file_has_them_and_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("configs/llava-1.5/stage1.yaml").model
    notes = known_shapes(config)
    assert [note.partition(":")[0] for note in notes] == [
        "model.language_model.name",
        "model.vision_tower.name",
    ]
    assert language_model_config(config.language_model).num_hidden_layers == 32
    cached = tmp_path / "config.json"
    cached.write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    monkeypatch.setattr(local_configs, "_cached_config", lambda _: str(cached))
    assert known_shapes(config) == []


def test_a_finished_model_is_planned_from_its_folder_and_from_its_published_shapes(
    tmp_path: Path,
) -> None:
    released_folder(tmp_path / "llava")
    config = load_config(
        "configs/llava-1.5/finetune_lora.yaml", [f"model.from_checkpoint={tmp_path / 'llava'}"]
    )
    model = MetaModel(resolve(config, download=False).model, dtype=torch.float32)
    assert (model.num_layers, model.layout_rule.crop_tokens) == (2, 4)
    published = resolve(load_config("configs/llava-1.5/finetune_lora.yaml"), download=False)
    assert len(known_shapes(published.model)) == 2
    large = MetaModel(published.model, dtype=torch.bfloat16)
    assert (large.num_layers, large.layout_rule.crop_tokens) == (32, 576)
    assert large.language_config.vocab_size == 32064
    unknown = load_config(
        "configs/llava-1.5/finetune_lora.yaml", ["model.from_checkpoint=nobody/nothing"]
    )
    with pytest.raises(UserError, match="hf download nobody/nothing --include"):
        resolve(unknown, download=False)
