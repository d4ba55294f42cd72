"""`vlm-sft` runs every command, completes them in a shell, and prints configurations."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from data_tools.instruct.config import InstructConfig
from data_tools.mix.config import MixConfig
from data_tools.select.config import SelectConfig
from vlm_sft.__main__ import COMMANDS, main, module_of
from vlm_sft.commands.registry import SUBCOMMANDS
from vlm_sft.config import __main__ as config_command
from vlm_sft.config.reference import REQUIRED, all_settings, as_text, select_settings
from vlm_sft.config.resume import flat
from vlm_sft.config.schema import load_config
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.errors.codes import CODES

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny" / "stage2_lora.yaml")


def test_the_script_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vlm-sft": "vlm_sft.__main__:run"}


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, about in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", printed, re.MULTILINE)


def test_without_a_command_the_help_is_printed_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "commands:\n  init" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage3"], "COMMAND stage3: did you mean stage2?"),
        (["expotr", "x"], "COMMAND expotr: did you mean export?"),
        (["--vresion"], "--vresion: unknown option; did you mean --version?"),
        (["qqq"], "COMMAND qqq: expected one of init, stage1, stage2, check"),
        (["config", "referense"], "COMMAND referense: did you mean reference?"),
        (["config"], "missing: COMMAND; `vlm-sft config --help` shows examples"),
        (["completion", "fsh"], "SHELL fsh: did you mean zsh?"),
    ],
)
def test_a_misspelled_command_is_refused_with_the_nearest_one(
    words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        main(words)
    assert str(caught.value).startswith(message)


def test_the_data_commands_name_themselves_as_they_were_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["data", "plan", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: vlm-sft data plan [-h]")
    assert "\n  vlm-sft data plan configs/instruct/rules.yaml" in printed
    with pytest.raises(UserError, match=r"^missing: COMMAND; `vlm-sft data --help` shows examples"):
        main(["data"])


@pytest.mark.parametrize(
    "name", ["build_coco", "make_scenes", "mix", "overlap", "pope", "review", "select", "split"]
)
def test_the_other_data_commands_are_there_too(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["data", name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: vlm-sft data {name} ")
    assert f"\n  vlm-sft data {name} " in printed


def test_verify_with_records_checks_those_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^missing: --instances, --images, --out;"):
        main(["data", "verify", "--records", "a.json"])
    with pytest.raises(UserError, match=r"^missing: CONFIG\.yaml; `vlm-sft data verify --help`"):
        main(["data", "verify"])
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "against the annotations, or check records of others (--records) clean" in shown


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_names_itself_in_its_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: vlm-sft {name} ")
    assert f"\n  vlm-sft {name}" in printed  # an example
    assert module_of(name).startswith(f"vlm_sft.{name}")


def test_the_resolved_configuration_has_the_overrides_and_the_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "show", TINY, "train.max_steps=7"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown) == load_config(TINY, ["train.max_steps=7"])
    assert "max_skipped_steps: 10" in shown.read_text()


def test_the_reference_has_every_setting_with_a_meaning() -> None:
    settings = {setting.key.replace(".N.", ".0."): setting for setting in all_settings()}
    overrides = ["train.micro_batch_size=null", "train.packing.max_tokens=4096"]
    overrides += ["data.eval=[{path: a.json}]"]
    for key in flat(load_config(TINY, overrides)):
        if ".config." not in key:  # a configuration of another library
            assert key in settings, key
    assert [key for key, setting in settings.items() if not setting.meaning] == []
    assert {s.on_resume for s in settings.values()} == {"free", "explicit", "forbidden"}
    for setting in settings.values():
        assert setting.meaning[0].isupper() or setting.meaning[0] == "`", setting
        assert setting.meaning.endswith("."), setting


def test_the_types_and_defaults_of_the_reference_are_those_of_the_schema() -> None:
    expected = {
        "seed": ("whole number, at least 0", "42", "forbidden"),
        "data.train.N.path": ("text", REQUIRED, "explicit"),
        "data.eval.N.weight": ("positive number, at most 10,000.0", "1.0", "explicit"),
        "data.num_workers": ("whole number from 0 to 1,024", "2", "free"),
        "optim.betas": ("list: number from 0 to 1, number from 0 to 1", "[0.9, 0.999]", "explicit"),
        "lora": ("section or null", "null", "forbidden"),
        "lora.targets": ("list of: text or `all-linear`", "all-linear", "forbidden"),
        "train.compile": ("`true` or `false`", "false", "explicit"),
        "train.precision": ("`bf16`, `fp16` or `fp32`", "bf16", "explicit"),
    }
    settings = {setting.key: setting for setting in all_settings()}
    found = {key: settings[key] for key in expected}
    assert {k: (s.type, s.default, s.on_resume) for k, s in found.items()} == expected


def test_settings_are_selected_by_key_section_or_last_name() -> None:
    assert [s.key for s in select_settings(["seed", "max_length"])] == ["seed", "data.max_length"]
    assert [s.key for s in select_settings(["data.train.3.path"])] == ["data.train.N.path"]
    assert [s.key for s in select_settings(["train.packing"])][:2] == [
        "train.packing",
        "train.packing.max_tokens",
    ]
    with pytest.raises(ConfigError, match=r"max_lenght: no such setting; did you mean data.max_l"):
        select_settings(["max_lenght"])
    with pytest.raises(ConfigError, match="`vlm-sft config reference` lists all"):
        select_settings(["qqqq"])


def test_a_setting_of_the_data_commands_is_refused_with_the_option_that_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key in ("images.count", "coco", "sources.0.path"):
        with pytest.raises(ConfigError, match=rf"{key}: a setting of the data commands; .*--data"):
            config_command.main(["reference", key])
    with pytest.raises(ConfigError, match="did you mean data"):
        config_command.main(["reference", "max_lenght"])
    assert config_command.main(["reference", "--data", "images.count"]) == 0
    assert "images.count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "page"),
    [([], "docs/configuration.md"), (["--data"], "docs/instruction-data/configuration.md")],
)
def test_the_reference_page_is_what_the_command_prints(options: list[str], page: str) -> None:
    words = ["config", "reference", *options, "--format", "markdown"]
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sft", *words], capture_output=True, cwd=ROOT, check=True
    )
    assert done.stdout == (ROOT / page).read_bytes(), f"run: vlm-sft {' '.join(words)} > {page}"


def test_the_reference_of_the_data_commands_has_every_setting_with_a_meaning() -> None:
    schemas = {"data_tools.instruct": InstructConfig, "data_tools.mix": MixConfig,
               "data_tools.select": SelectConfig}  # fmt: skip
    settings = all_settings(schemas)
    assert [s.key for s in settings if not s.meaning.rstrip().endswith(".")] == []
    known = {setting.key for setting in settings if setting.command == "data_tools.instruct"}
    config = {"output_dir": "x", "coco": {"images": "x"}, "teacher": {"kind": "rules"}}
    names = flat(InstructConfig.model_validate(config))
    inside = ("requests.shares.", "verify.forms.", "guard.lists.")  # keys of mappings
    assert {key for key in names if not key.startswith(inside)} <= known
    assert {"verify.forms.NAME.turns", "teacher.prices.input"} <= known
    found = select_settings(["teacher.failures_allowed", "sources.0.path"], schemas)
    assert [(s.command, s.key) for s in found] == [
        ("data_tools.instruct", "teacher.failures_allowed"),
        ("data_tools.mix", "sources.N.path"),
    ]
    assert {s.command for s in select_settings(["seed"], schemas)} == set(schemas)
    lines = as_text(found[:1]).splitlines()
    assert lines[:2] == [
        "teacher.failures_allowed",
        "  file of: python -m data_tools.instruct",
    ]
    assert len(lines) == 5 and as_text(found[:1]).count(found[0].meaning.split(".")[0]) == 1
    with pytest.raises(ConfigError, match="`vlm-sft config reference --data` lists all"):
        select_settings(["qqqq"], schemas)


def test_the_json_schema_is_that_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(load_config(TINY).model_dump())


COMPLETE = """
source "$1"
compopt() {{ :; }}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_vlm_sft; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "vlm-sft.bash"
    words = [sys.executable, "-m", "vlm_sft", "completion", "bash"]
    path.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("vlm-sft st", ["stage1", "stage2"]),
        ("vlm-sft check --st", ["--strict"]),
        ("vlm-sft stage1 pyproj", ["pyproject.toml"]),
        ("vlm-sft chat confi", ["configs"]),
        ("vlm-sft stage1 x.yaml train.max_st", ["train.max_steps="]),
        ("vlm-sft stage2 --allow-change lora.al", ["lora.alpha"]),
        ("vlm-sft config sh", ["show"]),
        ("vlm-sft config reference lora.al", ["lora.alpha"]),
        ("vlm-sft data expl", ["explain"]),
        ("vlm-sft data build_coco --eval", ["--eval-share"]),
        ("vlm-sft data mix x.yaml cannot_tell_s", ["cannot_tell_share="]),
        ("vlm-sft data generate --sh", ["--shard"]),
        ("vlm-sft data run x.yaml teacher.mod", ["teacher.model="]),
        ("vlm-sft completion z", ["zsh"]),
    ],
)
def test_bash_completes(bash_script: Path, words: str, completed: list[str]) -> None:
    code = COMPLETE.format(words=words)
    done = subprocess.run(
        ["bash", "-c", code, "bash", str(bash_script)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split() == completed, done.stderr


def test_zsh_has_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef vlm-sft\n")
    for name, about in COMMANDS.items():
        assert re.search(rf"^ *{name}:'?{re.escape(about)}", printed, re.MULTILINE)


@pytest.mark.parametrize("word", ["VS332", "vs332", "332", "missing_column", "missing-column"])
def test_errors_shows_one_error(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["errors", word]) == 0
    code, meaning, remedy = capsys.readouterr().out.splitlines()
    assert code == "VS332 missing_column"
    assert meaning == CODES["missing_column"].meaning and remedy == CODES["missing_column"].remedy


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("VS999", "CODE VS999: no such error; the codes are VS001 to VS"),
        ("image_mising", "CODE image_mising: no such error; did you mean image_missing?"),
    ],
)
def test_an_unknown_error_is_one_sentence(word: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main(["errors", word])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--max-steps", "5"], "train.max_steps=5"),
        (["--training.max-steps=5"], "train.max_steps=5"),
        (["--num-train-epochs", "3"], "train.epochs=3"),
    ],
)
def test_a_setting_given_as_an_option_is_told_with_its_full_name(
    words: list[str], meant: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"key.path=value; did you mean {meant}?")):
        main(["stage1", TINY, *words])


def test_settings_of_data_commands_are_their_own() -> None:
    with pytest.raises(UserError, match=r"did you mean output_dir=x\?"):
        main(["data", "plan", "configs/instruct/rules.yaml", "--output-dir", "x"])


def test_examples_are_copied_once_and_train_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--examples"]) == 0
    assert load_config("configs/tiny/stage1.yaml").data.train[0].path in {
        str(path) for path in Path("configs").rglob("*.json")
    }
    with pytest.raises(UserError, match=r"--examples: .*configs exists"):
        main(["init", "--examples"])
    with pytest.raises(UserError, match=r"--gpu: --examples .* takes no other option"):
        main(["init", "--examples", "--gpu", "cpu"])
