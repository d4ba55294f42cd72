"""Names that are no folder, where the hub cannot be reached."""

import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.utils.hub import use_cache_if_hub_unreachable


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_cache_if_hub_unreachable.cache_clear()
    yield
    use_cache_if_hub_unreachable.cache_clear()


def test_a_hub_that_cannot_be_reached_is_tried_once(
    no_hub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"--tokenizer: .*no such folder"):
        load_tokenizer(LanguageModelConfig(name="nobody/nothing"), "--tokenizer")
    assert time.monotonic() - start < 5
    err = capsys.readouterr().err
    assert err.count("cannot be reached") == 1 and "Retrying" not in err


def test_an_offline_hub_is_not_asked(
    no_hub: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.language_model\.name: "):
        load_tokenizer(LanguageModelConfig(name="nobody/nothing"))
    assert "cannot be reached" not in capsys.readouterr().err
