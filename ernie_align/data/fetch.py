"""The bytes behind a URL: over http and https alone, from public addresses or named hosts, bounded in size and time."""

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
MAX_SECONDS = 20.0  # from the first look-up to the last byte, redirects included
MAX_REDIRECTS = 3
_PIECE = 1 << 16


def fetch(
    url: str, *, hosts: bool | tuple[str, ...], max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS
) -> bytes:
    """What the URL gives. Proxies of the environment are not asked.

    hosts: True for every host with a public address, or the names of those that may be asked, private ones included.
    Each redirect is judged like the URL itself. Raises RowFault.
    """
    deadline = time.monotonic() + max_seconds
    shown = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            shown = f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]  # a query may hold a key
            answer = _ask(parts, hosts, max_bytes, deadline)
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
    """Why a URL is not fetched."""


def _ask(url: SplitResult, hosts: bool | tuple[str, ...], max_bytes: int, deadline: float) -> bytes | str:
    """The body, or where it is said to be instead."""
    if url.scheme not in ("http", "https") or not url.hostname:
        raise _Refused(f"{url.scheme}: is not read")
    secure = url.scheme == "https"
    connected = _connect(url.hostname, url.port or (443 if secure else 80), hosts, deadline)
    # a server that sends a byte now and then keeps every single read short: the whole is cut off from outside
    held = [connected]
    cut_off = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, (held,))
    cut_off.daemon = True
    cut_off.start()
    try:
        if secure:
            context = ssl.create_default_context()
            held[0] = context.wrap_socket(connected, server_hostname=url.hostname, do_handshake_on_connect=False)
            held[0].do_handshake()
        asked = http.client.HTTPConnection(url.hostname, url.port or (443 if secure else 80))
        asked.sock = held[0]
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        asked.request("GET", path, headers={"Accept": "image/*", "User-Agent": "ernie-align", "Connection": "close"})
        answer = asked.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.getheader("location"):
            return answer.getheader("location")
        if answer.status != 200:
            raise _Refused(f"answered {answer.status}")
        return _body(answer, max_bytes, deadline)
    finally:
        cut_off.cancel()
        held[0].close()


def _body(answer: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    told = answer.getheader("content-length", "")
    if told.isdigit() and int(told[:20]) > max_bytes:
        raise _Refused(f"{int(told[:20]):,} bytes are over {max_bytes:,}")
    pieces, size = [], 0
    while piece := answer.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise _Refused(f"over {max_bytes:,} bytes")
    if time.monotonic() >= deadline:
        raise TimeoutError
    if told.isdigit() and size < int(told[:20]):
        raise _Refused(f"only {size:,} of {told} bytes came")
    return b"".join(pieces)


def _connect(host: str, port: int, hosts: bool | tuple[str, ...], deadline: float) -> socket.socket:
    """To an address that was judged: a name that leads elsewhere the next moment leads nowhere here."""
    if isinstance(hosts, tuple) and host not in {name.lower() for name in hosts}:
        raise _Refused("a host that data.allow_urls does not name")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        if hosts is True and not ipaddress.ip_address(address[0].split("%")[0]).is_global:
            raise _Refused("an address that is not public; name the host under data.allow_urls if you trust the rows")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(left)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if address == found[-1][-1]:
                raise
    raise _Refused("no such host")


def _shut(held: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # closed already
        held[0].shutdown(socket.SHUT_RDWR)
