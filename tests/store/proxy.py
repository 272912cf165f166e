"""A proxy in front of Azurite that makes faults, and counts the faults it made.

It speaks HTTP/1.1 in threads of its own, so trio tests and plain ones can use it. Shared
Key signatures pass, as they do not cover the host.

    with FaultProxy(azurite.port) as proxy:
        fault = proxy.add(Fault("drop-reply", method="PUT"))
        ...
        assert fault.fired == 1
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self

Kind = Literal[
    "answer",  # not applied; `status` with `headers`
    "reset",  # not applied; the connection is reset
    "half-upload",  # half of the body is passed on, then both connections end
    "drop-reply",  # applied; the connection is reset instead of the answer
    "truncate",  # half of the answer's body, then the end
    "etag",  # applied; the answer's ETag is another one
    "flip",  # one bit of the answer's body is wrong
    "stall",  # the answer's headers, and then nothing
    "drip",  # the answer's body, a byte at a time
    "lie",  # the answer's body, which is said to be shorter, and ends there
    "deaf",  # not applied; the request's body is never taken
    "sip",  # applied, once its body was taken: a few bytes at a time, `bytes_per_s`
]
_DRIP_S = 0.05
_SIP_BYTES = 512


@dataclass
class Fault:
    """What happens to the next ``count`` requests of a method whose path matches."""

    kind: Kind
    method: str
    path: str = ""
    count: int = 1
    skip: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    bytes_per_s: int = 1 << 20
    fired: int = 0


@dataclass
class Worm:
    """A container in which what was created is neither overwritten nor deleted.

    ``status`` and ``code`` are the answers of an immutability policy (409,
    BlobImmutableDueToPolicy), or of a credential that may only create (403,
    AuthorizationPermissionMismatch). Off once ``ended``.
    """

    container: str
    status: int = 409
    code: str = "BlobImmutableDueToPolicy"
    ended: bool = False
    made: set[str] = field(default_factory=set)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def refuses(self, method: str, path: str) -> bool:
        """Say whether a request is one that changes what is there; count it."""
        path = path.partition("?")[0]
        if self.ended or f"/{self.container}/" not in path:
            return False
        if path in self.made and method in ("PUT", "DELETE"):
            self.refused.append((method, path))
            return True
        return False

    def note(self, method: str, path: str, status: int) -> None:
        """An object was created."""
        path = path.partition("?")[0]
        if method == "PUT" and status == 201 and f"/{self.container}/" in path:
            self.made.add(path)


class FaultProxy:
    """Listens on ``port`` of the loopback interface while it is entered."""

    def __init__(self, target_port: int, worm: Worm | None = None) -> None:
        self.target_port = target_port
        self.worm = worm
        self.closing = threading.Event()
        self.seen: list[str] = []
        self.connections = 0
        self.taken_bytes = self.given_bytes = 0
        """Bodies that went to the store, and came from it."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = _Server(self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="fault proxy"
        )

    def add(self, fault: Fault) -> Fault:
        """Arm a fault."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def count(self, taken: int, given: int) -> None:
        """Count the bodies of one request."""
        with self._lock:
            self.taken_bytes += taken
            self.given_bytes += given

    def clear(self) -> None:
        """Disarm all faults: the outage is over."""
        with self._lock:
            self._faults.clear()

    def hang_up(self) -> None:
        """End every connection, stalled ones too; new ones are served without faults."""
        self.clear()
        self.closing.set()
        with self._lock:
            for client in self._sockets:
                with contextlib.suppress(OSError):  # the other end was faster
                    client.shutdown(socket.SHUT_RDWR)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that this request meets, and count it."""
        with self._lock:
            self.seen.append(method)
            for fault in self._faults:
                if fault.method not in (method, "*") or not re.search(fault.path, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.fired < fault.count:
                    fault.fired += 1
                    return fault
        return None

    def track(self, client: socket.socket, *, alive: bool) -> None:
        """Know the open connections, to end them."""
        with self._lock:
            self.connections += alive
            (self._sockets.add if alive else self._sockets.discard)(client)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self.hang_up()
        self._server.server_close()  # joins the threads of the connections
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        """Take segments as a network's: those of the loopback interface are 64 KiB."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what faults are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.proxy.track(self.connection, alive=True)
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.target_port, timeout=30)

    def finish(self) -> None:
        self.upstream.close()
        self.proxy.track(self.connection, alive=False)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _serve(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        kind = fault.kind if fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "deaf":
            self.proxy.closing.wait(30)
            self.close_connection = True
            return
        body = self._sip(length, fault) if fault and kind == "sip" else self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True  # whoever sent it has given up
            return
        worm = self.proxy.worm
        if worm is not None and worm.refuses(self.command, self.path):
            self._send(worm.status, [("x-ms-error-code", worm.code)], b"")
        elif fault and kind == "answer":
            self._send(fault.status, list(fault.headers.items()), b"")
        elif kind == "reset":
            self._reset()
        elif kind == "half-upload":
            self._forward_half(body)
            self._reset()
        else:
            status, headers, data = self._forward(body)
            if worm is not None:
                worm.note(self.command, self.path, status)
            self._reply(kind, status, headers, data)

    do_GET = do_HEAD = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _sip(self, length: int, fault: Fault) -> bytes:
        # Little is taken ahead.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 10)
        self.upstream.close()  # it would not be kept for so long
        taken, began = bytearray(), time.monotonic()
        while len(taken) < length:
            ahead_s = len(taken) / fault.bytes_per_s - (time.monotonic() - began)
            if ahead_s > 0 and self.proxy.closing.wait(ahead_s):
                break
            piece = self.rfile.read(min(_SIP_BYTES, length - len(taken)))
            if not piece:
                break
            taken += piece
        return bytes(taken)

    def _start(self) -> None:
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self.upstream.putheader(name, value)
        self.upstream.endheaders()

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self._start()
        if body:
            self.upstream.send(body)
        answer = self.upstream.getresponse()
        data = answer.read()
        self.proxy.count(len(body), len(data))
        return answer.status, answer.getheaders(), data

    def _forward_half(self, body: bytes) -> None:
        self._start()
        self.upstream.send(body[: len(body) // 2])
        self.upstream.close()

    def _reply(
        self, kind: Kind | None, status: int, headers: list[tuple[str, str]], data: bytes
    ) -> None:
        if kind == "drop-reply":
            self._reset()
            return
        if kind == "etag":
            headers = [(k, '"0x8DEADBEEF000001"' if k.lower() == "etag" else v) for k, v in headers]
        if kind == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if kind in ("truncate", "stall", "drip"):
            sent = {"truncate": len(data) // 2, "stall": 0, "drip": 0}[kind]
            self._send(status, headers, data[:sent], length=len(data))
            self.wfile.flush()
            if kind == "stall":
                self.proxy.closing.wait(30)
            if kind == "drip":
                self._drip(data)
            self.close_connection = True
            return
        self._send(status, headers, data[: len(data) // 2] if kind == "lie" else data)

    def _drip(self, data: bytes) -> None:
        for index in range(len(data)):
            if self.proxy.closing.wait(_DRIP_S):
                return
            self.wfile.write(data[index : index + 1])

    def _send(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            # For HEAD the length is the object's.
            framing = name.lower() in ("transfer-encoding", "connection", "keep-alive")
            if not framing and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        """End the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.proxy.track(self.connection, alive=False)
        self.connection.close()
        self.close_connection = True
