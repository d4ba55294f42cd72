"""Images per CPU-second from a file to the square input of the tower, against common pipelines.

    scripts/benchmarks/bench_data  # images made on the spot
    scripts/benchmarks/bench_data --images coco/val2017  # JPEGs of a folder, the first 64 by name
    scripts/benchmarks/bench_data --out docs/benchmarks  # keep table, figures and plot

All pipelines process the same JPEGs in memory, in turns, on one thread. The figures are medians
over rounds of images per CPU-second (process time), so that a busy machine changes them less. The
generated images have the dimensions and file size of a COCO photograph compressed again for the web
(640 x 480, about 100 KB). `scripts/benchmarks/bench_tokenize.py` measures text.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import open_clip
import simplejpeg
import torch
from bench_results import machine_facts, print_table, write_results
from matplotlib import pyplot as plt
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from vlm_sft.commands.run_command import run_command
from vlm_sft.data.images import ImageSpec, open_image, read_pixels
from vlm_sft.errors import UserError
from vlm_sft.utils.progress import track

SIZE = 336
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
SPEC = ImageSpec(SIZE, MEAN, STD)
OURS = "vlm_sft: "
COLUMNS = {
    "way": "way",
    "rate": "images a CPU-second",
    "least": "least",
    "most": "most",
    "relative": "of fast, crop",
}

Way = Callable[[bytes], Any]


def main(argv: Sequence[str]) -> int:
    """Time every pipeline, compare fast with exact, print the table, and write it if requested."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    facts = machine_facts()
    facts["versions"] |= {name: version(name) for name in ("simplejpeg", "open_clip_torch")}
    images = _read(arguments.images, arguments.count)
    rows = _rows(_rates(_ways(), images, arguments.rounds))
    kilobytes = statistics.mean(map(len, images)) / 1e3
    title = f"From JPEG to {SIZE} x {SIZE}: {len(images)} images of {kilobytes:.0f} KB"
    print_table(title, COLUMNS, rows)
    parity = {aspect: _difference(images, aspect) for aspect in ("crop", "pad")}
    for aspect, (largest, mean) in parity.items():
        print(
            f"fast beside exact, {aspect}: at most {largest} of 255 levels, {mean:.4f} on average"
        )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _plot(rows, title, arguments.out / "data.png")
        source = arguments.images or "made on the spot"
        write_results(
            arguments.out,
            "data",
            title=title,
            command="scripts/benchmarks/bench_data --out docs/benchmarks",
            tables=[("Images", COLUMNS, rows)],
            details={"images": str(source), "rounds": arguments.rounds, "parity": parity},
            facts=facts,
            plot="data.png",
        )
    return 0


def _ways() -> dict[str, Way]:
    stock, stock_pil = (
        kind(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=MEAN,
            image_std=STD,
        )
        for kind in (CLIPImageProcessor, CLIPImageProcessorPil)
    )
    transform = image_transform_v2(PreprocessCfg(size=SIZE, mean=MEAN, std=STD), is_train=False)

    def through(processor: Any) -> Way:
        return lambda data: processor(Image.open(BytesIO(data)), return_tensors="pt")

    def llava(data: bytes) -> Any:
        image = Image.open(BytesIO(data)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return stock_pil(square, return_tensors="pt")

    return {
        f"{OURS}fast, crop": lambda data: read_pixels(data, SPEC, "crop", "fast"),
        f"{OURS}fast, pad": lambda data: read_pixels(data, SPEC, "pad", "fast"),
        f"{OURS}exact, crop": lambda data: read_pixels(data, SPEC, "crop", "exact"),
        f"{OURS}exact, pad": lambda data: read_pixels(data, SPEC, "pad", "exact"),
        "transformers: CLIPImageProcessor, crop": through(stock),
        "transformers: CLIPImageProcessorPil, crop": through(stock_pil),
        "LLaVA: expand2square, then that": llava,
        "open_clip: image_transform, crop": lambda data: transform(Image.open(BytesIO(data))),
        "decoding alone: simplejpeg": simplejpeg.decode_jpeg,
        "decoding alone: Pillow": open_image,
    }


def _rates(ways: dict[str, Way], images: Sequence[bytes], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # what is imported and built at the first call
        way(images[0])
    for _ in track(range(rounds), rounds, "rounds"):
        for name, way in ways.items():
            start = time.process_time()
            for data in images:
                way(data)
            rates[name].append(len(images) / (time.process_time() - start))
    return rates


def _rows(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    fastest = medians[f"{OURS}fast, crop"]
    return [
        {
            "way": name,
            "rate": medians[name],
            "least": min(found),
            "most": max(found),
            "relative": medians[name] / fastest,
        }
        for name, found in rates.items()
    ]


def _difference(images: Sequence[bytes], aspect: Any) -> tuple[int, float]:
    """Largest and mean distance of fast from exact, in levels of 255."""
    largest, means = 0, []
    for data in images:
        fast, exact = (read_pixels(data, SPEC, aspect, how).int() for how in ("fast", "exact"))
        distance = (fast - exact).abs()
        largest = max(largest, int(distance.max()))
        means.append(distance.float().mean().item())
    return largest, statistics.mean(means)


def _read(folder: Path | None, count: int) -> list[bytes]:
    if folder is None:
        return [_made_up(number) for number in track(range(count), count, "making images")]
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"--images {folder}: no .jpg files there; give a folder of JPEGs")
    return [file.read_bytes() for file in files[:count]]


def _made_up(number: int) -> bytes:
    """Shapes and grain of every size, as photographs have, of about 100 KB as a JPEG."""
    draw = np.random.default_rng(number)
    wide = number % 4 != 3
    height, width = (480, 640) if wide else (640, 480)
    image = np.zeros((height, width, 3))
    for octave in range(8):
        rows, columns = (math.ceil(side / 2 ** (7 - octave)) + 1 for side in (height, width))
        coarse = Image.fromarray(draw.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        image += (fine - 128) * 0.62**octave
    buffer = BytesIO()
    levels = np.clip(128 + image * 0.6, 0, 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=96)
    return buffer.getvalue()


def _plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    rows = list(reversed(rows))
    names = [row["way"] for row in rows]
    rates = [row["rate"] for row in rows]
    colors = ["#0b6e99" if name.startswith(OURS) else "#b8c4cc" for name in names]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    axes.barh(names, rates, color=colors, height=0.68)
    low = [row["rate"] - row["least"] for row in rows]
    high = [row["most"] - row["rate"] for row in rows]
    reach = {"xerr": (low, high), "fmt": "none", "ecolor": "#22303a", "capsize": 3}
    axes.errorbar(rates, names, elinewidth=1, **reach)
    for name, rate, row in zip(names, rates, rows, strict=True):
        axes.annotate(
            f"{rate:.0f}", (row["most"], name), (5, 0), textcoords="offset points", va="center"
        )
    axes.set_xlabel("images a CPU-second, median and range over rounds")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of JPEGs")
    parser.add_argument("--count", type=int, default=64, help="images (64)")
    parser.add_argument("--rounds", type=int, default=7, help="times over all ways (7)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where table and plot are kept")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
