"""A server in the test process, and what its clients send."""

import base64
import io
import threading
import time
from collections.abc import Sequence
from typing import Any

import openai
from PIL import Image

from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.serving.app import ServedModel, make_app
from vlm_sft.serving.engine import Engine
from vlm_sft.serving.listener import Server, make_server
from vlm_sft.serving.protocol import Limits

KEY = "a-secret-key"


class Served:
    """A server in this process.

    Attributes:
        url: Its address.
        engine: The engine of its first model.
    """

    def __init__(
        self,
        loaded: LoadedModel | Sequence[LoadedModel],
        limits: Limits,
        *,
        key: str | None = KEY,
        page: bool = False,
        local_only: bool = False,
        **engine: int,
    ) -> None:
        found = [loaded] if isinstance(loaded, LoadedModel) else loaded
        models = [
            ServedModel(name, each, Engine(each, **engine))
            for name, each in zip(("tiny", "other"), found, strict=False)
        ]
        self.engine = models[0].engine
        self.clients: list[Any] = []
        app = make_app(models, limits, key, local_only=local_only, with_page=page)
        self.server: Server = make_server(app, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> Any:
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join()


def png(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def uri(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def ask(client: Any, *content: Any, **options: Any) -> Any:
    parts = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    options = {"model": "tiny", "max_tokens": 24, **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
