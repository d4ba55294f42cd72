"""Commands log on stderr: from rank 0, with control characters escaped."""

import logging
import sys

import pytest

from vlm_sft.utils.logs import ALL_RANKS, configure_logging, reset_logging

logger = logging.getLogger("vlm_sft.somewhere")


def test_a_command_prints_each_message_once_and_a_level_above_info_in_front(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    configure_logging()
    logger.info("training")
    logger.warning("one tracker failed")
    logger.error("cannot save")
    logger.debug("details")
    assert capsys.readouterr() == (
        "",
        "training\nwarning: one tracker failed\nerror: cannot save\n",
    )


def test_control_characters_of_untrusted_text_are_escaped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    logger.info("%s", "a\x1b[2Jb\u202ec")
    assert capsys.readouterr().err == "a\u241b[2Jb\\u202ec\n"


def test_other_ranks_print_errors_and_marked_messages_with_their_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    configure_logging()
    logger.info("training")
    logger.warning("one tracker failed")
    logger.info("SIGTERM received", extra=ALL_RANKS)
    logger.error("cannot save")
    assert capsys.readouterr().err == (
        "rank 1 of 2: SIGTERM received\nrank 1 of 2: error: cannot save\n"
    )


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    configure_logging()
    monkeypatch.setattr(sys, "stderr", Gone())
    logger.info("training")


def test_a_library_user_configures_logging_as_usual(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configure_logging()
    reset_logging()
    caplog.set_level(logging.INFO)
    logger.info("training")
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["training"]
