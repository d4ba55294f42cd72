"""Samples and images of a run, made on the spot."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import write_images
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Check, Cost, ImageSource, Kind, Sample, Shown, Turn
from vlm_sft.config.loading import parse
from vlm_sft.utils.atomic_files import write_json

Talk = tuple[str, str] | tuple[str, str, Kind]


def turn(question: str, answer: str, kind: Kind = "object") -> Turn:
    return Turn(question=question, answer=answer, kind=kind)


def sample(
    sample_id: str,
    image: int,
    talk: Sequence[Talk],
    *,
    sample_type: str = "conversation",
    origin: str = "llm",
    license: int | None = 4,
) -> Sample:
    """An accepted sample with one supported check for each turn."""
    return Sample.model_validate(
        {
            "id": sample_id,
            "type": sample_type,
            "origin": origin,
            "image": ImageSource(
                id=image, file_name=f"{image:012d}.png", width=64, height=48, license=license
            ),
            "turns": tuple(turn(*words) for words in talk),
            "shown": Shown(captions=(1,)),
            "request": f"request-{sample_id}",
            "template": "talk",
            "template_sha256": "0" * 64,
            "model": "a-model",
            "parameters": {"temperature": 0.7},
            "cost": Cost(tokens_in=100, tokens_out=20, usd=0.001),
            "tool": "test 1",
            "checks": tuple(
                Check(rule="object", verdict="supported", turn=number, claim=f"claim {number}")
                for number in range(len(talk))
            ),
            "status": "accepted",
        }
    )


def draw(path: Path, number: int, size: tuple[int, int] = (64, 48)) -> None:
    """An image of coarse blocks that is unlike that of any other number."""
    image = Image.new("RGB", (8, 6))
    for place in range(48):
        value = (number * 2654435761 + place * 40503 * (number + 7)) >> 3
        image.putpixel((place % 8, place // 8), (value % 256, value // 7 % 256, value // 11 % 256))
    image.resize(size, Image.Resampling.BICUBIC).save(path)


def run_folder(
    folder: Path,
    samples: Sequence[Sample],
    categories: dict[int, Sequence[str]] | None = None,
    **clean: object,
) -> InstructConfig:
    """A run in which `verify` has accepted the samples; images are drawn where there are none."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    known = {}
    for one in samples:
        source = one.image
        if not (images / source.file_name).exists():
            draw(images / source.file_name, source.id)
        names = (categories or {}).get(source.id, ["dog"])
        boxes = tuple(Box(name, 1, 1, 20, 20, False, i) for i, name in enumerate(names, 1))
        known[source.id] = AnnotatedImage(
            id=source.id,
            file_name=source.file_name,
            width=64,
            height=48,
            captions=("A dog.",),
            boxes=boxes,
            caption_ids=(1,),
        )
    config = {
        "output_dir": str(folder / "run"),
        "coco": {"captions": "captions.json", "images": str(images)},
        "teacher": {"kind": "rules"},
        "clean": clean,
    }
    run = RunFolder(folder / "run")
    write_images(run, [known[number] for number in sorted(known)])
    names = ("dog", "cat", "person", "bear", *(n for p in known.values() for n in p.categories))
    licenses = {"2": {"name": "Attribution-NonCommercial License"}}
    write_json(run.index, {"categories": dict.fromkeys(names), "licenses": licenses})
    write_lines(run.samples, samples)
    return parse(InstructConfig, config, "test")


def kept(config: InstructConfig) -> list[Sample]:
    return list(read_lines(RunFolder(Path(config.output_dir)).kept, Sample))


def dropped(config: InstructConfig) -> list[Sample]:
    return list(read_lines(RunFolder(Path(config.output_dir)).dropped, Sample))
