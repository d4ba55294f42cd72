"""A planned run made on the spot: images, prompts and requests, without the planning stage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import write_images
from data_tools.instruct.lines import write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request, SampleType, Shown, answer_form

TYPES: tuple[SampleType, ...] = ("conversation", "detail", "reasoning")


def image(number: int) -> AnnotatedImage:
    """Two dogs on the left, a cat in the middle, a cup on the right; 1000 x 500 pixels."""
    boxes = (
        Box("dog", 10, 100, 100, 100, False, 10 * number + 1),
        Box("dog", 150, 100, 100, 100, False, 10 * number + 2),
        Box("cat", 400, 300, 90, 100, False, 10 * number + 3),
        Box("cup", 800, 50, 50, 80, False, 10 * number + 4),
    )
    captions = (f"Two dogs near a cat, scene {number}.", "A cat and a cup.")
    ids = (10 * number + 5, 10 * number + 6)
    return AnnotatedImage(number, f"{number:012d}.jpg", 1000, 500, captions, boxes, ids)


def request_of(
    about: AnnotatedImage, kind: SampleType, number: int = 0, **parameters: Any
) -> Request:
    """What planning would write, in short."""
    shown = Shown(
        captions=about.caption_ids,
        boxes=tuple(box.id for box in about.boxes),
    )
    sending = {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 64, "seed": 0}
    known = f"{about.id} {kind} {number} {sorted(parameters.items())}"
    return Request(
        id=hashlib.sha256(known.encode()).hexdigest(),
        sample_id=f"{about.id:012d}-{kind}-{number}",
        image=about.id,
        type=kind,
        number=number,
        template=kind,
        template_sha256="0" * 64,
        question="Describe the picture." if kind == "detail" else None,
        context="\n".join(about.captions),
        parameters=sending | parameters,
        shown=shown,
    )


def planned(folder: Path, images: int = 2, **teacher: Any) -> tuple[InstructConfig, RunFolder]:
    """A run of 3 requests an image; `teacher` are its settings, `limits` among them."""
    limits = teacher.pop("limits", {})
    values = {
        "output_dir": str(folder),
        "coco": {"images": "images", "captions": "captions.json"},
        "teacher": {"kind": "rules", "model": "m", "backoff_seconds": 0.02, "concurrency": 4}
        | teacher,
        "limits": limits,
    }
    config, run = InstructConfig.model_validate(values), RunFolder(folder)
    indexed = [image(number) for number in range(1, images + 1)]
    write_images(run, indexed)
    write_lines(run.requests, [request_of(p, kind) for p in indexed for kind in TYPES])
    templates = {
        kind: {
            "messages": [{"role": "system", "content": "You are shown notes."}],
            "answer_schema": answer_form(kind).model_json_schema(),
            "sha256": "0" * 64,
        }
        for kind in TYPES
    }
    run.templates.write_text(json.dumps(templates))
    return config, run
