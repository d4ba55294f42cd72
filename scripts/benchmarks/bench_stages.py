"""Stage 1, LoRA, QLoRA and full fine-tuning on a GPU: samples per second, peak memory and MFU.

MFU is the share of the machine's matrix-product rate that the FLOPs of training reach. The same
code runs on a CPU with tiny shapes, where the figures only show that it works.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_flops import Sample, sample_flops
from bench_model import SEED, read_size
from bench_plots import plot_stages
from bench_results import command_line, print_table, write_results
from bench_rows import Row, make_captions, make_long_rows, make_rows, write_images, write_rows
from bench_runs import ONE_THREAD, JobFields, Peer, PeerError, Runs, say
from bench_sizes import NUM_IMAGE_TOKENS
from rich.console import Console
from transformers import AutoTokenizer

from vlm_sft.config.schema import DataFile, LanguageModelConfig, TrainConfig
from vlm_sft.data.records import read_records
from vlm_sft.data.sampler import epoch_order
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError

LORA = {"lora_r": 128, "lora_alpha": 256}
QUANTIZED = {"model": {"language_model": {"quantization": "nf4"}}}
CAPTION_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<image>' }}{% else %}"
    "{% generation %}{{ m['content'][0]['text'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
"""The `plain` template as a Jinja template of transformers."""


@dataclass(frozen=True)
class Stage:
    """A training method and its data.

    Attributes:
        mode: The `mode` of a job.
        rows: `captions`, `mixture`, or `long` (records of 2,048 tokens).
        batch_size: Records per step.
        micro_batch_size: Records per forward pass if they are padded.
        checkpointing: Whether activations are recomputed.
    """

    mode: str
    rows: str
    batch_size: int
    micro_batch_size: int
    checkpointing: bool = False


STAGES = {
    "stage 1": Stage("stage1", "captions", 64, 32),
    "LoRA": Stage("lora", "mixture", 32, 16),
    "QLoRA": Stage("qlora", "mixture", 32, 16),
    "full": Stage("full", "mixture", 32, 8),
    "LoRA, 2,048 tokens": Stage("lora", "long", 1, 1, checkpointing=True),
    "QLoRA, 2,048 tokens": Stage("qlora", "long", 1, 1, checkpointing=True),
}
MAX_PACK = 16_384

COLUMNS = {
    "stage": "stage",
    "name": "peer",
    "rate": "samples / s",
    "mfu": "MFU, %",
    "peak_gib": "peak memory, GiB",
    "loss": "last loss",
    "note": "",
}


def stage_rows(work: Path, arguments: argparse.Namespace, facts: JobFields, runs: Runs) -> None:
    """Run the requested stages; print and write the results."""
    peak = machine_rate(arguments.device)
    table: list[dict[str, Any]] = []
    chosen = {name: STAGES[name] for name in arguments.only}
    small = arguments.size == "tiny"
    for name, stage in chosen.items():
        stage = _smaller(stage) if small else stage
        data, mean_flops = _data(work, name, stage, arguments.steps)
        for peer in _peers(stage):
            row = {"stage": name, "name": peer.name}
            table.append(row | _measured(runs, peer, stage, data, arguments, mean_flops / peak))
    _tell(arguments, facts, table, peak)


def _peers(stage: Stage) -> list[Peer]:
    """Padded and packed with these settings, and HF Trainer with the same.

    HF Trainer runs in this environment: all that it needs vlm_sft needs too.
    """
    train = {"gradient_checkpointing": stage.checkpointing}
    quantized = QUANTIZED if stage.mode == "qlora" else {}
    packing = {"micro_batch_size": None, "packing": {"max_tokens": MAX_PACK}}
    packed = {"train": {**train, **packing}, **quantized}
    shared = {"train": {**train, **packing, "share_image_prefix": True}, **quantized}
    size = stage.micro_batch_size
    peers = [
        Peer("vlm_sft, padded", "ours.py", None, 1.0, size, {"train": train, **quantized}),
        Peer("HF Trainer", "hf_trainer.py", None, 2.0, size),
    ]
    if stage.batch_size > 1:
        peers.insert(1, Peer("vlm_sft, packed", "ours.py", None, 1.0, size, packed))
    if stage.rows == "mixture":
        name = "vlm_sft, packed, shared prefixes"
        peers.insert(2, Peer(name, "ours.py", None, 1.0, size, shared))
    return peers


def _measured(
    runs: Runs,
    peer: Peer,
    stage: Stage,
    data: JobFields,
    arguments: argparse.Namespace,
    seconds_at_peak: float,
) -> dict[str, Any]:
    """The row's figures, or why there are none."""
    missing = _missing(peer)
    if missing is not None:
        return {"note": missing}
    job = {
        "rows": data["unordered"] if peer.is_ours else data["rows"],
        "images": data["images"],
        "mode": stage.mode,
        "steps": arguments.steps,
        "batch_size": stage.batch_size,
        "max_length": 2048,
        "options": {
            **LORA,
            "gradient_checkpointing": stage.checkpointing,
            "workers": 8 if arguments.device == "cuda" else 0,
            "chat_template": CAPTION_TEMPLATE if stage.rows == "captions" else None,
            "template": "plain" if stage.rows == "captions" else "vicuna_v1",
        },
    }
    try:
        run = runs.run(peer, job, note=stage.mode)
    except PeerError as error:
        if error.out_of_memory:
            return {"note": "out of memory"}
        say(error.log[-2000:])
        return {"note": str(error)}
    wall = run["wall"]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(wall[1:]))
    rate = stage.batch_size / seconds
    return {
        "rate": rate,
        "mfu": 100 * rate * seconds_at_peak,
        "peak_gib": (run["peak_device_bytes"] or run["peak_rss"]) / 2**30,
        "loss": run["losses"][-1],
        "note": None,
    }


def _missing(peer: Peer) -> str | None:
    """Why this version of vlm_sft cannot run the row; None where it can."""
    language_model = peer.config.get("model", {}).get("language_model", {})
    known = set(TrainConfig.model_fields) | set(LanguageModelConfig.model_fields)
    unknown = {*peer.config.get("train", {}), *language_model} - known
    if not unknown:
        return None
    return f"not measured: this version of vlm_sft has no {sorted(unknown)[0]}"


def _smaller(stage: Stage) -> Stage:
    """The stage for tiny shapes on a CPU."""
    batch = min(4, stage.batch_size)
    return Stage(stage.mode, stage.rows, batch, min(2, batch), stage.checkpointing)


def _data(work: Path, name: str, stage: Stage, steps: int) -> tuple[dict[str, Any], float]:
    """Files of the stage's rows, and the mean arithmetic of one."""
    count = stage.batch_size * steps
    makers = {"captions": make_captions, "mixture": make_rows, "long": make_long_rows}
    rows = makers[stage.rows](count, seed=SEED)
    folder = work / name.replace(" ", "-").replace(",", "")
    folder.mkdir()
    write_images(rows, folder, distinct=32)
    write_rows(rows, folder / "rows.jsonl")
    order = epoch_order([1.0] * len(rows), seed=SEED, epoch=0)
    write_rows([rows[index] for index in order], folder / "ordered.jsonl")
    template = "plain" if stage.rows == "captions" else "vicuna_v1"
    samples = row_samples(folder / "rows.jsonl", rows, work / "model", template)
    size = read_size(work / "model")
    mean = statistics.mean(sample_flops(size, sample, stage.mode) for sample in samples)
    return {
        "unordered": str(folder / "rows.jsonl"),
        "rows": str(folder / "ordered.jsonl"),
        "images": str(folder),
    }, mean


def row_samples(path: Path, rows: Sequence[Row], model: Path, template: str) -> list[Sample]:
    """Return the tokens, supervised tokens and images of every row of a file."""
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    chat_tokenizer = ChatTokenizer.from_name(template, tokenizer)
    found = []
    for record, row in zip(read_records(DataFile(path=str(path))), rows, strict=True):
        if isinstance(record, RecordError):
            raise record
        tokenized = chat_tokenizer.tokenize(record)
        images = int("image" in row)
        tokens = len(tokenized.input_ids) + images * (NUM_IMAGE_TOKENS - 1)
        found.append(Sample(tokens, sum(label >= 0 for label in tokenized.labels), images))
    return found


def machine_rate(device: str) -> float:
    """Return the FLOP/s of a large matrix product, in a process that leaves no memory behind.

    On a CPU it has one thread, as the peers.
    """
    script = Path(__file__).parent / "bench_flops.py"
    one_thread = ONE_THREAD if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, str(script), device],
        capture_output=True, text=True, check=True, env={**os.environ, **one_thread},
    )  # fmt: skip
    return float(done.stdout)


def _tell(
    arguments: argparse.Namespace,
    facts: JobFields,
    table: Sequence[Mapping[str, Any]],
    peak: float,
) -> None:
    name = f"train-{arguments.device}-{arguments.size}"
    title = f"Stages of training, {arguments.size} shapes on {facts['accelerator'] or 'a CPU'}"
    heading = (
        f"CLIP and Llama with random weights; a matrix product runs at {peak / 1e12:.3g} TFLOP/s"
    )
    print_table(heading, COLUMNS, table)
    output = Path(arguments.output)
    measured = [row for row in table if "rate" in row]
    image = f"{name}.png" if measured else None
    write_results(
        output,
        name,
        title=title,
        command=command_line("scripts/benchmarks/bench_train", arguments.given),
        tables=[(heading, COLUMNS, table)],
        details={"matmul_flops": peak, "stages": json.loads(json.dumps(STAGES, default=vars))},
        facts=facts,
        plot=image,
    )
    if image is not None:
        plot_stages(measured, output / image, title=title)
    Console().print(f"written: {output / name}.json, .md", highlight=False)
