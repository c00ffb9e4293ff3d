"""Fetch the bytes of a URL: only http(s), only public addresses or named hosts, bounded in size and time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from ernie_align.data.row import RowFault

MAX_BYTES = 32 << 20
MAX_SECONDS = 20.0  # from the first DNS look-up to the last byte, redirects included
MAX_REDIRECTS = 3
_CHUNK = 1 << 16


def fetch(
    url: str, *, hosts: bool | tuple[str, ...], max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS
) -> bytes:
    """Return the bytes of the URL, without using the proxies of the environment.

    hosts: True for every host with a public address, or the names of the allowed hosts, private ones included.
    Each redirect is checked like the URL itself. Raises RowFault.
    """
    deadline = time.monotonic() + max_seconds
    shown = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            shown = f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]  # a query may contain a key
            answer = _request(parts, hosts, max_bytes, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise _Refused(f"more than {MAX_REDIRECTS} redirects")
    except _Refused as refused:
        reason = str(refused)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        reason = f"took over {max_seconds:g} s" if late else f"{type(error).__name__}: {error}"[:200]
    raise RowFault(f"{shown}: {reason}", "download it and give its path", kind="a URL that gave no image")


class _Refused(Exception):
    """Reason why a URL is not fetched."""


def _request(url: SplitResult, hosts: bool | tuple[str, ...], max_bytes: int, deadline: float) -> bytes | str:
    """Return the body of the response, or the location that it redirects to."""
    if url.scheme not in ("http", "https") or not url.hostname:
        raise _Refused(f"{url.scheme}: is not supported")
    secure = url.scheme == "https"
    connected = _connect(url.hostname, url.port or (443 if secure else 80), hosts, deadline)
    # a server that sends a byte now and then keeps every single read short, so a timer closes the socket
    sockets = [connected]
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, (sockets,))
    timer.daemon = True
    timer.start()
    try:
        if secure:
            context = ssl.create_default_context()
            sockets[0] = context.wrap_socket(connected, server_hostname=url.hostname, do_handshake_on_connect=False)
            sockets[0].do_handshake()
        connection = http.client.HTTPConnection(url.hostname, url.port or (443 if secure else 80))
        connection.sock = sockets[0]
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        headers = {"Accept": "image/*", "User-Agent": "ernie-align", "Connection": "close"}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.getheader("location"):
            return response.getheader("location")
        if response.status != 200:
            raise _Refused(f"answered {response.status}")
        return _read_body(response, max_bytes, deadline)
    finally:
        timer.cancel()
        sockets[0].close()


def _read_body(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    length = response.getheader("content-length", "")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise _Refused(f"{int(length[:20]):,} bytes are over the limit of {max_bytes:,}")
    chunks, size = [], 0
    while chunk := response.read1(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _Refused(f"over {max_bytes:,} bytes")
    if time.monotonic() >= deadline:
        raise TimeoutError
    if length.isdigit() and size < int(length[:20]):
        raise _Refused(f"only {size:,} of {length} bytes arrived")
    return b"".join(chunks)


def _connect(host: str, port: int, hosts: bool | tuple[str, ...], deadline: float) -> socket.socket:
    """Connect to the very address that was checked, so that a second DNS answer cannot lead to another one."""
    if isinstance(hosts, tuple) and host not in {name.lower() for name in hosts}:
        raise _Refused("data.allow_urls does not name this host")
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in addresses:
        if hosts is True and not ipaddress.ip_address(address[0].split("%")[0]).is_global:
            raise _Refused("the address is not public; name the host under data.allow_urls if you trust the rows")
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(seconds)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if address == addresses[-1][-1]:
                raise
    raise _Refused("no such host")


def _shut_down(sockets: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # closed already
        sockets[0].shutdown(socket.SHUT_RDWR)
