"""The benchmarks' own claims: rows, template, arithmetic and figures; no peer is run here."""

import dataclasses
import json
from pathlib import Path

import bench_flops
import bench_model
import bench_results
import bench_rows
import bench_sizes
import bench_stages
import bench_train
import pytest

from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.data.tokenize import ChatTokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"
SEVEN_B = bench_sizes.SIZES["7b"]


def test_rows_have_the_mixtures_share_of_images_and_of_records_an_image() -> None:
    rows = bench_rows.make_rows(3000, seed=1)
    images = [row["image"] for row in rows if "image" in row]
    assert len(images) / len(rows) == pytest.approx(0.94, abs=0.01)
    assert len(images) / len(set(images)) == pytest.approx(624_610 / 378_797, abs=0.02)
    asked_first = [row["conversations"][0]["value"].startswith("<image>\n") for row in rows]
    assert asked_first == ["image" in row for row in rows]


def test_rows_are_the_same_for_the_same_seed_alone() -> None:
    assert bench_rows.make_rows(50, seed=3) == bench_rows.make_rows(50, seed=3)
    assert bench_rows.make_rows(50, seed=3) != bench_rows.make_rows(50, seed=4)


def test_what_peers_see_is_what_our_template_renders_token_for_token(tmp_path: Path) -> None:
    tokenizer = bench_model.make_tokenizer()
    chat_tokenizer = ChatTokenizer.from_name(bench_model.TEMPLATE, tokenizer)
    rows = bench_rows.make_rows(40, seed=2)
    bench_rows.write_rows(rows, tmp_path / "rows.jsonl")
    roles = {"human": "user", "gpt": "assistant"}
    for record, row in zip(
        read_records(DataFile(path=str(tmp_path / "rows.jsonl"))), rows, strict=True
    ):
        assert isinstance(record, Conversation)
        ours = chat_tokenizer.tokenize(record)
        theirs = tokenizer.apply_chat_template(
            [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        image = tokenizer.convert_tokens_to_ids("<image>")
        expected = [image if token < 0 else token for token in ours.input_ids]
        assert theirs["input_ids"] == expected
        assert theirs["assistant_masks"] == [int(label >= 0) for label in ours.labels]


@pytest.mark.parametrize(
    ("mode", "tokens", "targets", "expected"),
    [
        ("stage1", 598, 22, 16.26e12),
        ("lora", 822, 117, 22.32e12),
        ("full", 822, 117, 33.00e12),
    ],
)
def test_arithmetic_of_llava_7b_is_what_its_shapes_say(
    mode: str, tokens: int, targets: int, expected: float
) -> None:
    sample = bench_flops.Sample(tokens, targets, images=1)
    assert bench_flops.sample_flops(SEVEN_B, sample, mode) == pytest.approx(expected, rel=0.03)


def test_every_peers_environment_is_pinned_with_the_same_torch() -> None:
    names = {peer.environment for peer in bench_train.ALL_PEERS if peer.environment}
    assert names == {"hf_trainer", "ms_swift", "trl"}
    for name in names:
        lines = (SCRIPTS / "benchmarks" / "bench_peers" / f"{name}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert all("==" in pin for pin in pins)
        assert "torch==2.15.0" in pins


def test_the_first_step_does_not_count() -> None:
    slow = {"job": {"batch_size": 4}, "cpu": [10.0, 30.0, 32.0, 34.0], "losses": [3.0, 2.0, 1.0]}
    assert bench_train._rate(slow) == 2.0
    assert bench_train._step_seconds(slow) == [2.0, 2.0]
    other = {**slow, "losses": [3.0, 2.5, 1.0]}
    assert bench_train._loss_difference([slow, other], [slow]) == 0.5


def test_a_row_that_this_version_cannot_run_says_so() -> None:
    padded = bench_train.OURS_PADDED
    assert bench_train._missing(padded) is None
    later = dataclasses.replace(padded, config={"train": {"a_setting_to_come": 1}})
    assert "not measured" in str(bench_train._missing(later))
    assert "a_setting_to_come" in str(bench_stages._missing(later))


def test_a_results_command_names_no_folder_of_the_machine() -> None:
    given = ["--steps", "3", "--environments", "/somewhere/else", "--peers", "TRL", "--scratch=/x"]
    line = bench_results.command_line("scripts/benchmarks/bench_train", given)
    assert line == "scripts/benchmarks/bench_train --steps 3 --peers TRL"


def test_results_are_a_page_and_json_with_machine_and_date(tmp_path: Path) -> None:
    facts = bench_results.machine_facts()
    columns = {"name": "peer", "rate": "samples / s"}
    rows = [{"name": "one", "rate": 1.2345}, {"name": "two", "rate": None}]
    bench_results.write_results(
        tmp_path,
        "trial",
        title="A trial",
        command="scripts/trial --fast",
        tables=[("Peers", columns, rows)],
        details={"seed": 1},
        facts=facts,
    )
    page = (tmp_path / "trial.md").read_text()
    assert "| peer | samples / s |\n| --- | --- |\n| one | 1.23 |\n| two | - |\n" in page
    assert facts["date"] in page and "scripts/trial --fast" in page
    kept = json.loads((tmp_path / "trial.json").read_text())
    assert kept["tables"] == {"Peers": rows} and kept["seed"] == 1
    assert kept["machine"]["versions"]["torch"]
