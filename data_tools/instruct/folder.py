"""Where the files of one run lie."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; every path below is written by the stage named beside it."""

    root: Path

    @property
    def config(self) -> Path:
        """`plan`: the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def pictures(self) -> Path:
        """`index`: one `coco.Picture` a line, in the order of ids."""
        return self.root / "pictures.jsonl"

    @property
    def index(self) -> Path:
        """`index`: what was found in the annotations, counts and digests."""
        return self.root / "index.json"

    @property
    def templates(self) -> Path:
        """`plan`: the prompts by name."""
        return self.root / "templates.json"

    @property
    def plan(self) -> Path:
        """`plan`: what was chosen, refused and left out, with the estimates."""
        return self.root / "plan.json"

    @property
    def requests(self) -> Path:
        """`plan`: one `schema.Request` a line."""
        return self.root / "requests.jsonl"

    @property
    def answers(self) -> Path:
        """`generate`: a folder of append-only files of `schema.Answer`; runs may share it."""
        return self.root / "answers"

    @property
    def failures(self) -> Path:
        """`generate`: one `schema.Failure` a line, appended; the last of a request is the truth."""
        return self.root / "failures.jsonl"

    @property
    def spending(self) -> Path:
        """`generate`: what was sent and what it took, appended; the sum is what the run spent."""
        return self.root / "spending.jsonl"

    @property
    def teacher(self) -> Path:
        """`generate`: what was found out about the server."""
        return self.root / "teacher.json"

    @property
    def batches(self) -> Path:
        """`generate`: batches handed in and what became of them, appended."""
        return self.root / "batches.jsonl"

    @property
    def samples(self) -> Path:
        """`verify`: accepted `schema.Sample`s, in the order of the requests."""
        return self.root / "samples.jsonl"

    @property
    def rejected(self) -> Path:
        """`verify`: rejected ones, in the order of the requests."""
        return self.root / "rejected.jsonl"

    @property
    def verification(self) -> Path:
        """`verify`: counts of requests, answers, verdicts and reasons."""
        return self.root / "verification.json"

    @property
    def kept(self) -> Path:
        """`clean`: samples to train on."""
        return self.root / "kept.jsonl"

    @property
    def set_aside(self) -> Path:
        """`clean`: samples left out, with their reasons."""
        return self.root / "set_aside.jsonl"

    @property
    def cleaning(self) -> Path:
        """`clean`: counts, balances, duplicates."""
        return self.root / "cleaning.json"

    @property
    def picture_hashes(self) -> Path:
        """`clean`: a cache of what pictures look like; no result, and free to be deleted."""
        return self.root / "cache" / "picture_hashes.jsonl"

    @property
    def exports(self) -> Path:
        """`export`: training files and `export.json`, which counts them."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        """`report`: `report.html` and the plots."""
        return self.root / "report"
