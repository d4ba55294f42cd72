"""Pushing an export: all of it in one commit or nothing, and never a word of the token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.export.hub_stub import TOKEN, Hub, running_hub
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.export.__main__ import main
from vlm_sft.export.push import push, require_pushable

# Of httpx, about how huggingface_hub sends a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "exported"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    (made / "export.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights" * 100)
    (made / ".DS_Store").write_text("")
    return made


def test_all_files_are_pushed_in_one_commit(hub: Hub, folder: Path) -> None:
    require_pushable("me/mine")
    assert push(folder, "me/mine", private=True, revision="v2").startswith(hub.url)
    assert hub.commits == [["README.md", "export.json", "model.safetensors"]]
    assert hub.files["model.safetensors"] == b"weights" * 100
    assert hub.repos == {"me/mine": True} and hub.branches == ["v2"]
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}


def test_an_export_is_replaced_but_files_of_others_and_other_weights_are_not_mixed_in(
    hub: Hub, folder: Path
) -> None:
    hub.files = {".gitattributes": b"", "export.json": b"{}", "README.md": b"old"}
    push(folder, "me/mine")
    hub.files["model-00002-of-00002.safetensors"] = b""
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors would be left beside"):
        push(folder, "me/mine")
    hub.files = {"notes.md": b""}
    with pytest.raises(UserError, match=r"files that are not of an export \(notes.md\)"):
        push(folder, "me/mine")
    assert len(hub.commits) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, folder: Path) -> None:
    hub.repos["me/mine"] = False
    with pytest.raises(UserError, match="is public, but --private was given"):
        push(folder, "me/mine", private=True)
    assert hub.commits == [] and hub.files == {}


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("whoami", 401, "HTTP 401: the hub does not accept the token"),
        ("repos/create", 403, "HTTP 403: the token may not write there"),
        ("/commit/", 403, "HTTP 403: the token may not write there"),
        ("/blob/", 400, "HTTP 400: "),
        ("/tree/", 404, "HTTP 404: there is no such repository or revision"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_without_the_token(
    path: str, status: int, message: str, hub: Hub, folder: Path
) -> None:
    hub.faults[path] = status
    with pytest.raises(UserError) as raised:
        require_pushable("me/mine")
        push(folder, "me/mine")
    assert message in str(raised.value) and "nothing was" in str(raised.value)
    assert TOKEN not in str(raised.value) and "\n" not in str(raised.value)
    assert hub.files == {} and hub.commits == []


def test_a_hub_that_is_not_there_and_a_missing_token_are_found_before_any_work(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub did not answer .*nothing was exported"):
        require_pushable("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set"):
        require_pushable("me/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token; set HF_TOKEN"):
        require_pushable("me/mine")
    with pytest.raises(UserError, match="me//mine"):
        require_pushable("me//mine")


def test_the_command_pushes_a_card_and_prints_no_token(
    hub: Hub,
    lora_run: Path,
    in_the_repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = tmp_path / "results.json"
    results.write_text('{"made_by": "x", "seed": 0, "probes": {"color": {"accuracy": 0.75}}}')
    out = tmp_path / "out"
    argv = [str(lora_run / "final"), str(out), "--push-to-hub", "me/mine", "--license", "mit"]
    caplog.set_level("DEBUG")
    assert main([*argv, "--results", str(results), "--attribution", "Images by A."]) == 0
    card = hub.files["README.md"].decode()
    assert "license: mit" in card and "probes / color / accuracy | 0.75" in card
    assert "- Images by A." in card and 'model="me/mine"' in card
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.commits[0])
    everything = "".join(capsys.readouterr()) + caplog.text
    assert "pushed to me/mine" in everything and TOKEN not in everything
    assert all(TOKEN.encode() not in data for data in hub.files.values())

    hub.faults["whoami"] = 401
    with pytest.raises(SystemExit):
        run_command(main, [str(lora_run / "final"), str(tmp_path / "two"), *argv[2:]])
    assert "does not accept the token" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
