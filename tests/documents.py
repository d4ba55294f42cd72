"""The commands in README.md and docs/, and a place where they run on tiny things."""

import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from PIL import Image

from tests.data_tools.coco_files import write_coco
from tests.tiny_runs import ROOT

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

NEEDS = {
    "a GPU", "a hub", "a server", "a download", "a quarter of an hour or more", "a cluster",
    "another program", "your own data",
}  # fmt: skip
"""What a block may need that a test cannot have: `<!-- not run: needs a GPU -->` before it."""

_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: needs (?P<needs>[^\n]*) -->\n(?P=indent))?"
    r"```(?P<language>bash|python)\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_VARIABLE = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: `bash` or `python`.
        body: Its text.
        needs: What its mark says it needs; "" for a block that is run.
    """

    language: str
    body: str
    needs: str

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, each on one line."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        variables: Environment variables before the command.
        words: The command and its arguments.
    """

    variables: Mapping[str, str]
    words: Sequence[str]

    @classmethod
    def of(cls, line: str) -> "Command":
        """Split a line as a shell does, without its comment."""
        words = shlex.split(line, comments=True)
        count = next((i for i, w in enumerate(words) if not _VARIABLE.fullmatch(w)), len(words))
        variables = dict(word.partition("=")[::2] for word in words[:count])
        return cls(variables, words[count:])

    @property
    def module(self) -> str:
        """The module of this project that it runs; "" for other programs."""
        if self.words[0] == "vlm-sft":
            return "vlm_sft"
        ours = ("vlm_sft", "data_tools")
        if list(self.words[:2]) == ["python", "-m"] and self.words[2].split(".")[0] in ours:
            return self.words[2]
        return ""

    @property
    def arguments(self) -> list[str]:
        """The arguments of the `vlm-sft` command line that it is."""
        if self.words[0] == "vlm-sft":
            return list(self.words[1:])
        name = self.module
        if name in ("data_tools", "data_tools.instruct"):
            return ["data", *self.words[3:]]
        if name.startswith("data_tools."):
            return ["data", name.partition(".")[2], *self.words[3:]]
        return [name.partition(".")[2], *self.words[3:]]


def blocks(page: str) -> list[Block]:
    """Return the bash and Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(m["language"], m["body"], (m["needs"] or "").strip()) for m in _BLOCK.finditer(text)
    ]


def commands(page: str) -> Iterator[tuple[Command, str]]:
    """Yield the commands of a page, each with what it needs."""
    for block in blocks(page):
        for line in block.commands if block.language == "bash" else ():
            try:
                yield Command.of(line), block.needs
            except ValueError:  # a line of a script in quotes
                assert block.needs, f"{page}: {line}"


def parse(arguments: Sequence[str]) -> None:
    """Parse the arguments of `vlm-sft` as it would, without doing anything.

    Raises:
        UserError: An argument is wrong.
    """
    name, *words = arguments
    if name == "data":
        parsers = import_module("data_tools.__main__").all_parsers()
        tool = import_module("data_tools.verify").parser()
        is_tool = words[0] == "verify" and "--records" in words
        (tool if is_tool else parsers[words[0]]).read(words[1:])
        return
    if name == "completion":
        import_module("vlm_sft.__main__").completion_parser().read(words)
        return
    module = import_module(import_module("vlm_sft.__main__").module_of(name))
    if name == "evaluate" and words[0] in ("compare", "export"):
        getattr(module, f"{words[0]}_parser")().read(words[1:])
    elif name == "config":
        module.parsers()[words[0]].read(words[1:])
    else:
        module.parser().read(words)


def extras(requirement: str) -> set[str]:
    """Return the extras of this project that `pip install` names, e.g. `.[qlora,serve]`."""
    found = re.fullmatch(r"\.\[([\w,]+)\]", requirement)
    return set() if found is None else set(found[1].split(","))


def known_extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])


def prepare(folder: Path, runs: Mapping[str, Path]) -> None:
    """Make a folder in which the commands of the documents find what they name.

    Args:
        folder: An empty folder.
        runs: Run directories by the names that the page uses.
    """
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs/tiny/data/images", folder / "photos")
    for place in (folder, folder / "photos"):
        Image.new("RGB", (48, 48), (200, 60, 60)).save(place / "dog.jpg")
    names = [f"{color}-{shape}" for color in ("red", "blue") for shape in ("circle", "square")]
    records = [
        {
            "id": name,
            "image": f"photos/{name}-0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A shape."},
            ],
        }
        for name in names
    ]
    (folder / "mine.json").write_text(json.dumps(records))
    rows = "".join(f"{name}-0.png,What is this?,A shape.\n" for name in names)
    (folder / "photos" / "questions.csv").write_text(f"image,question,answer\n{rows}")
    config = (ROOT / "configs/tiny/stage2.yaml").read_text()
    config = config.replace("projector: runs/tiny/stage1/final", "projector: null")
    for name in ("CONFIG.yaml", "my.yaml"):
        (folder / name).write_text(config)
    objects = [("dog", [4.0, 4.0, 40.0, 40.0], 0), ("cat", [120.0, 50.0, 30.0, 30.0], 0)]
    write_coco(
        folder / "coco",
        {number: objects for number in range(1, 5)},
        {number: ["A dog next to a cat."] for number in range(1, 5)},
    )
    (folder / "suite.yaml").write_text(
        "tasks:\n  - {name: colors, kind: gqa, files: [questions.json], images: photos}\n"
    )
    (folder / "questions.json").write_text(
        '[{"question_id": 1, "image": "red-circle-0.png", "question": "Color?", "answer": "red"}]'
    )
    for name, run in runs.items():
        shutil.copytree(run, folder / name)


def short(arguments: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments of `vlm-sft`, for training of two steps."""
    if arguments[0] not in ("stage1", "stage2"):
        return list(arguments)
    given = " ".join(arguments)
    added = ["train.max_steps=2", "train.save_every_steps=2", "data.num_workers=0"]
    if "train.trackers=" not in given:
        added.append("train.trackers=[]")
    needs_projector = "configs/tiny/" in given and "projector=" not in given
    if arguments[0] == "stage2" and needs_projector and not (folder / "runs/tiny/stage1").exists():
        added.append("projector=null")
    return [*arguments, *added]


def run(command: Command, folder: Path) -> int:
    """Run a command in this process, with `folder` as the working directory.

    Raises:
        AssertionError: It is a program that no test runs, so its block needs a mark.
    """
    from tests.train.tiny import reset_accelerate

    words = command.words
    if command.module:
        reset_accelerate()
        os.environ.update(command.variables)
        return int(import_module("vlm_sft.__main__").main(short(command.arguments, folder)))
    if words[:2] == ["pip", "install"]:
        assert extras(words[-1]) <= known_extras()
        return 0
    if words[0] == "cp":
        for name in words[1:-1]:
            shutil.copy(name, words[-1])
        return 0
    raise AssertionError(f"{words[0]}: not run by a test; mark its block with what it needs")
