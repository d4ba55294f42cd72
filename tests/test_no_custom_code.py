"""No code from a model folder is run, and no question about it is asked on a terminal."""

import ast
import contextlib
import functools
import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vlm_sft.config.schema import LanguageModelConfig, VisionTowerConfig
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_language_model, build_vision_tower
from vlm_sft.planning.local_configs import language_model_config
from vlm_sft.utils.model_folders import require_plain_folder

ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def hostile_folder(path: Path, **config: object) -> Path:
    """A model folder whose Python code, wherever it may be loaded, leaves a file `ran`."""
    path.mkdir()
    code = f"open({str(path / 'ran')!r}, 'w').close()\n"
    for name in ("evil.py", "modeling_evil.py", "setup.py", "__init__.py"):
        (path / name).write_text(code)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(code)
    auto_map = {
        name: f"evil.{name}"
        for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor")
    }
    tokenizers = {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
    content = {"model_type": "evil", "auto_map": {**auto_map, **tokenizers}, **config}
    (path / "config.json").write_text(json.dumps(content))
    tokenizer = {"tokenizer_class": "EvilTokenizer", "auto_map": tokenizers}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    return path


def calls(name: str, clip: str) -> Iterator[Callable[[], object]]:
    """Every way in which a folder that a configuration names is loaded."""
    language = LanguageModelConfig(name=name, tokenizer=name)
    yield lambda: load_tokenizer(language)
    yield lambda: build_language_model(language, dtype=torch.float32, seed=0)
    yield lambda: language_model_config(language)
    yield lambda: build_vision_tower(VisionTowerConfig(library="transformers", name=name))
    clip_name = f"local-dir:{clip}"
    yield lambda: build_vision_tower(VisionTowerConfig(library="open_clip", name=clip_name))
    yield lambda: build_vision_tower(VisionTowerConfig(library="timm", name=name))


def report(name: str, clip: str) -> None:
    for call in calls(name, clip):
        try:
            call()
            print("LOADED")
        except UserError as error:
            print("REFUSED", error.reason, error)


def on_a_terminal(work: Callable[[], None], answer: bytes) -> str:
    """Run `work` in a fork whose standard streams are a terminal, on which `answer` is typed."""
    process, terminal = pty.fork()
    if process == 0:
        try:
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            work()
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.write(terminal, answer)
    said = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 65536):
            said += data
    os.close(terminal)
    os.waitpid(process, 0)
    return said.decode()


def test_folders_with_code_are_refused_on_a_terminal_without_a_question(tmp_path: Path) -> None:
    evil = hostile_folder(tmp_path / "evil")
    clip = tmp_path / "clip"
    clip.mkdir()
    text = {
        "hf_model_name": str(evil),
        "hf_tokenizer_name": str(evil),
        "hf_model_pretrained": False,
    }
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (clip / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    )
    (clip / "open_clip_model.safetensors").write_bytes(b"")
    build_vision_tower(VisionTowerConfig(library="open_clip", config={"vision_cfg": vision}))
    said = on_a_terminal(lambda: report(str(evil), str(clip)), b"y\n" * 10)
    reasons = [line.split()[1] for line in said.splitlines() if line.startswith("REFUSED")]
    assert reasons == ["custom_code"] * 5 + ["wrong_input"], said  # timm knows no such code
    assert "[y/N]" not in said and "trust_remote_code" not in said
    assert not (evil / "ran").exists()


def test_a_built_in_model_is_loaded_without_the_code_that_its_folder_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = hostile_folder(tmp_path / "llama", **LLAMA)
    LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    ).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(folder / "model.safetensors")
    config = LanguageModelConfig(name=str(folder), tokenizer="bytes")
    model = build_language_model(config, dtype=torch.float32, seed=0)
    assert type(model).__module__.startswith("transformers.")
    assert "is not run" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_a_folder_that_asks_for_a_kernel_from_a_hub_is_refused(tmp_path: Path) -> None:
    folder = hostile_folder(tmp_path / "llama", **LLAMA, attn_implementation="someone/kernel:run")
    config = LanguageModelConfig(name=str(folder), tokenizer="bytes")
    with pytest.raises(UserError, match="someone/kernel") as caught:
        build_language_model(config, dtype=torch.float32, seed=0)
    assert caught.value.reason == "custom_code"


class Evil:
    """What a hostile pickle would run."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("library", ["timm", "open_clip", "transformers"])
def test_pickled_weights_that_would_run_code_are_refused(tmp_path: Path, library: str) -> None:
    ran = tmp_path / "ran"
    if library == "transformers":
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        torch.save({"model.norm.weight": Evil(ran)}, folder / "pytorch_model.bin")
        config = LanguageModelConfig(name=str(folder), tokenizer="bytes")
        with pytest.raises(UserError):
            build_language_model(config, dtype=torch.float32, seed=0)
    else:
        weights = tmp_path / "weights.pt"
        torch.save({"state_dict": Evil(ran)}, weights)
        name = {"timm": "resnet10t", "open_clip": "RN50"}[library]
        with pytest.raises(UserError):
            build_vision_tower(
                VisionTowerConfig.model_validate(
                    {"library": library, "name": name, "weights": str(weights)}
                )
            )
    assert not ran.exists()


def test_pipes_devices_and_endless_files_in_model_folders_are_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        os.mkfifo(folder / name)
        for load in (
            lambda f=folder: load_tokenizer(LanguageModelConfig(name=str(f))),
            lambda f=folder: build_language_model(
                LanguageModelConfig(name=str(f), tokenizer="bytes"), dtype=torch.float32, seed=0
            ),
        ):
            with pytest.raises(UserError) as caught:
                load()
            assert caught.value.reason == "not_a_file"
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no room
    with pytest.raises(UserError, match=r"big\.json: 1,099,511,627,776 bytes"):
        require_plain_folder(tmp_path)


@functools.cache
def nodes() -> tuple[tuple[Path, tuple[ast.AST, ...]], ...]:
    files = sorted([*ROOT.glob("vlm_sft/**/*.py"), *ROOT.glob("data_tools/**/*.py")])
    return tuple((f, tuple(ast.walk(ast.parse(f.read_text(encoding="utf-8"))))) for f in files)


def loading_calls() -> Iterator[tuple[Path, ast.Attribute, ast.Call | None]]:
    """Every mention of `from_pretrained` and `from_config` with the call that it is made in."""
    for file, found in nodes():
        calls = {id(node.func): node for node in found if isinstance(node, ast.Call)}
        handed_on = {
            id(argument): node
            for node in found
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_pretrained"
            for argument in node.args
        }
        for node in found:
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config"):
                yield file, node, calls.get(id(node)) or handed_on.get(id(node))


def test_every_loading_call_forbids_remote_code_itself() -> None:
    found = list(loading_calls())
    assert len(found) >= 8
    for file, node, call in found:
        place = f"{file}:{node.lineno}"
        assert call is not None, f"{place}: {node.attr} is passed on without trust_remote_code"
        if ast.unparse(call.func) == "load_pretrained":
            continue  # which adds it
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert settings.get("trust_remote_code") == "False", place


def test_no_module_unpickles_or_evaluates_what_it_reads() -> None:
    forbidden = {"pickle.load", "pickle.loads", "joblib.load", "eval", "exec", "yaml.unsafe_load",
                 "yaml.full_load", "marshal.loads", "shelve.open"}  # fmt: skip
    for file, found in nodes():
        for node in found:
            if not isinstance(node, ast.Call):
                continue
            name, place = ast.unparse(node.func), f"{file}:{node.lineno}"
            assert name not in forbidden, place
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load":
                assert settings.get("weights_only") == "True", place
            if name in ("np.load", "numpy.load"):
                assert settings.get("allow_pickle", "False") == "False", place
            if name == "yaml.load":
                assert settings.get("Loader", "").endswith("Loader"), place
