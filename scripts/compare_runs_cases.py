"""What compare_runs.py compares: training configurations, their data, and names that changed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RENAMED_KEYS: dict[str, str] = {
    "data.recipe": "data.llava_quirks",
    "train.share_prefixes": "train.share_image_prefix",
    "train.on_non_finite": "train.on_nonfinite_loss",
    "train.background_saving": "train.async_checkpointing",
    "train.keep_checkpoints": "train.keep_last_checkpoints",
    "train.sharding=fsdp2": "train.sharding=zero3",
}
"""Configuration: old dotted key -> new one, or `key=value` -> `key=value` where a value changed;
applied for the side whose `RunConfig` does not have the old name."""
RENAMED_FIELDS: dict[str, str] = {}
"""JSON outputs: old field name, or old value of a string -> new one."""
RENAMED_FILES: dict[str, str] = {}
"""Outputs: old path relative to the run's directory (tensors: to final/) -> new one."""
RENAMED_TENSORS: dict[str, str] = {}
"""Tensors: old text inside a tensor's name -> new text."""

VOLATILE = {"samples_per_second", "target_tokens_per_second", "memory_bytes", "seconds"}
"""Fields of metrics.jsonl that depend on the machine's load."""
HALF, STEPS = 3, 6
COMMON = [
    *("projector=null", "data.length_policy=skip", "data.on_error=quarantine", "train.trackers=[]"),
    *(f"train.save_every_steps={HALF}", f"train.eval_every_steps={HALF}", "train.eval_samples=1"),
    "train.activation_checkpointing=none",
]
"""Settings of every case."""
PACKED = ["train.micro_batch_size=null", "train.packing.max_tokens=512"]
SHARED = [*PACKED, "train.share_prefixes=true"]
LLAVA = ["data.recipe=llava-1.5", "data.template=vicuna_v1"]
OPEN_CLIP = (
    "model.vision_tower={library: open_clip, feature_layers: [-2], config: {embed_dim: 16,"
    " vision_cfg: {layers: 3, width: 32, head_width: 16, patch_size: 14, image_size: 28}}}"
)
TIMM = (
    "model.vision_tower={library: timm, feature_layers: [-2],"
    " config: {architecture: vit_tiny_patch16_224, depth: 3, img_size: 32}}"
)


@dataclass(frozen=True)
class Case:
    """A training configuration: a file of configs/tiny, overrides, and the number of processes."""

    config: str
    overrides: list[str] = field(default_factory=list)
    world_size: int = 1

    @property
    def stage(self) -> str:
        """The stage's module, which also names its data."""
        return self.config.partition("_")[0]


CASES = {
    "stage1-padded": Case("stage1"),
    "stage1-packed": Case("stage1", PACKED),
    "full-padded": Case("stage2"),
    "full-packed": Case("stage2", PACKED),
    "full-packed-shared": Case("stage2", SHARED),
    "lora-padded": Case("stage2_lora"),
    "lora-packed-shared": Case("stage2_lora", SHARED),
    "lora-dropout": Case("stage2_lora", ["lora.dropout=0.5", "lora.use_dora=true", "seed=7"]),
    "qlora-padded": Case("stage2_qlora"),
    "qlora-packed": Case("stage2_qlora", PACKED),
    "group-by-length": Case("stage2", ["train.group_by_length=true"]),
    "accumulation": Case("stage2", ["train.micro_batch_size=2", "optim.max_grad_norm=0.5"]),
    "neftune": Case("stage2", ["train.neftune_alpha=5"]),
    "neftune-packed-shared": Case("stage2_lora", [*SHARED, "train.neftune_alpha=5"]),
    "checkpointing-full": Case("stage2", ["train.activation_checkpointing=full"]),
    "checkpointing-selective": Case("stage2", ["train.activation_checkpointing=selective"]),
    "drop-turns-exact": Case(
        "stage2", ["data.length_policy=drop_turns", "data.image_processing=exact"]
    ),
    "llava-stage1": Case("stage1", ["data.recipe=llava-1.5"]),
    "llava-stage2": Case("stage2", [*LLAVA, "train.group_by_length=true"]),
    "open-clip": Case("stage2", [OPEN_CLIP]),
    "timm": Case("stage2_lora", [TIMM]),
    "ddp-2": Case("stage2", ["train.sharding=none", "train.micro_batch_size=2"], world_size=2),
    "fsdp2-2": Case("stage2", [*SHARED, "train.sharding=fsdp2"], world_size=2),
}
QUICK = ["stage1-padded", "full-padded", "full-packed-shared", "lora-packed-shared", "qlora-padded"]


def write_data(folder: Path, images: Path) -> None:
    """Write records that exercise the data path: shared images, text only, too long, broken."""
    shapes = sorted(path.name for path in images.glob("*.png"))[:12]
    captions, chats = [], []

    def record(name: str, image: str | None, *texts: str) -> dict[str, Any]:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": name, **({"image": image} if image else {}), "conversations": turns}

    for number, file in enumerate(shapes):
        color, shape, _ = file.split("-")
        captions.append(record(f"c{number}", file, "<image>\nWhat is it?", f"a {color} {shape}"))
        first = f"<image>\nWhich color?{' Think.' * (number % 4)}"
        chats.append(record(f"a{number}", file, first, color, "Which shape?", shape))
        chats.append(record(f"b{number}", file, "<image>\nWhich shape?", shape))
        if number % 3 == 0:
            chats.append(record(f"t{number}", None, "Say " + color * (number + 1), color))
    long = ["Which color?", "red " * 20] * 4
    broken = [
        record("long", shapes[0], "<image>\nWhich shape?", "round", *long),
        record("no-image", "missing.png", "<image>\nWhat is it?", "nothing"),
    ]
    for name, records in (("stage1", captions), ("stage2", chats)):
        (folder / f"{name}.json").write_text(json.dumps([*records[:-2], *broken]))
        (folder / f"{name}_eval.json").write_text(json.dumps(records[-2:]))
