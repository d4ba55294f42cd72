"""The small model and the scenes of the studies of data: minutes of one CPU core, not hours.

The quickstart's scenes and frozen encoder (EfficientNet-Lite0), but instead of SmolLM2 a Llama with
1.7 million parameters and a vocabulary of the scenes' own words. It learns to say what a fifth of
the scenes show ("I see a cat and two boats."), which is the base model. A study starts from it
with the other scenes, and trains all but the encoder. A run takes less than a minute of one core,
where SmolLM2 takes ten.

Such a model is too small to compare a question with what it sees: trained on 1,200 questions of
existence with evidence, it described held-out scenes well and answered at chance. So existence is
read from its descriptions: one object of each held-out scene has to be named, and one that is not
there must not be.
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
from vlm_sft.utils.words import plural

ARTIST: Final = "openmoji"
SCENE_OPTIONS: Final = [
    *("--categories", "configs/demo/categories.json", "--artist", ARTIST),
    *("--max-side", "320", "--max-objects", "2", "--max-instances", "2"),
    *("--scale", "0.4", "0.75", "--augment", "0.15"),
    *("--crowd-share", "0", "--visible-share", "0.8"),
    *("--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room,water,desert"),
]
SEEDS: Final = {"train": 11, "val": 12, "test": 13}
BASE_STEPS: Final = 120
"""Optimizer steps of 16 records until a study begins."""
QUESTION: Final = "What does the image show?"
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
    """Scenes, their descriptions and the model that every run of a study starts from.

    Attributes:
        work: Where all files go.
        scenes: Scenes for training.
        taught: Of these, the last ones, whose descriptions the base model has learned.
        test_scenes: Held-out scenes; two objects of each are asked for.
    """

    work: Path
    scenes: int = 1000
    taught: int = 200
    test_scenes: int = 150

    @property
    def base(self) -> Path:
        """The model that has learned to describe scenes."""
        return self.work / "base" / "final"

    @property
    def lessons(self) -> Path:
        """The descriptions that the base model has learned from."""
        return self.work / "lessons.json"

    @property
    def suite(self) -> Path:
        """The suite that looks for objects in descriptions of held-out scenes."""
        return self.work / "suite.yaml"

    def images(self, split: str) -> Path:
        """Return the folder of a split's images."""
        return self.work / split / "scenes" / "images"

    def annotations(self, split: str, what: str) -> Path:
        """Return the file of a split's boxes (`instances`) or sentences (`captions`)."""
        return self.work / split / f"scenes/annotations/{what}_{ARTIST}.json"

    def make(self) -> None:
        """Make what is missing: encoder, scenes, descriptions, tokenizer and the base model."""
        run_python("scripts/demo_pieces.py", str(self.work / "pieces"))
        for split, count in {"train": self.scenes, "val": 16, "test": self.test_scenes}.items():
            if not (self.work / split / "questions/build.json").exists():
                self._make_data(split, count)
        if not (self.work / "tokenizer/tokenizer.json").exists():
            texts = [turn["value"] for row in self.descriptions("train")
                     for turn in row["conversations"]]  # fmt: skip
            make_tokenizer(texts, VOCABULARY).save_pretrained(self.work / "tokenizer")
        write_json(self.work / "existence.json", self._existence())
        task = {
            "name": "existence",
            "kind": "constraints",
            "files": [str(self.work / "existence.json")],
            "images": str(self.images("test")),
            "max_tokens": 24,
        }
        write_text(self.suite, yaml.safe_dump({"tasks": [task]}, sort_keys=False))
        write_json(self.lessons, self.taught_descriptions())
        write_json(self.work / "val.json", self.descriptions("val"))
        if not self.base.is_dir():
            config = self.work / "base.yaml"
            self.write_config(config, [self.lessons], steps=BASE_STEPS, start_from=None)
            run_module("vlm_sft.stage2", [str(config), f"output_dir={self.base.parent}"])

    def descriptions(self, split: str) -> list[dict[str, Any]]:
        """Return a record about each scene: what it shows, the largest thing first."""
        path = self.work / split / "questions/stage2.json"
        seen = {}
        for record in json.loads(path.read_text(encoding="utf-8")):
            things = record["conversations"][1]["value"].rpartition(", so ")[0]
            seen[record["image"]] = things + "."
        return [_described(image, text) for image, text in sorted(seen.items())]

    def taught_descriptions(self) -> list[dict[str, Any]]:
        """Return the descriptions that the base model is taught."""
        return self.descriptions("train")[-self.taught :]

    def other_descriptions(self) -> list[dict[str, Any]]:
        """Return the descriptions that are left to a study."""
        return self.descriptions("train")[: -self.taught]

    def _existence(self) -> list[dict[str, Any]]:
        """Return questions whose answers have to name an object, or must not."""
        path = self.work / "test/questions/existence.json"
        return [
            {
                "id": probe["id"],
                "image": probe["image"],
                "question": QUESTION,
                **_to_be_named(probe["category"], is_there=probe["answer"] == "yes"),
            }
            for probe in json.loads(path.read_text(encoding="utf-8"))
        ]

    def categories(self, split: str) -> dict[str, set[str]]:
        """Return the categories of every image by its file's name, and under "" all of them."""
        document = json.loads(self.annotations(split, "instances").read_text(encoding="utf-8"))
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
        held_out = {"path": str(self.work / "val.json"), "image_root": str(self.images("val"))}
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


def _described(image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": text}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _to_be_named(category: str, *, is_there: bool) -> dict[str, Any]:
    """Return the constraint that an answer has to fulfill, as IFEval's files have it."""
    if is_there:
        return {
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": [category]}],
        }
    words = [category, plural(category)]
    return {
        "instruction_id_list": ["keywords:forbidden_words"],
        "kwargs": [{"forbidden_words": words}],
    }


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
