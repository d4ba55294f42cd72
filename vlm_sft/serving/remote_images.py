"""Fetch images from other hosts without reaching hosts inside the server's network.

A request could otherwise name an address that only the server reaches (server-side request
forgery). The host must be in the allow-list, all its addresses must be public, and the connection
goes to the address that was checked, so a second answer of the name server changes nothing. The
same holds for every redirect. Proxies of the environment are not used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

FETCH_SECONDS: Final = 10.0
"""All images of a request have to arrive within this time."""
MAX_REDIRECTS: Final = 3
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_CHUNK: Final = 65536


class FetchError(Exception):
    """An image that is not fetched; the message says why, without the address."""


def fetch(url: str, allowed: Sequence[str], *, max_bytes: int, deadline: float) -> bytes:
    """Return the content of an `http:` or `https:` address.

    Args:
        url: The address.
        allowed: Hosts that may be asked: `example.org`, `*.example.org`, or with a port.
        max_bytes: Largest content.
        deadline: Value of `time.monotonic` at which the fetch fails.

    Raises:
        FetchError: The host is not allowed or not public, or it did not send the content.
    """
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url, allowed)
        try:
            found = _get(parts, max_bytes, deadline)
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline
            reason = "took too long" if late else f"failed ({type(error).__name__})"
            raise FetchError(f"the download {reason}") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found[0])
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Return whether an IP address is reachable for everybody, and not one of a private network."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not found.is_multicast
    # 2000::/3 is all of IPv6 that is assigned to hosts. 6to4 and Teredo contain IPv4 addresses.
    is_unicast = found in ipaddress.ip_network("2000::/3")
    return is_unicast and found.is_global and found.sixtofour is None and found.teredo is None


def _split(url: str, allowed: Sequence[str]) -> SplitResult:
    """Parse an address, and check its host against the allow-list."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
        host.encode("ascii")
    except ValueError:
        raise FetchError("the address is malformed") from None
    if parts.scheme not in _PORTS or not host or any(ord(char) <= 32 for char in url):
        raise FetchError("expected an http or https address")
    if parts.username is not None:
        raise FetchError("the address contains a user name")
    is_default = port in (None, _PORTS[parts.scheme])
    names = [f"{host}:{port or _PORTS[parts.scheme]}", *([host] if is_default else [])]
    for entry in allowed:
        pattern = entry.lower()
        suffix = pattern.removeprefix("*")
        if pattern in names or (suffix != pattern and any(name.endswith(suffix) for name in names)):
            return parts
    raise FetchError("the host is not in this server's list of allowed hosts")


def _get(parts: SplitResult, max_bytes: int, deadline: float) -> bytes | list[str]:
    """Return the content, or the target of a redirect in a list."""
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    sock = _connect(host, port, deadline)
    if parts.scheme == "https":
        sock = ssl.create_default_context().wrap_socket(
            sock, server_hostname=host, do_handshake_on_connect=False
        )
    # A timeout of the socket begins anew with every byte; this ends the connection.
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _end, [sock])
    timer.daemon = True
    timer.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Host": parts.netloc, "User-Agent": "vlm_sft", "Accept": "image/*",
            "Connection": "close",
        }  # fmt: skip
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            if response.status in _REDIRECTS and (target := response.headers.get("Location")):
                return [target]
            if response.status != 200:
                raise FetchError(f"the host answered with status {response.status}")
            content = bytearray()
            while part := response.read1(_CHUNK):
                content += part
                if len(content) > max_bytes:
                    raise FetchError(f"more than {max_bytes:,} bytes")
            if time.monotonic() >= deadline or response.length:
                raise http.client.IncompleteRead(bytes(content))
            return bytes(content)
    finally:
        timer.cancel()
        sock.close()


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to a host all of whose addresses are public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise FetchError("the host has an address in a private network")
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.create_connection((addresses[0], port), timeout=left)
    sock.settimeout(FETCH_SECONDS)
    return sock


def _end(sock: socket.socket) -> None:
    """End a connection whose time is over; a read that waits returns at once."""
    with suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)
