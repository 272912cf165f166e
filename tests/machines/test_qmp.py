"""qmp and agent: small clients of peers that a guest may have taken over."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from vdiskfs.errors import LocalError
from vdiskfs.machines import agent, qmp
from vdiskfs.machines.qmp import connected
from vdiskfs.registry import address_of

Peer = Callable[[trio.SocketStream, qmp.Lines], Awaitable[None]]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
DONE = b'{"return": {}}\r\n'


@asynccontextmanager
async def serving(tmp_path: Path, peer: Peer) -> AsyncIterator[Path]:
    """Have a peer on a socket whose path is longer than an address has room for."""
    path = tmp_path / ("x" * 100) / "qmp.sock"
    path.parent.mkdir()
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with address_of(path) as address:
        await listener.bind(address)
    listener.listen()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(30):
                try:
                    await peer(stream, qmp.Lines(stream))
                except (LocalError, trio.BrokenResourceError):
                    return  # the client has gone

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield path
        nursery.cancel_scope.cancel()


async def test_commands_answers_and_events_go_their_ways(tmp_path: Path) -> None:
    """Events between a command and its answer are kept; a refusal is an error that says why."""

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await stream.send_all(b'{"event": "STOP"}\r\n' + GREETING)  # it was on its way
        assert json.loads(await lines.next()) == {"execute": "qmp_capabilities"}
        await stream.send_all(DONE)
        request = json.loads(await lines.next())
        assert request == {"execute": "query-block", "arguments": {"node": "a"}}
        await stream.send_all(b'{"event": "RESET"}\r\n{"event": "SHUTDOWN", "data"')
        await stream.send_all(b': {"guest": true}}\r\n{"return": [1]}\r\n')
        await lines.next()
        await stream.send_all(b'{"error": {"class": "x", "desc": "not now"}}\r\n')
        await stream.send_all(b'{"event": "STOP"}\r\n')

    async with serving(tmp_path, peer) as path, connected(path, what="machine a") as client:
        assert await client.execute("query-block", node="a") == [1]
        event = await client.wait_event(lambda event: event["event"] == "SHUTDOWN")
        assert event["data"] == {"guest": True}
        with pytest.raises(LocalError, match="cont: not now"):
            await client.execute("cont")
        assert (await client.wait_event(lambda event: True))["event"] == "RESET"
        stop = await client.wait_event(lambda event: event["event"] == "STOP")
        assert stop == {"event": "STOP"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "closed the connection"),
        (b"hello\n", "no message of QMP"),
        (b"[1]\n", "no message of QMP"),
        (b"[" * 100_000 + b"\n", "no message of QMP"),
        (b'{"x": 1}\n', "does not greet"),
        (GREETING, "closed the connection"),
        (b"x" * ((1 << 20) + 70000), "a line without an end"),
    ],
    ids=["nothing", "words", "list", "deep", "other", "half", "endless"],
)
async def test_a_peer_that_is_not_qemu_is_an_error_of_one_line(
    tmp_path: Path, said: bytes, message: str
) -> None:
    """Whatever it says, memory stays bounded and the error names the machine."""

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await stream.send_all(said)

    async with serving(tmp_path, peer) as path:
        with pytest.raises(LocalError, match=f"machine a: .*{message}"):
            async with connected(path, what="machine a"):
                raise AssertionError("it greeted")


async def test_a_peer_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    """QEMU serves one client at a time: the second waits no longer than its limit."""

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await lines.next()

    async with serving(tmp_path, peer) as path:
        with pytest.raises(LocalError, match="does not answer within 0.1 s"):
            async with connected(path, what="machine a", limit_s=0.1):
                raise AssertionError("it greeted")
    with pytest.raises(LocalError, match="No such file"):
        async with connected(tmp_path / "absent", what="machine a"):
            raise AssertionError("it greeted")


async def test_a_peer_that_greets_and_does_nothing_is_given_up(tmp_path: Path) -> None:
    """QEMU greets from a thread of its own: the one that does what it is told may hang."""

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await stream.send_all(GREETING)
        await lines.next()
        await stream.send_all(DONE)
        while True:
            await lines.next()

    async with (
        serving(tmp_path, peer) as path,
        connected(path, what="machine a", limit_s=0.1) as client,
    ):
        for _ in range(2):
            with pytest.raises(LocalError, match="cont: QEMU does not answer within 0.1 s"):
                await client.execute("cont")


async def agent_peer(
    stream: trio.SocketStream, lines: qmp.Lines, answer: Callable[[dict[str, Any]], bytes]
) -> None:
    """Answer as an agent does, by lines."""
    while True:
        line = (await lines.next()).rpartition(b"\xff")[2]
        await stream.send_all(answer(json.loads(line)))


async def test_an_agent_that_answers_its_ping_is_there(tmp_path: Path) -> None:
    """What somebody before us asked, and half answers, are passed over."""
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> bytes:
        asked.append(request["execute"])
        if request["execute"] == "guest-ping":
            return b'{"return": {}}\n'
        stale = b'{"return": 77}\n{"ret\n'
        return stale + b'\xff{"return": %d}\n' % request["arguments"]["id"]

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await agent_peer(stream, lines, answer)

    async with serving(tmp_path, peer) as path:
        assert await agent.answers(path, 10)
    assert asked == ["guest-sync-delimited", "guest-ping"]


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}\n" * 100, b'{"return": {}}\n', b'{"error": {}}\n', b"\xff" * 1000, b"x" * 2_000_000],
    ids=["silent", "empty", "unasked", "error", "noise", "endless"],
)
async def test_anything_else_is_no_agent(tmp_path: Path, answer: bytes) -> None:
    """An answer that is not to our question does not count; it ends by bytes or by time."""

    async def peer(stream: trio.SocketStream, lines: qmp.Lines) -> None:
        await agent_peer(stream, lines, lambda _: answer)

    async with serving(tmp_path, peer) as path:
        assert not await agent.answers(path, 0.5)
    assert not await agent.answers(tmp_path / "absent", 10)
