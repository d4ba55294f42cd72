"""A checkpoint answers as the model that was trained, or is refused."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import trained
from tests.tiny_runs import run as start
from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.checkpoint.components import load_adapter
from vlm_sft.checkpoint.format import with_checksum
from vlm_sft.checkpoint.tensor_files import load_tensors
from vlm_sft.config.schema import load_config
from vlm_sft.data.conversation import Conversation, TextPart, Turn
from vlm_sft.errors import CheckpointError, ImageError, RecordError, UserError
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.model.build import build_model
from vlm_sft.model.hashing import named_state
from vlm_sft.model.language_model import causal_lm
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "configs" / "tiny" / "data" / "images"
RED, BLUE = IMAGES / "red-circle-0.png", IMAGES / "blue-square-0.png"


@pytest.fixture(scope="module")
def full(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run / "final", device="cpu")


@pytest.fixture(scope="module")
def lora(lora_run: Path) -> LoadedModel:
    return load_checkpoint(lora_run / "final", device="cpu")


def test_a_full_checkpoint_has_every_weight_that_was_saved(
    full: LoadedModel, full_run: Path
) -> None:
    saved = load_tensors(full_run / "final" / "language_model" / "model.safetensors")
    live = dict(full.model.language_model.named_parameters())
    assert saved.keys() == live.keys()
    assert all(torch.equal(live[name], saved[name]) for name in saved)
    untrained = build_model(full.config.model, dtype=torch.float32, seed=full.config.seed)
    first = next(iter(saved))
    assert not torch.equal(dict(untrained.language_model.named_parameters())[first], saved[first])


def test_an_adapter_checkpoint_has_its_adapters_and_projector(
    lora: LoadedModel, lora_run: Path
) -> None:
    config = load_config(lora_run / "final" / "config.yaml")
    model = build_model(config.model, dtype=torch.float32, seed=config.seed, lora=config.lora)
    before = {name: value.clone() for name, value in named_state(model)}
    load_adapter(model, lora_run / "final")
    expected, found = dict(named_state(model)), dict(named_state(lora.model))
    moved = {name for name in found if not torch.equal(before[name], found[name])}
    assert any(".lora_B." in name for name in moved)
    assert all(".lora_" in name or "multi_modal_projector" in name for name in moved)
    assert all(torch.equal(found[n], expected[n]) for n in found if ".lora_" in n)
    projector = load_tensors(lora_run / "final" / "projector.safetensors")
    for name, value in lora.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, projector[name])


def test_a_loaded_run_trains_nothing_and_knows_its_images(lora: LoadedModel) -> None:
    assert not lora.model.training
    assert not any(p.requires_grad for p in lora.model.parameters())
    assert (lora.image_aspect, lora.image_spec.size, lora.manifest["step"]) == ("pad", 48, 4)
    assert lora.load_image(RED).pixels.shape == (1, 3, 48, 48)


def test_a_runs_folder_stands_for_its_last_checkpoint(lora_run: Path, lora: LoadedModel) -> None:
    assert load_checkpoint(lora_run, device="cpu").manifest == lora.manifest


def test_a_flipped_bit_is_refused_with_the_files_name(lora_run: Path, tmp_path: Path) -> None:
    names = [p.relative_to(lora_run) for p in (lora_run / "final").rglob("*") if p.is_file()]
    for name in [n for n in names if n.name != "manifest.json"]:
        copy = tmp_path / "copy"
        shutil.copytree(lora_run, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name.name):
            load_checkpoint(copy / "final", device="cpu")
        shutil.rmtree(copy)


def test_a_folder_that_is_none_or_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give a checkpoint"):
        load_checkpoint(tmp_path / "gone")
    step = tmp_path / "run" / "checkpoints" / "step-00000020"
    step.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no such folder; give a checkpoint"):
        load_checkpoint(tmp_path / "run" / "final")
    (step / "manifest.json").touch()
    with pytest.raises(CheckpointError, match=f"not finished: repeat its command, or give {step}"):
        load_checkpoint(tmp_path / "run" / "final")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(
    device: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"device '{device}': "):
        load_checkpoint(tmp_path / "gone", device=device)


def test_another_base_than_the_trained_one_is_refused(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_sft.inference import loaded_model as inference

    def other_seed(*args: object, **keys: object) -> object:
        return build_model(*args, **{**keys, "seed": 7})  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "build_model", other_seed)
    with pytest.raises(CheckpointError, match="its vision tower is not the one that it was"):
        load_checkpoint(lora_run, device="cpu")


def test_a_run_on_a_base_folder_needs_that_folder_unchanged(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(full_run / "final" / "language_model", tmp_path / "base")
    run = trained(
        tmp_path / "run",
        "stage2_lora",
        "train.max_steps=1",
        "model.language_model.config=null",
        f"model.language_model.name={tmp_path}/base",
    )
    assert isinstance(load_checkpoint(run, device="cpu").generate(user_message("Who?")), str)
    weights = tmp_path / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-400] + b"\1" * 400)
    with pytest.raises(CheckpointError, match="its language model is not the one that it was"):
        load_checkpoint(run, device="cpu")
    weights.write_bytes(whole)
    (tmp_path / "base").rename(tmp_path / "moved")
    key = "model.language_model.name"
    with pytest.raises(CheckpointError, match=rf"searched {tmp_path}/base .*--base {key}=PATH"):
        load_checkpoint(run, device="cpu")
    found = parse_bases([f"{key}={tmp_path}/moved"])
    assert isinstance(
        load_checkpoint(run, device="cpu", bases=found).generate(user_message("Who?")), str
    )


@pytest.mark.parametrize("wrong", ["x", "model.language_model.name=", "seed=1", "x=/tmp"])
def test_a_base_that_is_no_key_and_path_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="expected KEY=PATH with one of the keys"):
        parse_bases([wrong])
    with pytest.raises(UserError, match="does not exist"):
        parse_bases(["model.language_model.name=/nowhere"])


def test_a_run_on_a_relative_base_loads_from_anywhere_and_after_both_were_moved(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(full_run / "final" / "language_model", tmp_path / "work" / "base")
    shutil.copytree(ROOT / "configs", tmp_path / "work" / "configs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    base = ["model.language_model.config=null", "model.language_model.name=base"]
    quiet = ["projector=null", "data.eval=[]", "train.max_steps=1"]
    assert start("stage2", Path("runs/r"), *base, *quiet, config="stage2_lora") == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "work" / "runs" / "r"
    step = run / "checkpoints" / "step-00000001"
    answers = {
        load_checkpoint(at, device="cpu").generate(user_message("Who?")) for at in (run, step)
    }
    adapter = json.loads((run / "final" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "work" / "base")
    run.rename(tmp_path / "elsewhere" / "r")  # the run alone: the base is where it was
    answers.add(load_checkpoint("r", device="cpu").generate(user_message("Who?")))
    shutil.move(tmp_path / "elsewhere" / "r", run)
    (tmp_path / "work").rename(tmp_path / "moved")  # both together
    answers.add(
        load_checkpoint(tmp_path / "moved/runs/r", device="cpu").generate(user_message("Who?"))
    )
    assert len(answers) == 1


def test_a_stage_1_run_describes_an_image_and_takes_one_question(tmp_path: Path) -> None:
    run = load_checkpoint(trained(tmp_path / "run", "stage1", "train.max_steps=1"), device="cpu")
    assert run.manifest["stage"] == "stage1"
    asked = user_message("thrown away by this template", [RED])
    assert run.prompt_ids(asked) == run.prompt_ids(user_message("", [RED]))
    assert isinstance(run.generate(asked, max_new_tokens=4), str)
    answered = (*asked.turns, Turn("assistant", (TextPart("red"),)))
    with pytest.raises(RecordError, match="'plain'"):
        run.generate(user_message("And now?", [RED], history=answered))


def test_an_answer_ends_at_the_templates_stop_token(full: LoadedModel) -> None:
    asked = user_message("Which color?", [RED])
    ids = torch.tensor([full.prompt_ids(asked)])
    stops = full.chat_tokenizer.eot_token_ids
    (said,) = full.model.generate(
        ids,
        torch.ones_like(ids),
        full.load_image(RED).pixels,
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=full.pad_token_id,
    ).tolist()
    assert said[-1] in stops and 1 < len(said) < 50
    assert not set(said[:-1]) & set(stops)
    plain = full.tokenizer.decode(said[:-1])
    assert full.generate(asked) == plain.strip()


def test_a_streamed_answer_is_the_answer_in_pieces(lora: LoadedModel) -> None:
    asked = user_message("Which shape?", [BLUE])
    ids = torch.tensor([lora.prompt_ids(asked)])
    (whole,) = lora.model.generate(
        ids,
        torch.ones_like(ids),
        lora.load_image(BLUE).pixels,
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=list(lora.chat_tokenizer.eot_token_ids),
        pad_token_id=lora.pad_token_id,
    )
    pieces = list(lora.stream(asked, max_new_tokens=30))
    assert "".join(pieces) == lora.tokenizer.decode(whole, skip_special_tokens=True).lstrip()
    assert lora.generate(asked, max_new_tokens=30) == "".join(pieces).strip()


def test_an_answer_is_cut_at_the_wanted_length(lora: LoadedModel) -> None:
    asked = user_message("Which shape?")
    longer = "".join(lora.stream(asked, max_new_tokens=12))
    assert longer.startswith("".join(lora.stream(asked, max_new_tokens=3)))


def test_drawn_answers_repeat_themselves_for_a_seed(lora: LoadedModel) -> None:
    asked = user_message("Which shape?", [RED])
    drawn = [lora.generate(asked, temperature=1.5, seed=s, max_new_tokens=20) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def say_only(run: LoadedModel, said: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the model say these ids over and over; the list returned grows by each."""
    head = causal_lm(run.model.language_model).get_output_embeddings()
    made: list[int] = []

    def forced(hidden: torch.Tensor) -> torch.Tensor:
        made.append(said[len(made) % len(said)])
        return torch.eye(261)[made[-1]].expand(*hidden.shape[:-1], 261)

    monkeypatch.setattr(head, "forward", forced)
    return made


def test_a_reader_that_goes_away_ends_the_answer(
    lora: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = say_only(lora, lora.chat_tokenizer.answer_ids("ab ")[:-1], monkeypatch)
    stream = lora.stream(user_message("Which shape?"), max_new_tokens=400)
    assert next(stream) == "ab "
    stream.close()
    assert 0 < len(made) < 400
    assert not any(thread.name == "answer" for thread in threading.enumerate())


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_a_stream_holds_the_answers_letters_and_no_more(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.max_steps=1", "data.max_length=512", f"data.template={template}"]
    run = load_checkpoint(trained(tmp_path / "run", "stage2_lora", *options), device="cpu")
    text = "türkis, 中文 und\n  two </s> lines 🙂"
    say_only(run, run.chat_tokenizer.answer_ids(text), monkeypatch)
    pieces = list(run.stream(user_message("Which?", [RED]), max_new_tokens=200))
    assert len(pieces) > 3 and "".join(pieces) == text


def test_every_image_of_a_conversation_is_seen_in_its_place(lora: LoadedModel) -> None:
    asked = user_message("What now?", [RED, BLUE])
    ids = lora.prompt_ids(asked)
    assert ids.count(IMAGE_TOKEN_ID) == 2 * lora.model.vision_tower.num_tokens
    answered = (*asked.turns, Turn("assistant", (TextPart("red"),)))
    later = user_message("And this?", [RED, BLUE, RED], history=answered)
    assert lora.prompt_ids(later)[: len(ids)] == ids
    assert lora.prompt_ids(later).count(IMAGE_TOKEN_ID) == 3 * lora.model.vision_tower.num_tokens
    inputs = torch.tensor([ids])
    one, other = (
        lora.model.logits(inputs, pixel_values=torch.cat([lora.load_image(p).pixels for p in ps]))
        for ps in ([RED, BLUE], [BLUE, RED])
    )
    assert not torch.equal(one[0, -1], other[0, -1])
    assert isinstance(lora.generate(later, max_new_tokens=3), str)


def test_a_broken_image_or_an_open_answer_is_refused(lora: LoadedModel, tmp_path: Path) -> None:
    broken = tmp_path / "half.jpg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ImageError, match=r"half\.jpg"):
        lora.generate(user_message("What?", [broken]))
    with pytest.raises(RecordError, match="must end in a user's turn"):
        lora.generate(Conversation("q", (Turn("assistant", (TextPart("a"),)),)))


def older_checkpoint(run: Path, folder: Path, records: list[dict[str, object]]) -> LoadedModel:
    """A checkpoint made before template.json named an image separator, trained on `records`."""
    shutil.copytree(run / "final", folder)
    (folder.parent / "records.json").write_text(json.dumps(records), encoding="utf-8")
    for name, change in {
        "template.json": lambda plain: plain.pop("image_separator"),
        "config.yaml": lambda plain: plain["data"].update(
            train=[{"path": str(folder.parent / "records.json")}]
        ),
    }.items():
        plain = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        change(plain)
        (folder / name).write_text(json.dumps(plain), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("template.json", "config.yaml"):
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest.pop("sha256")
    (folder / "manifest.json").write_text(with_checksum(manifest), encoding="utf-8")
    return load_checkpoint(folder, device="cpu")


@pytest.mark.parametrize(
    ("asked", "separator"),
    [
        ("<image>\nWhat?", "\n"),
        ("<image>What?", "\n"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], ""),
        ([{"type": "image"}, {"type": "text", "text": "\nWhat?"}], "\n"),
    ],
)
def test_an_older_checkpoint_asks_as_its_content_parts_were_trained(
    asked: object, separator: str, lora_run: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Red."}]
    run = older_checkpoint(lora_run, tmp_path / "old", [{"messages": turns, "images": ["a.png"]}])
    assert run.chat_tokenizer.image_separator == separator
    (tmp_path / "records.json").unlink()
    assert load_checkpoint(tmp_path / "old", device="cpu").chat_tokenizer.image_separator == "\n"
