"""Answer chat requests with llama.cpp, and save the log-probabilities of the first token.

    python vlm_sft/export/gguf/run_llama_cpp.py MODEL.gguf MMPROJ.gguf REQUESTS.json OUT

This is a stand-alone program that does not import vlm_sft and needs only `xllamacpp`. An export
runs it in a new process, because llama.cpp ends a process when it meets a file that it cannot use.

REQUESTS has `messages`, a list of chats with images as data URIs; `scored`, how many of them are
answered; `token`, an ordinary token; and `context`, the longest prompt. OUT.f32 receives the
natural log-probabilities of every token, float32 [scored, vocabulary]; OUT.json the version of the
runtime and, for each chat, the ids of the prompt, in pieces around the images.
"""

import json
import os
import re
import sys
import urllib.request
from array import array
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARKER = re.compile(r"<__media[^<>]*__>")
"""What llama.cpp puts into the prompt in place of an image."""


def main(argv: Sequence[str]) -> int:
    """Answer all requests, save the results; return the exit code."""
    model, mmproj, requests, out = argv
    asked = json.loads(Path(requests).read_text())
    server, address = start(model, mmproj, asked["context"])
    size = vocabulary_size(address)
    rows = array("f")
    prompts = []
    for number, messages in enumerate(asked["messages"]):
        if number < asked["scored"]:
            rows.extend(first_token(server, messages, size, asked["token"]))
        prompts.append(prompt_pieces(address, messages))
        print(json.dumps({"done": number + 1}), flush=True)
    with open(f"{out}.f32", "wb") as file:
        rows.tofile(file)
    found = {"version": version("xllamacpp"), "vocabulary": size, "prompts": prompts}
    Path(f"{out}.json").write_text(json.dumps(found))
    return 0


def start(model: str, mmproj: str, context: int) -> tuple[Any, str]:
    """Return a server on the CPU and its address on this machine."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, mmproj
    params.mmproj_use_gpu, params.n_gpu_layers = False, 0
    params.n_parallel, params.n_ctx, params.warmup = 1, context, False
    params.cache_prompt = False
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    return server, server.listening_address


def first_token(server: Any, messages: Any, size: int, token: int) -> list[float]:
    """Return the log-probabilities `[vocabulary]` of the first token of the answer.

    The answer is made to be `token`, which changes no reported value: for a token that ends the
    answer llama.cpp reports nothing.
    """
    reply = server.handle_chat_completions(
        {
            "messages": messages,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": size,
            "logit_bias": [[token, 1000.0]],
        }
    )
    reply = json.loads(reply) if isinstance(reply, str) else reply
    if "choices" not in reply:
        raise RuntimeError(json.dumps(reply)[:300])
    row = [0.0] * size
    found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    if len(found) != size:
        raise RuntimeError(f"llama.cpp returned {len(found)} of {size} log-probabilities")
    for one in found:
        row[one["id"]] = one["logprob"]
    return row


def prompt_pieces(address: str, messages: Any) -> list[list[int]]:
    """Return the ids of the text before, between and after the images of a prompt."""
    text = post(address, "/apply-template", {"messages": messages})["prompt"]
    return [
        post(
            address,
            "/tokenize",
            {"content": piece, "add_special": number == 0, "parse_special": True},
        )["tokens"]
        for number, piece in enumerate(MARKER.split(text))
    ]


def vocabulary_size(address: str) -> int:
    """Return the number of tokens of the loaded model."""
    with urllib.request.urlopen(f"{address}/v1/models") as reply:
        return int(json.load(reply)["data"][0]["meta"]["n_vocab"])


def post(address: str, path: str, body: Any) -> Any:
    """Return the JSON answer of the server on this machine."""
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
