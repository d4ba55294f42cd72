"""Runs to review, and a page that is served for a test."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.run_folder import RunFolder
from data_tools.review.__main__ import order_of
from data_tools.review.decisions import ReviewerLog
from data_tools.review.server import Review, make_server
from data_tools.review.sources import RunSamples, Source
from tests.data_tools.instruct_runs import config_of, make_run
from vlm_sft.config import loading as settings


def annotated(folder: Path, count: int) -> list[AnnotatedImage]:
    """Images of 320 x 240 pixels with dogs, a cat in every second."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(1, count + 1):
        name = f"{number:012d}.jpg"
        image = Image.new("RGB", (320, 240), (120, 150, 90 + number * 7 % 100))
        boxes = [
            Box("dog", 20.0 + 90 * i, 60, 70, 120, False, 100 * number + i)
            for i in range(number % 3 + 1)
        ]
        boxes += [Box("cat", 210, 20, 90, 80, False, 100 * number + 50)] if number % 2 else []
        for box in boxes:
            place = (box.left, box.top, box.right, box.bottom)
            ImageDraw.Draw(image).ellipse(place, fill="tan" if box.category == "dog" else "gray")
        image.save(folder / name)
        found.append(
            AnnotatedImage(number, name, 320, 240, ("A dog.", "Dogs at play."), tuple(boxes),
                           (1000 + number, 2000 + number), license=4)
        )  # fmt: skip
    return found


def write_run(folder: Path, count: int = 8) -> Path:
    """A verified and cleaned run with its configuration; return its folder."""
    images = annotated(folder / "images", count)
    root = folder / "run"
    run = make_run(images, ("conversation", "detail"))
    written: RunFolder = run.write(root)
    written.index.write_text(json.dumps({"categories": {"dog": 1, "cat": 2, "giraffe": 3}}))
    written.config.write_text(settings.dump(config_of(root, folder / "images")))
    return root


@contextmanager
def served(root: Path, reviewer: str = "ann", source: Source | None = None) -> Iterator[str]:
    """Serve the page of a run from a thread; yield its address."""
    source = source or RunSamples(root, None)
    (root / "review").mkdir(exist_ok=True)
    log = ReviewerLog(root / "review", reviewer)
    order = order_of(source.items, 1, 1, 0.0, seed=0, shuffled=False)
    server, address = make_server(Review(source, log, order), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        log.close()
        thread.join()
