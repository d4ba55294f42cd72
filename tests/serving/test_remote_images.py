"""Images from other hosts: only from allowed ones, and never from private addresses."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from vlm_sft.serving import remote_images
from vlm_sft.serving.remote_images import FetchError, fetch, is_public

CONTENT = b"the bytes of an image"


class Host(BaseHTTPRequestHandler):
    """Answers by path; `/redirect?URL` redirects, `/drip` sends a byte now and then."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        path, _, query = self.path.partition("?")
        if path == "/redirect":
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
            return
        self.send_response(404 if path == "/none" else 200)
        size = len(CONTENT) + 5 if path == "/short" else len(CONTENT)
        if path != "/stream":
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if path == "/drip":
            for byte in CONTENT:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
        self.wfile.write(CONTENT)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback counts as public."""
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")


def get(url: str, *allowed: str, seconds: float = 5, max_bytes: int = 1000) -> bytes:
    return fetch(url, allowed, max_bytes=max_bytes, deadline=time.monotonic() + seconds)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
     "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1",
     "fec0::1", "ff0e::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "64:ff9b::a00:1", "2002:a00:1::",
     "2001:0:a00:1::", "2001:db8::1"],
)  # fmt: skip
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_host_on_loopback_is_refused_even_if_it_is_allowed(host: str) -> None:
    Host.seen.clear()
    for name in (host, host.replace("127.0.0.1", "localhost")):
        with pytest.raises(FetchError, match="an address in a private network"):
            get(f"http://{name}/a.png", name, "*")
    assert Host.seen == []


@pytest.mark.parametrize(
    ("url", "allowed", "message"),
    [
        ("http://evil.org/", ["example.org"], "not in this server's list"),
        ("http://notexample.org/", ["*.example.org"], "not in this server's list"),
        ("http://example.org.evil.org/", ["example.org"], "not in this server's list"),
        ("http://example.org:22/", ["example.org"], "not in this server's list"),
        ("http://example.org@evil.org/", ["example.org"], "user name"),
        ("http://user:pass@example.org/", ["example.org"], "user name"),
        ("ftp://example.org/", ["example.org"], "expected an http or https"),
        ("file:///etc/passwd", ["*"], "expected an http or https"),
        ("http:///path", ["*"], "expected an http or https"),
        ("http://example.org/a b", ["*"], "expected an http or https"),
        ("http://example.org/\r\nX: y", ["*"], "expected an http or https"),
        ("http://[::1", ["*"], "malformed"),
        ("http://exämple.org/", ["*"], "malformed"),
        ("http://example.org:99999/", ["*"], "malformed"),
    ],
)
def test_addresses_that_are_not_allowed_are_refused_without_a_connection(
    monkeypatch: pytest.MonkeyPatch, url: str, allowed: list[str], message: str
) -> None:
    def connect(*_: Any) -> Any:
        raise AssertionError("connected")

    monkeypatch.setattr(remote_images, "_connect", connect)
    with pytest.raises(FetchError, match=message):
        get(url, *allowed)


def test_a_name_with_a_private_address_among_public_ones_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(FetchError, match="an address in a private network"):
        get("http://example.org/", "*.org")


@pytest.mark.usefixtures("reachable")
def test_allowed_hosts_are_fetched(host: str) -> None:
    assert get(f"http://{host}/a.png?x=1", host) == CONTENT
    assert get(f"http://{host}/stream", host) == CONTENT
    assert get(f"http://{host}/redirect?/a.png", host) == CONTENT


@pytest.mark.usefixtures("reachable")
def test_redirects_are_checked_and_counted(host: str) -> None:
    with pytest.raises(FetchError, match="not in this server's list"):
        get(f"http://{host}/redirect?http://evil.org/", host)
    with pytest.raises(FetchError, match="expected an http or https"):
        get(f"http://{host}/redirect?file:///etc/passwd", host)
    with pytest.raises(FetchError, match="more than 3 redirects"):
        get(f"http://{host}/redirect?/redirect?/redirect?/redirect?/redirect?/a", host)


@pytest.mark.usefixtures("reachable")
def test_missing_large_short_and_slow_contents_are_refused(host: str) -> None:
    with pytest.raises(FetchError, match="status 404"):
        get(f"http://{host}/none", host)
    with pytest.raises(FetchError, match="more than 10 bytes"):
        get(f"http://{host}/a", host, max_bytes=10)
    with pytest.raises(FetchError, match="IncompleteRead"):
        get(f"http://{host}/short", host, seconds=2)
    begun = time.monotonic()
    with pytest.raises(FetchError, match="took too long"):
        get(f"http://{host}/drip", host, seconds=0.5)
    assert time.monotonic() - begun < 3


@pytest.mark.usefixtures("reachable")
def test_a_host_without_a_valid_certificate_is_refused(host: str) -> None:
    with pytest.raises(FetchError, match=ssl.SSLError.__name__ + "|failed"):
        get(f"https://{host}/", host)
