"""Whether something takes connections on a port: directly, or through QEMU's own network.

QEMU's own network accepts a connection before it asks the guest, so that connecting says
nothing. QEMU lists the state of each connection; that is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from vdiskfs.errors import LocalError

# "  TCP[ESTABLISHED]  13  127.0.0.1 40123  10.0.2.15  80  0  0", as `info usernet` prints it.
_ROW = re.compile(r"^\s*TCP\[(\w+)\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s", re.MULTILINE)
# A guest that took the connection may have closed it by now.
_OPEN = frozenset(
    ("ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_1", "FIN_WAIT_2", "CLOSING", "LAST_ACK", "TIME_WAIT")
)
_LOOK_S = 0.05


def first_address(record: Mapping[str, Any], what: str, port: int) -> str:
    """Return the address at which a machine on record is asked for a port.

    Raises:
        LocalError: there is none that is surely its own.
    """
    addresses = record.get("addresses")
    if not isinstance(addresses, list | tuple) or not addresses:
        raise LocalError(
            f"{what}: no address of its own is known for port {port}",
            hint="check it by agent, serial or command, or give its network an address",
        )
    return str(addresses[0])


async def connects(host: str, port: int, limit_s: float) -> bool:
    """Tell whether a connection is accepted within the limit."""
    with trio.move_on_after(limit_s):
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError:
            return False
        await stream.aclose()
        return True
    return False


async def is_established(connections: Callable[[], Awaitable[str]], port: int) -> bool:
    """Tell whether a connection through QEMU reaches the guest's port.

    Args:
        connections: asks QEMU for its list.
        port: the guest's.

    Waits as long as the guest neither takes nor refuses it.
    """
    forward = _forward(await connections(), port)
    if forward is None:
        return False
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", forward)
    except OSError:
        return False
    async with stream, trio.open_nursery() as nursery:
        answered = trio.Event()
        closed = trio.Event()

        async def read() -> None:
            try:
                data = await stream.receive_some(1)
            except trio.BrokenResourceError:
                data = b""
            (answered if data else closed).set()

        nursery.start_soon(read)
        reached = False
        while not reached:
            states = _states(await connections(), forward, port)
            reached = answered.is_set() or bool(states & _OPEN)
            if reached or closed.is_set():
                break
            await trio.sleep(_LOOK_S)
        nursery.cancel_scope.cancel()
        return reached
    raise AssertionError  # the nursery ends by what is in it


def _forward(text: str, port: int) -> int | None:
    """Return the port of this host that leads to the guest's."""
    for state, _, source, target in _ROW.findall(text):
        if state == "HOST_FORWARD" and int(target) == port:
            return int(source)
    return None


def _states(text: str, forward: int, port: int) -> set[str]:
    """Return the states of the connections that came in through a forwarded port."""
    rows = _ROW.findall(text)
    wanted = (str(forward), str(port))
    return {one[0] for one in rows if one[0] != "HOST_FORWARD" and one[2:] == wanted}
