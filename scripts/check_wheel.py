"""Build the sdist, a wheel from it, and use the wheel in an empty environment.

    scripts/check_wheel [--keep DIR]

In an environment that has only the wheel and the packages of the core, outside of the checkout:
`--help`, `init`, `check`, both stages, `report`, `evaluate`, `chat`, `errors` and
`config reference` must work, and commands that need an extra must name it and exit with 2. Prints
the sizes of the wheel and of what it installs, and the time of `import vlm_sft` and `--help`.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("vlm_sft", "data_tools")
REPEATS = 5
EXAMPLES = "configs/tiny"
IMAGE = "configs/tiny/data/images/red-circle-0.png"

MAKE_MODELS = """
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
tower = CLIPVisionConfig(hidden_size=32, image_size=48, patch_size=16, **sizes)
CLIPVisionModel(tower).save_pretrained("tower")
llm = LlamaConfig(vocab_size=261, hidden_size=64, bos_token_id=257, eos_token_id=258, **sizes)
LlamaForCausalLM(llm).save_pretrained("llm")
"""

INSTALLED_BYTES = """
import importlib.metadata as m, json
def size(d): return sum(f.locate().stat().st_size for f in d.files or () if f.locate().is_file())
print(json.dumps({d.name.lower(): size(d) for d in m.distributions()}))
"""


def copy_sources(root: Path, target: Path) -> None:
    """Copy the files of a checkout that git knows or would add, and no build products."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=root, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (root / name).is_file() and not name.startswith(".venv"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist of a checkout, and the wheel from the sdist; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        sources = Path(place, "sources")
        copy_sources(root, sources)
        sdist = out / _call_backend("build_sdist", sources, out)
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        unpacked = Path(place, sdist.name.removesuffix(".tar.gz"))
        wheel = out / _call_backend("build_wheel", unpacked, out)
    return sdist, wheel


def _call_backend(hook: str, sources: Path, out: Path) -> str:
    code = (
        "import sys; from setuptools import build_meta as b; "
        f"print(b.{hook}(sys.argv[1]), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, str(out.absolute())]
    done = subprocess.run(words, cwd=sources, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{hook} failed:\n{done.stderr}")
    return done.stderr.splitlines()[-1]


def content_faults(wheel: Path, root: Path) -> list[str]:
    """Return what a wheel lacks of a checkout's packages, and what it has besides them."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tempfile.TemporaryDirectory() as place:
        copy_sources(root, Path(place))
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        names = {path.relative_to(place).as_posix() for path in files}
    wanted = {name for name in names if name.split("/")[0] in PACKAGES}
    wanted |= {f"vlm_sft/{name}" for name in names if name.startswith("configs/")}
    lacking = [f"the wheel lacks {name}" for name in sorted(wanted - found)]
    return lacking + [f"the wheel has {name} besides" for name in sorted(found - wanted)]


class Environment:
    """An environment with the wheel and the core's packages, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.scripts = folder / "work", folder / "env" / "bin"
        self.folder.mkdir(parents=True)
        venv.create(folder / "env", with_pip=True)
        self.python = str(self.scripts / "python")
        pinned = ["--constraint", str(ROOT / "constraints.txt"), str(wheel)]
        uv = Path(sys.executable).parent / "uv"
        pip = [uv, "pip", "install", "--quiet", "--python", self.python]
        if not uv.exists():
            pip = [self.python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*map(str, pip), *pinned], check=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the folder, with nothing of the checkout."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return subprocess.run(
            [str(self.scripts / words[0]), *words[1:]],
            cwd=self.folder,
            env={**kept, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )

    def expect(self, words: str, *, code: int = 0, text: str = "") -> None:
        """Run a command and end with its output if its exit code or its output is another."""
        start = time.monotonic()
        done = self.run(*words.split())
        printed = done.stdout + done.stderr
        if done.returncode != code or text not in printed or "Traceback" in printed:
            raise SystemExit(f"{words}: exit code {done.returncode}, expected {code}\n{printed}")
        print(f"ok  {time.monotonic() - start:5.1f} s  {words}", flush=True)

    def seconds(self, *words: str) -> tuple[float, float]:
        """Return the medians of wall time and CPU time of a program's starts."""
        wall, cpu = [], []
        for _ in range(REPEATS):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            self.run(*words)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            wall.append(time.monotonic() - start)
            cpu.append(
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            )
        return statistics.median(wall), statistics.median(cpu)


def use(env: Environment) -> None:
    """Use the commands as a newcomer does who has only the wheel."""
    env.expect("vlm-sft --help", text="commands:")
    env.expect("vlm-sft --version")
    env.expect("vlm-sft errors", text="# Errors")
    env.expect("vlm-sft config reference", text="train.packing")
    env.expect("vlm-sft init --examples", text="configs/tiny/stage1.yaml")
    env.expect(f"vlm-sft check {EXAMPLES}/stage1.yaml", text="the run can start")
    env.expect(f"vlm-sft stage1 {EXAMPLES}/stage1.yaml train.epochs=2", text="finished")
    env.expect("vlm-sft report runs/tiny/stage1", text="report")
    env.expect(f"vlm-sft stage2 {EXAMPLES}/stage2_lora.yaml train.epochs=1", text="finished")
    asked = f"--image {IMAGE} --prompt Color? --max-new-tokens 4"
    env.expect(f"vlm-sft chat runs/tiny/stage2_lora/final {asked}")
    env.run("python", "-c", MAKE_MODELS)
    models = "--tower tower --llm llm --tokenizer bytes --gpu cpu"
    env.expect(
        f"vlm-sft init --data {EXAMPLES}/data/instructions.json {models} --yes", text="next:"
    )
    env.expect("vlm-sft check vlm/stage1.yaml", text="the run can start")
    env.expect("vlm-sft stage1 vlm/stage1.yaml train.max_steps=1", text="finished")
    env.expect("vlm-sft stage2 vlm/stage2.yaml train.max_steps=1", text="finished")
    run = _run_of(env.folder / "vlm" / "stage2.yaml")
    env.expect(f"vlm-sft evaluate {run}/final vlm/suite.yaml --out vlm/evaluation")
    # What needs an extra says so in one sentence.
    page = f"vlm-sft show {EXAMPLES}/stage1.yaml --html page.html"
    env.expect(page, code=2, text="pip install 'vlm-sft[plots]'")
    env.expect("vlm-sft serve runs/tiny/stage1/final", code=2, text="pip install 'vlm-sft[serve]'")
    env.expect("vlm-sft data mix configs/instruct/mix.yaml", code=2, text="vlm-sft[instruct]")
    tracked = f"vlm-sft stage1 {EXAMPLES}/stage1.yaml train.trackers=[tensorboard] output_dir=t"
    env.expect(tracked, code=2, text="pip install 'vlm-sft[tensorboard]'")


def _run_of(config: Path) -> str:
    lines = config.read_text().splitlines()
    return next(line for line in lines if line.startswith("output_dir:")).split()[1]


def print_figures(env: Environment, wheel: Path, sdist: Path) -> None:
    """Print sizes and times, as docs/install.md has them."""
    done = env.run("python", "-c", INSTALLED_BYTES)
    sizes: dict[str, int] = json.loads(done.stdout)
    heavy = ("torch", "triton", "nvidia", "cuda")
    rest = {name: size for name, size in sizes.items() if not name.startswith(heavy)}
    rest["torchvision"] = sizes["torchvision"]
    largest = sorted(rest, key=lambda name: rest[name], reverse=True)[:5]
    print(f"wheel {wheel.stat().st_size / 1e6:.2f} MB, sdist {sdist.stat().st_size / 1e6:.2f} MB")
    print(
        f"installed: {len(sizes)} packages, {sum(sizes.values()) / 1e6:,.0f} MB; without torch and "
        f"its GPU libraries {len(rest)} packages, {sum(rest.values()) / 1e6:,.0f} MB "
        f"({', '.join(f'{name} {rest[name] / 1e6:.0f}' for name in largest)})"
    )
    for words in (
        ["python", "-c", "pass"],
        ["python", "-c", "import vlm_sft"],
        ["vlm-sft", "--help"],
    ):
        wall, cpu = env.seconds(*words)
        print(f"{' '.join(words):<28} {wall:.2f} s, {cpu:.2f} CPU-seconds (median of {REPEATS})")


def main(argv: Sequence[str] | None = None) -> None:
    """Build, compare the contents, install, use, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep wheel and sdist here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        sdist, wheel = build(ROOT, arguments.keep or Path(place, "dist"))
        if faults := content_faults(wheel, ROOT):
            raise SystemExit("\n".join(faults))
        env = Environment(Path(place, "empty"), wheel)
        use(env)
        print_figures(env, wheel, sdist)


if __name__ == "__main__":
    main()
