"""Cost of training against tokens, images, records and processes, one thread per process.

    scripts/benchmarks/bench_scaling                                   # 1,000 to 1,000,000 records
    scripts/benchmarks/bench_scaling --records 1000 10000 --parts records step

Records: generated records of one exchange, which repeat a few real images, are read, tokenized,
filtered, ordered and packed as in a run. The cost per record should not depend on their number
(needs Linux: memory is read from /proc). Step, text and image: a step of the tiny LLaVA,
tokenization, and reading images. Processes: steps of `vlm_sft.stage2` under torchrun, equal ones
with one process and with two, and of four records a process with one, two and four. Planned: what
`vlm-sft plan` expects of LLaVA-1.5's recipes on 1 to 64 GPUs.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from bench_environments import PEERS
from bench_model import SEED, make_model, model_section
from bench_plots import plot_lines
from bench_results import FOLDER, command_line, machine_facts, print_table, write_results
from bench_rows import image_bytes, make_rows, write_images, write_rows
from bench_runs import ONE_THREAD, say
from bench_sizes import IMAGE, NUM_IMAGE_TOKENS, SIZES
from rich.console import Console
from transformers import AutoTokenizer

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.finished import resolve
from vlm_sft.config.schema import (
    LanguageModelConfig,
    ModelConfig,
    VisionTowerConfig,
    load_config,
)
from vlm_sft.data.batch import pad_examples
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.dataset import Example
from vlm_sft.data.images import read_pixels
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_model
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.parts import set_trainable
from vlm_sft.planning.assumed import assumed_data_stats, parse_assumed
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.gpus import ASSUMED_EFFICIENCY, GIB, GPUS_PER_MACHINE, NETWORK
from vlm_sft.planning.planner import Planner
from vlm_sft.planning.step_stats import plan_steps
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "llava-1.5"
RECORDS = (1_000, 10_000, 100_000, 1_000_000)
REPEATED, IMAGES = 2_000, 64
"""Different records and images that any number of records repeats."""
ROUNDS = 5
PARTS = ("records", "step", "paths", "processes", "planned")

Table = tuple[str, dict[str, str], list[dict[str, Any]]]
Panel = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run the requested parts; print and write the results."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    facts = machine_facts()
    tables: list[Table] = []
    panels: list[Panel] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        work = Path(name)
        make_model(SIZES["tiny"], work / "model", device="cpu", dtype=torch.float32)
        parts: dict[str, Callable[[Path], tuple[Table, list[Panel]]]] = {
            "records": lambda folder: _records(folder, arguments.records),
            "step": _step,
            "paths": _paths,
            "processes": _processes,
            "planned": lambda _: _planned(),
        }
        for part in arguments.parts:
            table, shown = parts[part](work)
            print_table(*table)
            tables.append(table)
            panels += shown
            _write(arguments, facts, tables, panels)
    Console().print(
        f"written: {arguments.output}/{arguments.name}.json, .md, .png", highlight=False
    )
    return 0


# --- records


RECORD_COLUMNS = {
    "records": "records",
    "tokenize_ms": "read and tokenize, CPU-ms",
    "order_us": "order, CPU-us",
    "pack_us": "pack, CPU-us",
    "open_ms": "open one, CPU-ms",
    "kept": "kept, bytes a record",
    "peak": "peak growth, bytes a record",
    "resident_gib": "resident, GiB",
}


def _records(work: Path, counts: Sequence[int]) -> tuple[Table, list[Panel]]:
    found = [_records_once(work, count) for count in sorted(counts)]
    rows = [_record_row(one) for one in found]
    largest = found[-1]["state_bytes"]
    named = ", ".join(f"{name.lstrip('_')} {size:.0f}" for name, size in list(largest.items())[:8])
    mean = found[-1]["tokens"]
    heading = f"Records of {mean} tokens on average; bytes kept of each: {named}"
    x = [row["records"] for row in rows]
    panels = [
        {
            "title": "Time a record",
            "x": x,
            "y": {"read, tokenize, filter": [row["tokenize_ms"] * 1e3 for row in rows]}
            | {"order an epoch": [row["order_us"] for row in rows]}
            | {"plan packs": [row["pack_us"] for row in rows]},
            "xlabel": "records",
            "ylabel": "CPU-microseconds a record",
            "logx": True,
        },
        {
            "title": "Memory a record",
            "x": x,
            "y": {"kept": [row["kept"] for row in rows], "at most": [row["peak"] for row in rows]},
            "xlabel": "records",
            "ylabel": "bytes a record",
            "logx": True,
        },
    ]
    return (heading, RECORD_COLUMNS, rows), panels


def _records_once(work: Path, count: int) -> dict[str, Any]:
    say(f"{count:,} records")
    folder = work / "records"
    folder.mkdir(exist_ok=True)
    rows = make_rows(min(count, REPEATED), seed=SEED)
    for place, row in enumerate(rows):
        if "image" in row:
            row["image"] = f"images/{place % IMAGES}.jpg"
        row["conversations"] = row["conversations"][:2]
    write_images(rows, folder)
    path, result = folder / f"{count}.jsonl", folder / f"{count}.json"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {**rows[number % len(rows)], "id": f"record-{number}"}
            first, *rest = row["conversations"]
            asked = {**first, "value": f"{first['value']} {number}"}
            file.write(json.dumps({**row, "conversations": [asked, *rest]}) + "\n")
    script = str(Path(__file__).parent / "bench_scaling_records.py")
    command = [sys.executable, script, str(work / "model"), str(path), str(result)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{count:,} records: the measuring process failed; its words are above")
    path.unlink()
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _record_row(found: Mapping[str, Any]) -> dict[str, Any]:
    count, points = found["records"], found["points"]
    names = list(points)

    def cost(name: str) -> float:
        before = points[names[names.index(name) - 1]]
        return float(points[name]["cpu"] - before["cpu"])

    begin = points["start"]["resident"]
    return {
        "records": count,
        "tokenize_ms": 1e3 * cost("read and tokenized") / count,
        "order_us": 1e6 * cost("in order") / count,
        "pack_us": 1e6 * cost("packed") / count,
        "open_ms": 1e3 * cost("opened") / found["opened"],
        "kept": (points["packed"]["resident"] - begin) / count,
        "peak": (found["peak_while_reading"] - begin) / count,
        "resident_gib": points["packed"]["resident"] / 2**30,
        "state_bytes": found["state_bytes"],
    }


# --- one step


STEP_COLUMNS = {"what": "one record", "tokens": "tokens", "images": "images", "ms": "CPU-ms"}


def _step(work: Path) -> tuple[Table, list[Panel]]:
    """Forward and backward of one record of the tiny model, by its tokens and by its images."""
    section = model_section(work / "model")
    config = ModelConfig(
        vision_tower=VisionTowerConfig(**section["vision_tower"]),
        language_model=LanguageModelConfig(**section["language_model"]),
    )
    model = build_model(config, dtype=torch.float32, seed=SEED)
    set_trainable(model, {"projector", "language_model"})
    rows = []
    by_tokens = [(tokens, 1) for tokens in (704, 832, 1088, 1600, 2048)]
    by_images = [(2816, images) for images in (0, 1, 2, 3, 4)]
    for tokens, images in by_tokens + by_images:
        say(f"a step of {tokens} tokens with {images} images")
        ms = 1e3 * _median_cpu(lambda t=tokens, p=images: _one_step(model, t, p))
        what = f"{tokens} tokens, {images} images"
        rows.append({"what": what, "tokens": tokens, "images": images, "ms": ms})
    first, second = rows[: len(by_tokens)], rows[len(by_tokens) :]
    panels = [
        _panel("Step by tokens (1 image, 14 % of tokens supervised)", first, "tokens", "ms"),
        _panel("Step by images (2,816 tokens in all)", second, "images", "ms"),
    ]
    return ("Forward and backward of one record, tiny LLaVA, fp32", STEP_COLUMNS, rows), panels


def _one_step(model: torch.nn.Module, tokens: int, images: int) -> None:
    ids = torch.randint(3, 32_000, (tokens,), generator=torch.Generator().manual_seed(SEED))
    ids[8 : 8 + images * NUM_IMAGE_TOKENS] = IMAGE_TOKEN_ID
    labels = ids.clone()
    labels[: -round(0.14 * tokens)] = IGNORE_INDEX
    pixels = torch.zeros(images, 3, IMAGE, IMAGE, dtype=torch.uint8)
    batch = pad_examples([Example("one", ids, labels, pixels)], 0)
    model(batch).loss_sum.backward()
    for parameter in model.parameters():
        parameter.grad = None


# --- text and images


PATH_COLUMNS = {"what": "path", "size": "of", "ms": "CPU-ms", "rate": "per CPU-second"}


def _paths(work: Path) -> tuple[Table, list[Panel]]:
    """Tokenization by tokens, and opening and preparing images by how many."""
    chat_tokenizer = ChatTokenizer.from_name(
        "vicuna_v1", AutoTokenizer.from_pretrained(work / "model/tokenizer")
    )
    texts = []
    for exchanges in (1, 4, 8, 16, 32):
        conversation = _conversation(exchanges)
        tokens = len(chat_tokenizer.tokenize(conversation).input_ids)
        ms = (
            1e3
            * _median_cpu(lambda c=conversation: [chat_tokenizer.tokenize(c) for _ in range(50)])
            / 50
        )
        texts.append({"what": "text", "size": tokens, "ms": ms, "rate": 1e3 / ms})
    path = work / "image.jpg"
    path.write_bytes(image_bytes(0))
    from bench_scaling_records import CLIP

    images = []
    for count in (1, 4, 16, 64):

        def prepare(count: int = count) -> None:
            for _ in range(count):
                read_pixels(path, CLIP, "pad")

        ms = 1e3 * _median_cpu(prepare)
        images.append({"what": "images", "size": count, "ms": ms, "rate": 1e3 * count / ms})
    panels = [
        _panel("Tokenizing a conversation", texts, "size", "ms", xlabel="text tokens"),
        _panel("Opening 640x480 JPEGs", images, "size", "ms", xlabel="images"),
    ]
    return ("Text path and image path", PATH_COLUMNS, texts + images), panels


def _conversation(exchanges: int) -> Conversation:
    turns: list[Turn] = []
    for number in range(exchanges):
        asked = TextPart(f"What is the {number}th thing that is seen in the left of this image?")
        parts = (ImagePart(0), TextPart("\n"), asked) if number == 0 else (asked,)
        answer = TextPart(f"It is a {number} that stands beside a red house with a small garden.")
        turns += [Turn("user", parts), Turn("assistant", (answer,))]
    return Conversation("one", tuple(turns), (b"",))


# --- processes


PROCESS_COLUMNS = {
    "scaling": "scaling",
    "processes": "processes",
    "batch": "records a step",
    "rate": "samples / s",
    "cpu": "CPU-s a sample",
    "loss": "last loss",
}
STRONG, WEAK = "equal steps", "4 records a process"


def _processes(work: Path) -> tuple[Table, list[Panel]]:
    """Train under torchrun: equal steps of 8 records (strong scaling), and 4 records per process.

    With more processes than free cores, samples per second mean nothing: look at CPU-seconds.
    """
    steps = 4
    rows = make_rows(steps * 16, seed=SEED)
    folder = work / "processes"
    folder.mkdir()
    write_images(rows, folder)
    write_rows(rows, folder / "rows.jsonl")
    table = [
        _train_in_processes(work, folder, scaling, count, batch, steps)
        for scaling, count, batch in (
            *((STRONG, count, 8) for count in (1, 2)),
            *((WEAK, count, 4 * count) for count in (1, 2, 4)),
        )
    ]
    weak = [row for row in table if row["scaling"] == WEAK]
    panel = {
        "title": "Weak scaling: 4 records a process",
        "x": [row["processes"] for row in weak],
        "y": {"": [row["cpu"] for row in weak]},
        "xlabel": "processes",
        "ylabel": "CPU-seconds a sample",
    }
    return ("Processes, with weights in every process", PROCESS_COLUMNS, table), [panel]


def _train_in_processes(
    work: Path, folder: Path, scaling: str, count: int, batch: int, steps: int
) -> dict[str, Any]:
    say(f"{scaling}: {count} processes")
    # Two processes are the same run in both scalings; in one folder the second would resume it.
    run = folder / f"{scaling}-{count}".replace(" ", "-")
    run.mkdir()
    job = {
        "model": str(work / "model"),
        "rows": str(folder / "rows.jsonl"),
        "images": str(folder),
        "result": str(run / "result.json"),
        "work": str(run),
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": 4,
        "options": {"config": {"train": {"sharding": "none"}}},
    }
    (run / "job.json").write_text(json.dumps(job))
    _torchrun(count, run / "job.json")
    measured = json.loads((run / "result.json").read_text())
    done = batch * (steps - 1)
    return {
        "scaling": scaling,
        "processes": count,
        "batch": batch,
        "rate": done / (measured["wall"][-1] - measured["wall"][1]),
        "cpu": count * (measured["cpu"][-1] - measured["cpu"][1]) / done,
        "loss": measured["losses"][-1],
    }


def _torchrun(count: int, job: Path) -> None:
    script = str(PEERS / "ours.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--standalone", script, str(job)]
    # torchrun sets one thread for several processes only: a single one would use every core.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    if done.returncode:
        say(done.stderr[-3000:])
        raise UserError(f"{count} processes: the run failed; its last words are above")


# --- planned


PLANNED_COLUMNS = {
    "recipe": "recipe",
    "gpus": "GPUs",
    "rate": "samples / s",
    "efficiency": "of linear",
    "gib": "GiB of a GPU",
    "hours": "hours",
    "bottleneck": "slowest part",
}
PLANNED: Final = ("stage1", "stage2", "stage2_lora")
GPU: Final = "h100-80"


def _planned() -> tuple[Table, list[Panel]]:
    """Plan LLaVA-1.5's recipes on 1 to 64 GPUs, with the same records in a step."""
    table = []
    for recipe in PLANNED:
        path = CONFIGS / f"{recipe}.yaml"
        assume = re.search(r"--assume (\S+)", path.read_text(encoding="utf-8"))
        assert assume is not None, path
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            say(f"planning {recipe} on {gpus} GPUs")
            row = _plan_once(path, assume[1], gpus)
            table.append({"recipe": recipe, "gpus": gpus, **row})
        first = next(row for row in table if row["recipe"] == recipe)
        for row in table:
            if row["recipe"] == recipe:
                row["efficiency"] = row["rate"] / row["gpus"] / first["rate"]
    gpus = [row["gpus"] for row in table if row["recipe"] == PLANNED[0]]
    panel = {
        "title": f"Planned: share of linear scaling ({GPU})",
        "x": gpus,
        "y": {
            recipe: [row["efficiency"] for row in table if row["recipe"] == recipe]
            for recipe in PLANNED
        },
        "xlabel": "GPUs",
        "ylabel": "samples/s of a GPU, beside one GPU's",
        "logx": True,
    }
    heading = (
        f"Planned, not measured: LLaVA-1.5 7B on {GPU}; {ASSUMED_EFFICIENCY:.0%} of the matrix "
        f"product's rate, machines of {GPUS_PER_MACHINE} GPUs, {NETWORK / 1e9:.0f} GB/s between "
        "machines for each GPU, activations recomputed, records of equal length, communication "
        "behind computing"
    )
    return (heading, PLANNED_COLUMNS, table), [panel]


def _plan_once(path: Path, assume: str, gpus: int) -> dict[str, Any]:
    config = resolve(load_config(path, []), download=False)
    train = config.train
    # `auto` would recompute less where a rank has fewer records, which hides the communication.
    changed: dict[str, Any] = {"activation_checkpointing": "full"}
    if train.micro_batch_size is not None:  # as many records as a rank has, if those are fewer
        most = max(1, train.global_batch_size // gpus)
        changed["micro_batch_size"] = min(train.micro_batch_size, most)
    config = config.model_copy(update={"train": train.model_copy(update=changed)})
    device = find_device(GPU, DTYPES[train.precision])
    stats = assumed_data_stats(parse_assumed(assume), config)
    steps = plan_steps(config, stats, gpus=gpus)
    estimator = Estimator(config, device, gpus=gpus, efficiency=ASSUMED_EFFICIENCY)
    planner = Planner(estimator, stats, steps, None)
    (option,) = (option for option in planner.by_policy() if option.configured)
    return {
        "rate": option.speed.samples_per_second,
        "gib": f"{option.memory.total / GIB:.0f}" + ("" if option.fits else " (does not fit)"),
        "hours": option.speed.hours,
        "bottleneck": option.speed.bottleneck,
    }


# --- shared


def _median_cpu(action: Callable[[], Any]) -> float:
    """CPU-seconds of the action, the median of some, after one that is not counted."""
    action()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _panel(
    title: str, rows: Sequence[Mapping[str, Any]], key: str, value: str, *, xlabel: str = ""
) -> Panel:
    return {
        "title": title,
        "x": [row[key] for row in rows],
        "y": {value: [row[value] for row in rows]},
        "xlabel": xlabel or key,
        "ylabel": "CPU-milliseconds",
    }


def _write(
    arguments: argparse.Namespace,
    facts: Mapping[str, Any],
    tables: Sequence[Table],
    panels: Sequence[Panel],
) -> None:
    title = "Cost against tokens, images, records and processes"
    output = Path(arguments.output)
    if panels:
        plot_lines(panels, output / f"{arguments.name}.png", title=title)
    write_results(
        output,
        arguments.name,
        title=title,
        command=command_line("scripts/benchmarks/bench_scaling", arguments.given),
        tables=tables,
        details={},
        facts=facts,
        plot=f"{arguments.name}.png" if panels else None,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/bench_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", nargs="+", type=int, default=list(RECORDS), metavar="COUNT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--name", default="scaling", help="of the files (scaling)")
    parser.add_argument("--output", default=str(FOLDER), metavar="DIR")
    parser.add_argument("--scratch", default=None, metavar="DIR", help="1 M records take 1.5 GB")
    arguments = parser.parse_args(argv)
    arguments.given = list(argv)
    return arguments


if __name__ == "__main__":
    run_command(main)
