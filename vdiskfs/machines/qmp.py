"""A client of QEMU's machine protocol (QMP) on a Unix socket, as small as it is needed here.

Lines of JSON: a greeting, then commands and their answers one by one, with events in between.
One connection is served at a time, so none is kept. What comes in is bounded: the guest may
have taken QEMU over.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from vdiskfs.errors import LocalError
from vdiskfs.registry import address_of

LINE_LIMIT = 1 << 20
ANSWER_S = 10.0
_EVENTS_MAX = 1000
_LOOK_S = 0.02


class Lines:
    """Lines that come in on a stream, each at most ``LINE_LIMIT`` bytes."""

    def __init__(self, stream: trio.SocketStream, end: bytes = b"\n") -> None:
        self._stream, self._end = stream, end
        self._buffer = bytearray()

    async def next(self) -> bytes:
        """Return the next line without its end.

        Raises:
            LocalError: the other side closed, or sends what is no line.
        """
        while (at := self._buffer.find(self._end)) < 0:
            if len(self._buffer) > LINE_LIMIT:
                raise LocalError("it sends a line without an end")
            try:
                data = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise LocalError("it closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:at])
        del self._buffer[: at + len(self._end)]
        return line


async def connect(path: Path) -> trio.SocketStream:
    """Connect to a Unix socket, however deep it lies; wait while too many others do.

    Raises:
        LocalError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        while not _is_connected(sock, path):  # noqa: ASYNC110 (nobody tells when)
            await trio.sleep(_LOOK_S)
    except OSError as error:
        sock.close()
        raise LocalError(f"{path}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def _is_connected(sock: socket.socket, path: Path) -> bool:
    """Try once; False: the queue of the listener is full (unix(7): EAGAIN, and nothing waits)."""
    with address_of(path) as address:
        try:
            sock.connect(address)
        except BlockingIOError:
            return False
    return True


class Qmp:
    """One connection, greeted."""

    def __init__(self, stream: trio.SocketStream, limit_s: float) -> None:
        self._stream = stream
        self._limit_s = limit_s
        self._lines = Lines(stream)
        self._events: list[dict[str, Any]] = []

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns.

        Raises:
            LocalError: QEMU refuses it, is gone, or says nothing: it may hang, and greet all the
                same.
        """
        with trio.move_on_after(self._limit_s):
            return await self._execute(command, arguments)
        raise LocalError(f"{command}: QEMU does not answer within {self._limit_s:g} s")

    async def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        try:
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        except trio.BrokenResourceError:
            raise LocalError("it closed the connection") from None
        while True:
            message = await self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                error = message["error"]
                text = error.get("desc") if isinstance(error, dict) else error
                raise LocalError(f"{command}: {str(text)[:300]}")

    async def greet(self) -> None:
        """Take the greeting and leave the negotiation of capabilities: there are none."""
        message = await self._message()
        while "event" in message:  # of before the connection
            message = await self._message()
        if "QMP" not in message:
            raise LocalError("it does not greet as QEMU does")
        self._events.clear()
        await self.execute("qmp_capabilities")

    async def wait_event(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first event that came since the connection and is wanted."""
        while True:
            for event in self._events:
                if wanted(event):
                    return event
            self._events.clear()
            await self._message()

    async def _message(self) -> dict[str, Any]:
        """Return the next message; one that is an event is kept, too."""
        line = await self._lines.next()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise LocalError("it sends what is no message of QMP")
        if "event" in message:
            self._events = [*self._events[1 - _EVENTS_MAX :], message]
        return message


@asynccontextmanager
async def connected(path: Path, *, what: str, limit_s: float | None = None) -> AsyncIterator[Qmp]:
    """Have a greeted connection over the block.

    Args:
        path: QEMU's socket.
        what: names the machine in errors.
        limit_s: for connection and greeting, and for each answer; another client may be served
            before. None: `ANSWER_S`.

    Raises:
        LocalError: QEMU does not answer, or not as it should. Also what the block raises.
    """
    limit_s = ANSWER_S if limit_s is None else limit_s
    try:
        with trio.move_on_after(limit_s) as scope:
            stream = await connect(path)
        if scope.cancelled_caught:
            raise LocalError(f"QEMU takes no connection within {limit_s:g} s")
        async with stream:
            qmp = Qmp(stream, limit_s)
            with trio.move_on_after(limit_s) as scope:
                await qmp.greet()
            if scope.cancelled_caught:
                raise LocalError(f"QEMU does not answer within {limit_s:g} s")
            yield qmp
    except LocalError as error:
        raise LocalError(f"{what}: {error.message}", hint=error.hint) from None
