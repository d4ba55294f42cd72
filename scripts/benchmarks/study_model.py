"""The small model and the scenes of the studies of data: minutes of one CPU core, not hours.

The quickstart's scenes and frozen encoder (EfficientNet-Lite0), but instead of SmolLM2 a Llama with
1.7 million parameters and a vocabulary of the scenes' own words. It learns language and drawings
from descriptions of the scenes, and to answer from right answers about a third of them. A study
goes on from there with questions about the other scenes, and trains all but the encoder. A run
takes less than a minute of one core, where SmolLM2 takes ten.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import yaml
from study_processes import run_python
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json, write_text

ARTIST: Final = "openmoji"
SCENE_OPTIONS: Final = [
    *("--categories", "configs/demo/categories.json", "--artist", ARTIST),
    *("--max-side", "320", "--max-objects", "2", "--max-instances", "2"),
    *("--scale", "0.4", "0.75", "--augment", "0.15"),
    *("--crowd-share", "0", "--visible-share", "0.8"),
    *("--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room,water,desert"),
]
SEEDS: Final = {"train": 11, "val": 12, "test": 13}
STEPS: Final = {"describing": 600, "base": 150}
"""Optimizer steps of 16 records until a study begins."""
VOCABULARY: Final = 512
SHAPE: Final = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class StudyModel:
    """Scenes, questions and the model that every run of a study starts from.

    Attributes:
        work: Where all files go.
        scenes: Scenes for training; two questions of existence about each.
        taught: Of these, the last ones, whose right answers the base model has learned.
        test_scenes: Held-out scenes.
    """

    work: Path
    scenes: int = 600
    taught: int = 200
    test_scenes: int = 120

    @property
    def base(self) -> Path:
        """The model that has learned to describe scenes and to answer questions."""
        return self.work / "base" / "final"

    @property
    def lessons(self) -> Path:
        """The questions, with right answers, that the base model has learned from."""
        return self.work / "lessons.json"

    @property
    def suite(self) -> Path:
        """The suite of questions of existence about held-out scenes."""
        return self.work / "suite.yaml"

    def images(self, split: str) -> Path:
        """Return the folder of a split's images."""
        return self.work / split / "scenes" / "images"

    def records(self, split: str, stage: str = "stage2") -> Path:
        """Return the file of a split's questions (`stage2`) or descriptions (`stage1`)."""
        return self.work / split / "questions" / f"{stage}.json"

    def make(self) -> None:
        """Make what is missing: encoder, scenes, questions, tokenizer and the base model."""
        run_python("scripts/demo_pieces.py", str(self.work / "pieces"))
        for split, count in {"train": self.scenes, "val": 16, "test": self.test_scenes}.items():
            if not (self.work / split / "questions/build.json").exists():
                self._make_data(split, count)
        if not (self.work / "tokenizer/tokenizer.json").exists():
            texts = [turn["value"] for file in (self.records("train"), self.captions())
                     for row in json.loads(file.read_text("utf-8"))
                     for turn in row["conversations"]]  # fmt: skip
            make_tokenizer(texts, VOCABULARY).save_pretrained(self.work / "tokenizer")
        task = {
            "name": "existence",
            "kind": "pope",
            "files": [str(self.work / "test/questions/existence.json")],
            "images": str(self.images("test")),
            "scoring": {"reading": "verdict_last"},
            "max_tokens": 24,
        }
        write_text(self.suite, yaml.safe_dump({"tasks": [task]}, sort_keys=False))
        write_json(self.lessons, self.questions(taught=True))
        describing = self.work / "describing/final"
        for files, folder, start in (
            ([self.captions()], describing, None),
            ([self.lessons], self.base, describing),
        ):
            if not folder.is_dir():
                config = folder.parent.with_suffix(".yaml")
                self.write_config(config, files, steps=STEPS[folder.parent.name], start_from=start)
                run_module("vlm_sft.stage2", [str(config), f"output_dir={folder.parent}"])

    def questions(self, *, taught: bool) -> list[dict[str, Any]]:
        """Return the questions about the scenes that the base model was taught, or the others."""
        records = json.loads(self.records("train").read_text(encoding="utf-8"))
        last = sorted({record["image"] for record in records})[-self.taught :]
        return [record for record in records if (record["image"] in last) == taught]

    def captions(self) -> Path:
        """Return the file of descriptions of the training scenes."""
        return self.records("train", "stage1")

    def categories(self, split: str) -> dict[str, set[str]]:
        """Return the categories of every image by its file's name, and under "" all of them."""
        path = self.work / split / f"scenes/annotations/instances_{ARTIST}.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in document["images"]}
        found: dict[str, set[str]] = {name: set() for name in files.values()}
        for entry in document["annotations"]:
            found[files[entry["image_id"]]].add(names[entry["category_id"]])
        return {**found, "": set().union(*found.values())}

    def write_config(
        self,
        path: Path,
        files: Sequence[Path],
        *,
        steps: int,
        start_from: Path | None,
    ) -> None:
        """Write a configuration of stage 2: full fine-tuning of projector and language model.

        Args:
            path: The file.
            files: Records to train on, about the training scenes.
            steps: Optimizer steps of 16 records.
            start_from: The checkpoint that it starts from; None: random weights. These are part of
                what a checkpoint is of, so all configurations have the same seed.
        """
        train = [{"path": str(file), "image_root": str(self.images("train"))} for file in files]
        held_out = {"path": str(self.records("val")), "image_root": str(self.images("val"))}
        config = {
            "output_dir": str(path.with_suffix("")),
            "seed": 0,
            "start_from": None if start_from is None else str(start_from),
            "model": self._model(),
            "data": {
                "train": train,
                "eval": [held_out],
                "template": "chatml",
                "max_length": 128,
                "image_aspect": "pad",
                "num_workers": 0,
                "feature_cache": str(self.work / "features"),
            },
            "optim": {
                "learning_rate": {"projector": 1e-3, "language_model": 1e-3},
                "weight_decay": 0.0,
                "schedule": "cosine",
                "warmup_ratio": 0.05,
                "max_grad_norm": 1.0,
            },
            "train": {
                "epochs": 1000,
                "max_steps": steps,
                "global_batch_size": 16,
                "micro_batch_size": 16,
                "precision": "fp32",
                "save_every_steps": 1000,
                "keep_last_checkpoints": 1,
                "eval_samples": 0,
                "log_every_steps": 20,
                "trackers": [],
            },
        }
        write_text(path, yaml.safe_dump(config, sort_keys=False))

    def _model(self) -> dict[str, Any]:
        return {
            "vision_tower": {
                "library": "timm",
                "name": str(self.work / "pieces/efficientnet-lite0"),
                "feature_layers": [-1],
                "grid_pool": 3,
                "image_size": 224,
            },
            "projector_type": "mlp2x_gelu",
            "language_model": {
                "config": {**SHAPE, "vocab_size": VOCABULARY, **SPECIAL},
                "tokenizer": str(self.work / "tokenizer"),
            },
        }

    def _make_data(self, split: str, count: int) -> None:
        scenes, seed = self.work / split / "scenes", str(SEEDS[split])
        where = ["--out", str(scenes), "--count", str(count), "--seed", seed]
        run_module("data_tools.make_scenes", [*where, *SCENE_OPTIONS])
        build = [
            *("--instances", f"{scenes}/annotations/instances_{ARTIST}.json"),
            *("--captions", f"{scenes}/annotations/captions_{ARTIST}.json"),
            *("--images", f"{scenes}/images", "--out", str(self.work / split / "questions")),
            *("--captions-from", "boxes", "--answers", "evidence", "--turns", "1"),
            *("--families", "existence", "--seed", seed),
            *(["--probes", "2"] if split == "test" else []),
        ]
        run_module("data_tools.build_coco", build)


SPECIAL: Final = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML's special tokens, as transformers reads it.

    Args:
        texts: What it is trained on.
        vocabulary: Most tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n", "assistant\n", "system\n", *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a command as `python -m NAME` does, in a copy of this process.

    Like a process of its own it leaves no state for the next command, but it need not import torch
    and transformers again, which takes longer than training this small model.

    Raises:
        UserError: The command failed; it has said why.
    """
    import_heavy()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code: int | str | None = 1
        try:
            run_command(import_module(name).main, arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise UserError(f"{name} ended with code {code}; its reason is above")


def import_heavy() -> None:
    """Import what all commands need, and let their own commands run like `run_module`."""
    for name in ("torch", "transformers", "accelerate", "timm", "datasets"):
        import_module(name)
    for name in ("data_tools.select.control", "vlm_sft.commands.sample_rounds"):
        import_module(name).run_module = run_module  # type: ignore[attr-defined]
