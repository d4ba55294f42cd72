"""Does checking the data pay? The quickstart's stage 2 on data that is wrong in part.

    scripts/quickstart                                    # makes what this needs, below demo/
    scripts/benchmarks/study_label_noise --seeds 1 2  # about 25 minutes a seed on 2 cores

Of the quickstart's questions of existence a share is spoilt: the verdict is turned round, or a
thing that is named is exchanged for one that is not there. Stage 2 is trained, with as many steps
and from the same projector, on

    untouched   the data as it was
    unverified  the spoilt data
    verified    what `python -m data_tools.instruct verify --file` accepts of the spoilt data

and asked about held-out images, by the training artist and by one never seen. Repeated, it goes
on with the runs that are missing.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bench_results import machine_facts, print_table, write_results
from study_processes import run_python

from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json, write_text

ARMS = ("untouched", "unverified", "verified")
SPLITS = {"same": "openmoji", "unseen": "twemoji"}
COLUMNS = {
    "arm": "trained on",
    "seed": "seed",
    "records": "records",
    "wrong": "of them wrong",
    "same": "training artist",
    "unseen": "artist never seen",
}


@dataclass(frozen=True)
class Spoilt:
    """Records of which some are wrong, and which: their places."""

    records: list[dict[str, Any]]
    wrong: frozenset[int]


def main(argv: Sequence[str]) -> int:
    """Train what is missing and write the table; returns the exit code."""
    arguments = _parse(argv)
    demo, facts = Path(arguments.demo), machine_facts()
    if not (demo / "runs/stage1/final").is_dir():
        raise UserError(f"{demo}: holds no finished stage 1; run scripts/quickstart first")
    rows, checked = [], []
    for seed in arguments.seeds:
        study = Study(demo, Path(arguments.work) / f"seed{seed}", seed, arguments.share)
        checked.append(study.verify())
        rows += [study.row(arm) for arm in arguments.arms]
    rows += [_mean(arm, rows) for arm in arguments.arms if len(arguments.seeds) > 1]
    title = f"Stage 2 on data of which {arguments.share:.0%} is wrong, checked and unchecked"
    print_table(title, COLUMNS, rows)
    write_results(
        Path(arguments.output),
        "label-noise",
        title=title,
        command="scripts/benchmarks/study_label_noise --seeds "
        + " ".join(map(str, arguments.seeds)),
        tables=[
            ("Right answers on held-out images", COLUMNS, rows),
            ("What checking did to the spoilt data", CHECKED_COLUMNS, checked),
        ],
        details={},
        facts=facts,
    )
    return 0


CHECKED_COLUMNS = {
    "seed": "seed",
    "records": "records",
    "wrong": "spoilt",
    "wrong_rejected": "spoilt and rejected",
    "right_rejected": "right and rejected",
}


class Study:
    """One seed: its data, its runs, its answers.

    Args:
        demo: The quickstart's folder.
        work: Where this seed's files go.
        seed: Of what is spoilt, and of training.
        share: Of the records that are spoilt.
    """

    def __init__(self, demo: Path, work: Path, seed: int, share: float) -> None:
        self._demo, self._work, self._seed = demo, work, seed
        self._data = demo / "data/train/stage2.json"
        self._annotations = demo / "scenes/train/annotations"
        self._spoilt = spoil(
            json.loads(self._data.read_text(encoding="utf-8")), self._truth(), share, seed
        )

    def verify(self) -> dict[str, Any]:
        """Check the spoilt file as a user would; what that found, as a row."""
        write_json(self._work / "unverified.json", self._spoilt.records)
        images = self._demo / "scenes/train/images"
        write_text(
            self._work / "check.yaml",
            yaml.safe_dump(
                {
                    "output_dir": str(self._work / "check"),
                    "coco": {
                        "instances": str(self._annotations / "instances_openmoji.json"),
                        "captions": str(self._annotations / "captions_openmoji.json"),
                        "images": str(images),
                    },
                    "teacher": {"kind": "rules"},
                }
            ),
        )
        config = str(self._work / "check.yaml")
        run_python("-m", "data_tools.instruct", "index", config)
        run_python(
            "-m",
            "data_tools.instruct",
            "verify",
            config,
            "--file",
            str(self._work / "unverified.json"),
        )
        kept = self._accepted()
        write_json(
            self._work / "verified.json", [self._spoilt.records[place] for place in sorted(kept)]
        )
        wrong, every = self._spoilt.wrong, set(range(len(self._spoilt.records)))
        return {
            "seed": self._seed,
            "records": len(every),
            "wrong": len(wrong),
            "wrong_rejected": f"{len(wrong - kept)} ({len(wrong - kept) / len(wrong):.1%})",
            "right_rejected": f"{len(every - wrong - kept)} "
            f"({len(every - wrong - kept) / len(every - wrong):.1%})",
        }

    def row(self, arm: str) -> dict[str, Any]:
        """Train and ask, unless that is done; the share of right answers by split."""
        run = self._work / arm
        records, wrong = self._trained_on(arm)
        if not (run / "final").is_dir():
            run_python(
                "-m", "vlm_sft.stage2", "configs/demo/stage2_lora.yaml", *self._overrides(arm, run)
            )
        found: dict[str, Any] = {
            "arm": arm,
            "seed": self._seed,
            "records": records,
            "wrong": f"{wrong / records:.1%}",
        }
        for split in SPLITS:
            found[split] = self._right(run, split)
        return found

    def _accepted(self) -> frozenset[int]:
        """Places of the records that were accepted: an imported sample's id ends in its place."""
        samples = self._work / "check/checked/unverified/samples.jsonl"
        with samples.open(encoding="utf-8") as lines:
            return frozenset(int(json.loads(line)["id"].rpartition("-")[2]) for line in lines)

    def _trained_on(self, arm: str) -> tuple[int, int]:
        """Records of existence that an arm has, and how many of them are wrong."""
        every = len(self._spoilt.records)
        if arm == "untouched":
            return every, 0
        if arm == "unverified":
            return every, len(self._spoilt.wrong)
        kept = self._accepted()
        return len(kept), len(kept & self._spoilt.wrong)

    def _overrides(self, arm: str, run: Path) -> list[str]:
        path = self._data if arm == "untouched" else self._work / f"{arm}.json"
        demo, scenes = self._demo, self._demo / "scenes"
        return [
            f"output_dir={run}",
            f"seed={self._seed}",
            f"projector={demo}/runs/stage1/final",
            f"model.vision_tower.name={demo}/pieces/efficientnet-lite0",
            f"model.language_model.name={demo}/pieces/smollm2-135m-instruct",
            f"data.train.0.path={path}",
            f"data.train.0.image_root={scenes}/train/images",
            f"data.train.1.path={demo}/data/others/stage2.json",
            f"data.train.1.image_root={scenes}/train/images",
            f"data.eval.0.path={demo}/data/val/stage2.json",
            f"data.eval.0.image_root={scenes}/val/images",
        ]

    def _right(self, run: Path, split: str) -> float:
        """Share of questions of existence that are answered rightly."""
        results = run / f"results-{split}.json"
        if not results.exists():
            run_python(
                "-m",
                "vlm_sft.evaluate",
                str(run / "final"),
                *("--images", str(self._demo / "scenes" / split / "images")),
                *("--probes", str(self._demo / "data" / split / "existence.json")),
                *("--conditions", "right", "--answers", "free_form", "--out", str(results)),
            )
        found = json.loads(results.read_text(encoding="utf-8"))
        return float(found["probes"]["existence"]["right"]["accuracy"]["estimate"])

    def _truth(self) -> dict[str, set[str]]:
        """The categories of every image, by its file's name; under the empty name all of them."""
        path = self._annotations / "instances_openmoji.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in document["images"]}
        truth: dict[str, set[str]] = {name: set() for name in files.values()}
        for entry in document["annotations"]:
            truth[files[entry["image_id"]]].add(names[entry["category_id"]])
        return {**truth, "": set().union(*truth.values())}


def spoil(
    records: Sequence[dict[str, Any]], truth: dict[str, set[str]], share: float, seed: int
) -> Spoilt:
    """Make a share of records of existence wrong, in turn by verdict and by a thing that is named.

    Args:
        records: Answers of the form `I see a cat and a boat, so no.`
        truth: Categories by image; under the empty name all that there are.
        share: Of the records.
        seed: Which, and how.

    Raises:
        UserError: An answer is not of that form.
    """
    rng = random.Random(seed)
    wrong = frozenset(rng.sample(range(len(records)), round(share * len(records))))
    made = []
    for place, record in enumerate(records):
        if place in wrong:
            human, reply = record["conversations"]
            absent = sorted(truth[""] - truth[record["image"]])
            spoilt = _spoilt(reply["value"], rng, absent, human["value"])
            record = {**record, "conversations": [human, {**reply, "value": spoilt}]}
        made.append(record)
    return Spoilt(made, wrong)


def _spoilt(answer: str, rng: random.Random, absent: Sequence[str], question: str) -> str:
    things, separator, verdict = answer.rpartition(", so ")
    if not separator or verdict not in ("yes.", "no."):
        raise UserError(
            f"found the answer {answer!r}, expected 'I see ..., so yes.' or '... so no.'; this "
            "study is for the quickstart's data"
        )
    named = things.removeprefix("I see ").split(" and ")
    others = [name for name in absent if name not in question]
    if rng.random() < 0.5 or named == ["nothing"]:
        return f"{things}, so {'no.' if verdict == 'yes.' else 'yes.'}"
    name = rng.choice(others)
    article = "an" if name[0] in "aeiou" else "a"
    named[rng.randrange(len(named))] = f"{article} {name}"
    return f"I see {' and '.join(named)}, so {verdict}"


def _mean(arm: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["arm"] == arm]
    means = {split: statistics.mean(row[split] for row in mine) for split in SPLITS}
    return {"arm": arm, "seed": "mean", "records": "", "wrong": "", **means}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_label_noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--demo", default="demo", help="the quickstart's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--share", type=float, default=0.3, help="of the records, spoilt (0.3)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", default="demo/label-noise", help="runs and data")
    parser.add_argument("--output", default="docs/instruction-data", help="where the page goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
