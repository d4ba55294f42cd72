"""A hub on loopback: what pushing and reading data sets need, and faults on request."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_loopbackOnlyToken123"


@dataclass
class Hub:
    """What the hub holds, and how it answers.

    `faults` gives a status for each path that contains its key. `datasets` has the files of each
    commit of each data set, `heads` the commit of each branch (`NAME@BRANCH`).
    """

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append((method, path))
        for part, status in self.faults.items():
            if part in path:
                return status, {"error": f"refused: {TOKEN}"}
        if path.startswith(("/api/datasets/", "/datasets/")):
            return self._dataset(path.removeprefix("/api").split("/")[2:], body)
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            tree = json.loads(body)
            name = f"{tree['organization'] or 'me'}/{tree['name']}"
            self.repos.setdefault(name, tree.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/branch/" in path:
            self.branches.append(path.rpartition("/")[2])
            return 200, {}
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.files.items()
            ]
            return 200, rows
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            return 200, {"files": modes}
        if path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/blob/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if "/commit/" in path:
            return 200, self._commit(body)
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.repos:
                return 404, {"error": "no such repository"}
            return 200, {"id": name, "private": self.repos[name], "siblings": [], "sha": "0" * 40}
        return 404, {"error": f"the stub does not know {path}"}

    def _dataset(self, parts: list[str], body: bytes) -> tuple[int, Any]:
        name, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
        revision = unquote(parts[3]) if len(parts) > 3 else "main"
        commit = self.heads.get(f"{name}@{revision}", revision)
        if name not in self.datasets:
            return 404, {"error": "RepoNotFound"}
        if commit not in self.datasets[name]:
            return 404, {"error": "RevisionNotFound"}
        files = self.datasets[name][commit]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name, "sha": commit, "private": False, "siblings": siblings}
        if action == "resolve":
            if name in self.gated:
                return 403, {"error": "GatedRepo"}
            path = unquote("/".join(parts[4:]))
            return (200, files[path]) if path in files else (404, {"error": "EntryNotFound"})
        asked = parse_qs(body.decode())
        folders = {str(f) for p in files for f in PurePosixPath(p).parents if str(f) != "."}
        below = unquote("/".join(parts[4:]))
        found = [p for p in [*files, *folders] if p.startswith(f"{below}/" if below else "")]
        if asked.get("recursive", ["False"])[0].lower() != "true":
            found = [p for p in found if "/" not in p.removeprefix(f"{below}/")]
        if action == "paths-info":
            found = [p for p in [*files, *folders] if p in asked.get("paths", [])]
        if action == "tree" and not found:
            return 404, {"error": "EntryNotFound"}
        return 200, [
            {"type": "file", "path": p, "size": len(files[p]), "oid": _oid(files[p])}
            if p in files
            else {"type": "directory", "path": p, "oid": _oid(p.encode())}
            for p in sorted(found)
        ]

    def _commit(self, body: bytes) -> dict[str, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            else:
                continue
            names.append(value["path"])
        self.commits.append(names)
        return {
            "commitOid": "c" * 40,
            "commitUrl": f"{self.url}/{next(iter(self.repos))}/commit/{'c' * 40}",
        }


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            path, _, query = self.path.partition("?")
            status, tree = hub.answer(self.command, path, self._body() or query.encode())
            data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
            headers = {"Content-Type": "application/json"}
            if isinstance(tree, bytes):
                headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.path.split("/")[5]}
                if (asked := self.headers.get("Range", "")).startswith("bytes="):
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    end = min(int(last or len(data)), len(data) - 1)
                    headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                    status, data = 206, data[int(first) : end + 1]
            elif status >= 400 and self.path.startswith(("/api/datasets", "/datasets")):
                headers["X-Error-Code"] = tree["error"]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
