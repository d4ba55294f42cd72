"""vLLM answers from an exported folder as this toolkit does; needs vLLM (`pytest -m vllm`)."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint

openai = pytest.importorskip("openai")
pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.serving.served import ask, png, text, uri  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_vllm_gives_the_same_answers(full_run: Path, tmp_path: Path) -> None:
    assert export([str(full_run / "final"), str(tmp_path / "tiny"), "--to", "hf"]) == 0
    loaded = load_checkpoint(full_run / "final", device="cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "tiny",
         "--port", str(port), "--dtype", "float32", "--limit-mm-per-prompt", '{"image": 2}'],
        cwd=tmp_path,
    )  # fmt: skip
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, "vLLM has ended"
                time.sleep(1)
        for prompt, images in (
            ("What is it?", []),
            ("What is it?", [png("red")]),
            ("Same color?", [png("red"), png("blue")]),
        ):
            found = ask(client, *map(uri, images), text(prompt), temperature=0)
            expected = loaded.generate(prompt, images, max_new_tokens=24)
            assert found.choices[0].message.content.strip() == expected
    finally:
        client.close()
        server.terminate()
        server.wait(60)
