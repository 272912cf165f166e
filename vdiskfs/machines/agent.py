"""Whether the guest agent in a machine answers (qemu-ga's protocol on a Unix socket).

The other side is the guest, which may send anything: one attempt is bounded in bytes and time.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import trio

from vdiskfs.errors import LocalError
from vdiskfs.machines.qmp import LINE_LIMIT, Lines, connect

_LINES_MAX = 64


async def answers(path: Path, limit_s: float) -> bool:
    """Tell whether an agent answers a ping on the socket within the limit."""
    with trio.move_on_after(limit_s):
        try:
            async with await connect(path) as stream:
                return await _ping(stream)
        except (LocalError, trio.BrokenResourceError):
            return False
    return False


async def _ping(stream: trio.SocketStream) -> bool:
    """Synchronize, so that answers to somebody before us are not taken for ours; then ping."""
    token = secrets.randbits(31)
    request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
    # The byte 255 is in no JSON: it ends what somebody before us left half said.
    await stream.send_all(b"\xff" + json.dumps(request).encode() + b"\n")
    lines = Lines(stream)
    if not await _returned(lines, token):
        return False
    await stream.send_all(b'{"execute": "guest-ping"}\n')
    return await _returned(lines, {})


async def _returned(lines: Lines, wanted: object) -> bool:
    for _ in range(_LINES_MAX):
        line = (await lines.next()).rpartition(b"\xff")[2]
        try:
            message = json.loads(line[:LINE_LIMIT])
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict) and "return" in message and message["return"] == wanted:
            return True
    return False
