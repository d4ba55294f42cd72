"""What do six kinds of bad data cost, and what does cleaning give back? Many short trainings.

    scripts/benchmarks/study_data_quality                    # all runs; repeat it after a kill
    scripts/benchmarks/study_data_quality --levels 40 --seeds 1
    scripts/benchmarks/study_data_quality --only-report      # the page of finished runs

A share of the conversations about composed scenes is spoilt in one of six ways:

    wrong answers         a thing that is named is exchanged for one that is not there
    corrupted images      black, noise, another scene, or cut off in the middle of the file
    missing turns         an answer and the next question are lost
    duplicates            copies of a few conversations take the place of others
    inconsistent wording  other names for things, other forms of sentence
    class imbalance       conversations about three kinds of objects take the place of others

and trained on as it is, or after `verify`, `clean` and `export` of `data_tools.instruct`. All runs
of a seed start from the same random weights and take equally many steps. The model is small, so
that a run takes a minute: a frozen EfficientNet-Lite0 whose features are cached, and a Llama of 2
million parameters, which learns all it knows from the run's data. It is asked what held-out scenes
show. For each, one
object that is there and one that is not are looked up in the answer: the share of right ones is the
accuracy (0.5 is chance), with its 95 % interval over images.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import yaml
from bench_plots import plot_data_quality
from bench_results import command_line, machine_facts, print_table, write_results
from PIL import Image
from study_model import SPECIAL, make_tokenizer

from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.malloc import fast_malloc_environment
from vlm_sft.utils.reading import read_json

KINDS: Final = (
    "wrong answers",
    "corrupted images",
    "missing turns",
    "duplicates",
    "inconsistent wording",
    "class imbalance",
)
OBJECTS: Final = {
    "cat": "kitty",
    "bus": "coach",
    "boat": "vessel",
    "pizza": "flatbread",
    "house": "home",
    "ball": "sphere",
    "watermelon": "melon",
    "violin": "fiddle",
    "zebra": "horse",
    "bed": "bunk",
}
"""The kinds of objects, each with the name that an inconsistent annotator gives it."""

FREQUENT: Final = ("cat", "bus", "boat")
"""The kinds of objects of which an unbalanced data set has too many."""

ARTIST: Final = "openmoji"
PIECES: Final = Path("demo/pieces")
SCENES: Final = [
    *("--artist", ARTIST, "--max-side", "256", "--max-objects", "2", "--max-instances", "2"),
    *("--scale", "0.4", "0.75", "--augment", "0.15", "--crowd-share", "0"),
    *("--visible-share", "0.8", "--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room"),
]
QUESTION: Final = "What does the image show?"
VOCABULARY: Final = 640
LANGUAGE_MODEL: Final = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    **SPECIAL,
}
COLUMNS: Final = {
    "kind": "kind",
    "level": "spoilt",
    "data": "data",
    "seed": "seed",
    "records": "records",
    "bad": "spoilt ones left",
    "accuracy": "accuracy (95 % interval)",
}
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Spoilt:
    """Conversations, and what is wrong with them.

    Attributes:
        records: The conversations.
        bad: Places of those that are spoilt.
        images: How an image is corrupted, by its file name.
    """

    records: Records
    bad: frozenset[int] = frozenset()
    images: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: what is wrong with the data, in percent, and whether it was cleaned."""

    kind: str
    level: int
    cleaned: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.kind.replace(' ', '-')}-{self.level}{'-cleaned' if self.cleaned else ''}"


def runs_of(kinds: Sequence[str], levels: Sequence[int]) -> list[Run]:
    """Return the trainings of a seed; the data without faults are trained on once for all kinds."""
    found = [Run("none", 0, False), Run("none", 0, True)]
    for level in levels:
        found += [Run(kind, level, cleaned) for kind in kinds for cleaned in (False, True)]
    return found


def main(argv: Sequence[str]) -> int:
    """Train and ask what is missing, and write the page; returns the exit code."""
    arguments = _parse(argv)
    facts = machine_facts()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `demo_pieces`, also in the processes
    os.environ.update(fast_malloc_environment())  # for the server that forks the processes
    rows: Records = []
    studies = [
        Study(Path(arguments.work), seed, arguments.steps, arguments.scenes)
        for seed in arguments.seeds
    ]
    if not arguments.only_report:
        studies[0].prepare()
    earlier = {} if arguments.earlier is None else _earlier(Path(arguments.earlier))
    for run in runs_of(arguments.kinds, arguments.levels):
        for study in studies:
            known = earlier.get((run.kind, run.level, run.cleaned, study.seed))
            if not arguments.only_report and known is None:
                study.run(run)
            if known is not None or study.is_done(run):
                rows.append(known or study.row(run))
    if not rows:
        raise UserError(f"{arguments.work}: no run is finished; run this without --only-report")
    title = "Six kinds of bad data, with and without cleaning"
    print_table(title, COLUMNS, rows)
    if arguments.output is not None:
        folder = Path(arguments.output)
        plot_data_quality(rows, KINDS, folder / "data-quality.png", title=title)
        write_results(
            folder,
            "data-quality",
            title=title,
            command=command_line("scripts/benchmarks/study_data_quality", argv),
            tables=[("Objects in held-out scenes", COLUMNS, rows)],
            details={"steps": arguments.steps, "scenes": arguments.scenes},
            facts=facts,
            plot="data-quality.png",
        )
    return 0


def _earlier(path: Path) -> dict[tuple[str, int, bool, int], dict[str, Any]]:
    """Return the rows of a file of results by kind, level, whether cleaned, and seed."""
    [rows] = read_json(path)["tables"].values()
    return {
        (row["kind"], row["percent"], row["data"] == "cleaned", row["seed"]): row for row in rows
    }


class Study:
    """One seed: its spoilt data and its runs.

    Args:
        work: Where all files go; scenes and features are shared by the seeds.
        seed: Of what is spoilt, of weights and of order.
        steps: Optimizer steps of each run.
        scenes: Number of scenes for training, of which a quarter is in the data of a run without
            faults, and of scenes to ask about.
    """

    def __init__(self, work: Path, seed: int, steps: int, scenes: Sequence[int]) -> None:
        self._work, self.seed, self._steps = work / "-".join(map(str, scenes)), seed, steps
        self._counts = dict(zip(("train", "test"), scenes, strict=True))
        self._folder = self._work / f"seed{seed}-{steps}"

    def prepare(self) -> None:
        """Make pieces, scenes and tokenizer, which all seeds share."""
        if not (PIECES / "efficientnet-lite0/pieces.json").exists():
            _run("demo_pieces", str(PIECES))
        wanted = read_json(Path("configs/demo/categories.json"))["categories"]
        kinds = {"categories": [entry for entry in wanted if entry["name"] in OBJECTS]}
        write_json(self._work / "categories.json", kinds)
        for number, (split, count) in enumerate(self._counts.items()):
            if not (self._built(split) / "build.json").exists():
                self._make_scenes(split, count, seed=71 + number)
        if not (self._work / "tokenizer").is_dir():
            texts = [text for record in self._captions() for text in _texts(record)]
            make_tokenizer(texts, VOCABULARY).save_pretrained(self._work / "tokenizer")

    def run(self, run: Run) -> None:
        """Spoil, clean, train and ask, unless that is done."""
        folder = self._folder / run.name
        if self.is_done(run):
            return
        spoilt = self.spoilt(run)
        images = self._images(folder, spoilt)
        write_json(folder / "spoilt.json", spoilt.records)
        data = self._cleaned(folder, images) if run.cleaned else folder / "spoilt.json"
        self._train(folder / "run", data, images)
        self._ask(folder)
        places = set(range(len(spoilt.records)))
        if run.cleaned:  # an exported id ends in the place of the record that was imported
            places = {int(record["id"].rpartition("-")[2]) for record in read_json(data)}
        counts = {"records": len(places), "bad": len(places & spoilt.bad)}
        write_json(folder / "outcome.json", counts)

    def is_done(self, run: Run) -> bool:
        """Return whether a run was trained and asked."""
        return (self._folder / run.name / "outcome.json").exists()

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of a finished run."""
        folder = self._folder / run.name
        values, images = right_answers(
            _descriptions(folder / "answers"),
            read_json(self._built("test") / "existence.json"),
        )
        found = cluster_bootstrap_interval(values, images, seed=self.seed)
        return {
            "kind": run.kind,
            "level": f"{run.level} %",
            "percent": run.level,
            "data": "cleaned" if run.cleaned else "as it is",
            "seed": self.seed,
            **read_json(folder / "outcome.json"),
            "accuracy": f"{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})",
            **found.as_dict(),
        }

    def spoilt(self, run: Run) -> Spoilt:
        """Return the conversations of a run before cleaning."""
        talks = conversations(self._captions(), self._truth(), seed=self.seed)
        count = len(talks) // 4
        return spoil(
            run.kind, talks[:count], talks[count:], self._truth(), run.level / 100, self.seed
        )

    def _scenes(self, split: str) -> Path:
        return self._work / "scenes" / split

    def _built(self, split: str) -> Path:
        return self._work / "built" / split

    def _annotations(self, split: str, what: str) -> Path:
        return self._scenes(split) / "annotations" / f"{what}_{ARTIST}.json"

    def _captions(self) -> Records:
        found: Records = read_json(self._built("train") / "stage1.json")
        return found

    def _truth(self) -> dict[str, set[str]]:
        """Return the kinds of objects of every training image, by its file name."""
        document = read_json(self._annotations("train", "instances"))
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in document["images"]}
        truth: dict[str, set[str]] = {name: set() for name in files.values()}
        for entry in document["annotations"]:
            truth[files[entry["image_id"]]].add(names[entry["category_id"]])
        return truth

    def _make_scenes(self, split: str, count: int, *, seed: int) -> None:
        options = ["--count", str(count), "--seed", str(seed), "--workers", "1", *SCENES]
        options += ["--categories", str(self._work / "categories.json")]
        _run("data_tools.make_scenes", "--out", str(self._scenes(split)), *options)
        files = [
            *("--instances", str(self._annotations(split, "instances"))),
            *("--captions", str(self._annotations(split, "captions"))),
            *("--images", str(self._scenes(split) / "images"), "--out", str(self._built(split))),
        ]
        form = ["--captions-from", "boxes", "--families", "existence", "--probes", "2"]
        _run("data_tools.build_coco", *files, *form, "--seed", str(seed))

    def _images(self, folder: Path, spoilt: Spoilt) -> Path:
        """Return the folder of the images; a copy if some are corrupted."""
        source = self._scenes("train") / "images"
        if not spoilt.images:
            return source
        target = folder / "images"
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            (target / path.name).unlink(missing_ok=True)
            if path.name not in spoilt.images:
                os.link(path, target / path.name)
        for name, how in spoilt.images.items():
            corrupt(source / name, target / name, how)
        return target

    def _cleaned(self, folder: Path, images: Path) -> Path:
        """Verify, clean and export a run's conversations; return the file to train on."""
        config = folder / "check.yaml"
        coco: dict[str, Any] = {
            what: str(self._annotations("train", what)) for what in ("instances", "captions")
        }
        coco |= {"images": str(images), "max_faulty": 1.0}
        settings = {"output_dir": str(folder / "check"), "coco": coco}
        write_text(config, yaml.safe_dump(settings | {"teacher": {"kind": "rules"}}))
        _run("data_tools.instruct", "index", str(config))
        _run("data_tools.instruct", "verify", str(config), "--file", str(folder / "spoilt.json"))
        checked = folder / "check/checked/spoilt"
        for stage in ("index", "clean", "export"):
            _run("data_tools.instruct", stage, str(config), f"output_dir={checked}")
        return checked / "export/llava.json"

    def _train(self, out: Path, data: Path, images: Path) -> None:
        if (out / "final").is_dir():
            return
        settings = {
            "output_dir": str(out),
            "seed": self.seed,
            "projector": None,
            "lora": None,
            "model.vision_tower.name": str(PIECES / "efficientnet-lite0"),
            "model.language_model.name": None,
            "model.language_model.config": LANGUAGE_MODEL,
            "model.language_model.tokenizer": str(self._work / "tokenizer"),
            "data.train": [{"path": str(data), "image_root": str(images)}],
            "data.eval": [],
            "data.feature_cache": str(self._work / "features"),
            "data.on_error": "quarantine",  # an image that cannot be read is left out
            "data.max_quarantined": 10_000,
            "optim.learning_rate.projector": 1e-3,
            "optim.learning_rate.language_model": 2e-3,
            "train.max_steps": self._steps,
            "train.epochs": 100,
            "train.global_batch_size": 16,
            "train.packing": None,
            "train.micro_batch_size": 16,
            "train.group_by_length": True,
            "train.share_image_prefix": False,
            "train.eval_every_steps": None,
            "train.save_every_steps": 10_000,
            "train.log_every_steps": 20,
            "train.trackers": [],
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        _run("vlm_sft.stage2", "configs/demo/stage2_lora.yaml", *overrides)

    def _ask(self, folder: Path) -> None:
        task = {
            "name": "describe",
            "kind": "caption",
            "files": [str(self._annotations("test", "captions"))],
            "images": str(self._scenes("test") / "images"),
            "prompt": QUESTION,
            "max_tokens": 24,
        }
        write_text(folder / "suite.yaml", yaml.safe_dump({"tasks": [task]}))
        out = ["--out", str(folder / "answers")]
        _run("vlm_sft.evaluate", str(folder / "run/final"), str(folder / "suite.yaml"), *out)


def conversations(captions: Records, truth: dict[str, set[str]], seed: int) -> Records:
    """Return a conversation of two turns about each image: what is there, and is this there?

    Args:
        captions: One record of an image each; its answer becomes that of the first turn.
        truth: The kinds of objects by image.
        seed: Of the second question.
    """
    rng, made = random.Random(seed), []
    for record in captions:
        here = truth[record["image"]]
        present = rng.random() < 0.5
        kind = rng.choice(sorted(here if present else OBJECTS.keys() - here))
        turns = [
            ("human", f"<image>\n{QUESTION}"),
            ("gpt", record["conversations"][1]["value"]),
            ("human", f"Is there a {kind}?"),
            ("gpt", "Yes." if present else "No."),
        ]
        made.append(_record(record["image"], turns))
    return made


def spoil(
    kind: str,
    records: Records,
    others: Records,
    truth: dict[str, set[str]],
    share: float,
    seed: int,
) -> Spoilt:
    """Return conversations of which a share has one kind of fault.

    Args:
        kind: One of `KINDS`, or `none`.
        records: The conversations.
        others: Further ones, from which those of too frequent objects are taken.
        truth: The kinds of objects by image.
        share: Of the conversations.
        seed: Which, and how.

    Raises:
        UserError: There are too few other conversations about the frequent objects.
    """
    rng = random.Random(f"{seed} {kind}")
    if kind == "none":
        return Spoilt(records)
    places = rng.sample(range(len(records)), round(share * len(records)))
    made, images = list(records), dict[str, str]()
    if kind == "duplicates":
        kept = sorted(set(range(len(records))) - set(places))
        sources = [records[place] for place in rng.sample(kept, 10)]
        copies = [sources[number % len(sources)] for number in range(len(places))]
    elif kind == "class imbalance":
        found = [record for record in others if truth[record["image"]] <= set(FREQUENT)]
        if len(found) < len(places):
            raise UserError(
                f"class imbalance: found {len(found)} further conversations about "
                f"{', '.join(FREQUENT)} alone, expected {len(places)}; lower --levels"
            )
        copies = rng.sample(found, len(places))
    else:
        copies = [records[place] for place in places]
    for number, (place, copy) in enumerate(zip(places, copies, strict=True)):
        if kind == "corrupted images":
            images[copy["image"]] = CORRUPTIONS[number % len(CORRUPTIONS)]
        elif kind in TEXT_FAULTS:
            texts = [turn["value"] for turn in copy["conversations"]]
            texts = TEXT_FAULTS[kind](rng, texts, truth[copy["image"]])
            roles = ("human", "gpt") * (len(texts) // 2)
            made[place] = _record(copy["image"], list(zip(roles, texts, strict=True)))
        else:
            made[place] = copy
    return Spoilt(made, frozenset(places), images)


def _wrong_answer(rng: random.Random, texts: list[str], here: set[str]) -> list[str]:
    """Exchange a thing that is named for one that is not there."""
    named = rng.choice(sorted(here))
    other = rng.choice(sorted(OBJECTS.keys() - here))
    plural = "es" if named == "bus" else "s"
    answer = texts[1].replace(named + plural, other + ("es" if other == "bus" else "s"))
    answer = answer.replace(named, other).replace(named.capitalize(), other.capitalize())
    return [texts[0], answer, *texts[2:]]


def _missing_turns(rng: random.Random, texts: list[str], here: set[str]) -> list[str]:
    """Lose the first answer and the second question."""
    return [texts[0], texts[3]]


def _other_wording(rng: random.Random, texts: list[str], here: set[str]) -> list[str]:
    """Give things other names, in one of three other forms of sentence."""
    things = [OBJECTS[kind] for kind in sorted(here)]
    form = rng.choice(["{} !!", "Picture contains: {}", "One can observe {} in this photograph."])
    return [texts[0], form.format(", ".join(things)), *texts[2:]]


TEXT_FAULTS: Final = {
    "wrong answers": _wrong_answer,
    "missing turns": _missing_turns,
    "inconsistent wording": _other_wording,
}
CORRUPTIONS: Final = ("black", "noise", "exchanged", "cut off")


def corrupt(source: Path, target: Path, how: str) -> None:
    """Write a corrupted copy of an image; for the same image and way always the same one.

    Args:
        source: The image.
        target: The copy.
        how: One of `CORRUPTIONS`. `exchanged` takes the next image of the folder, in the same size.
    """
    if how == "cut off":
        content = source.read_bytes()
        target.write_bytes(content[: len(content) // 4])
        return
    with Image.open(source) as opened:
        size = opened.size
    if how == "black":
        image = Image.new("RGB", size)
    elif how == "noise":
        noise = random.Random(source.name).randbytes(size[0] * size[1] * 3)
        image = Image.frombytes("RGB", size, noise)
    else:
        names = sorted(path.name for path in source.parent.iterdir())
        other = names[(names.index(source.name) + 1) % len(names)]
        with Image.open(source.parent / other) as opened:
            image = opened.convert("RGB").resize(size)
    image.save(target, quality=90)


def right_answers(
    descriptions: dict[str, str], probes: Sequence[dict[str, Any]]
) -> tuple[list[float], list[str]]:
    """Return for each question whether the description answers it rightly, and its image.

    Args:
        descriptions: Answers by the number of the image.
        probes: Rows with `image`, `category`, and `answer` (yes or no).
    """
    values, images = [], []
    for probe in probes:
        description = descriptions[str(int(Path(probe["image"]).stem))].lower()
        named = str(probe["category"]) in description
        values.append(float(named == (probe["answer"] == "yes")))
        images.append(str(probe["image"]))
    return values, images


def _texts(record: dict[str, Any]) -> Iterator[str]:
    """Yield the texts that the tokenizer is made for."""
    yield from (turn["value"] for turn in record["conversations"])
    yield from (
        f"Is there a {kind}? Yes. No. Picture contains: {OBJECTS[kind]}" for kind in OBJECTS
    )


def _record(image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    talk = [{"from": who, "value": text} for who, text in turns]
    return {"id": Path(image).stem, "image": image, "conversations": talk}


def _descriptions(folder: Path) -> dict[str, str]:
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {str(row["id"]): row["answer"] for row in rows if "answer" in row}


def _run(module: str, *arguments: str) -> None:
    """Run a command in a process of its own, forked from one that has imported what is heavy."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_call, args=(module, arguments))
    process.start()
    process.join()
    if process.exitcode:
        shown = " ".join([module, *arguments[:2]])
        raise UserError(f"{shown} ended with code {process.exitcode}; its reason is above")


PRELOADED: Final = [
    "vlm_sft.commands.train",
    "vlm_sft.commands.evaluate",
    "data_tools.instruct.verify.command",
    "data_tools.instruct.clean.command",
]


def _call(module: str, arguments: Sequence[str]) -> None:
    name = {"data_tools.instruct": "data_tools.instruct.__main__"}.get(module, module)
    run_command(import_module(name).main, arguments)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_data_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--levels", type=int, nargs="+", default=[40, 20, 10], help="percent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=160, help="of each run (160)")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=[1600, 150], help="to train on, to ask about"
    )
    parser.add_argument("--work", default="demo/data-quality", help="pieces, data and runs")
    parser.add_argument(
        "--earlier", default=None, help="data-quality.json whose runs are not repeated"
    )
    parser.add_argument("--output", default=None, help="folder for a page of results")
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
