"""One line to a guest's agent (qemu-ga): through its Unix socket, or by libvirt's virsh.

The other side is the guest, which may send anything, or nothing: each wait has a deadline (of
``time.monotonic``), and what is read is bounded. In the holder only.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

_LINE_LIMIT = 64 << 10
_LINES_MAX = 256


class QuiesceError(Exception):
    """What is to be frozen is not, or cannot be thawed now: one line."""


class GoneError(QuiesceError):
    """There is nobody to ask: the guest does not run."""


class Line(Protocol):
    """Asks a guest's agent."""

    name: str
    """The guest, for messages."""

    def open(self, deadline: float) -> None:
        """Connect, and let no answer to an earlier question be taken for one to ours."""

    def ask(self, command: str, deadline: float) -> Any:
        """Return what the agent returns."""

    def send(self, command: str) -> None:
        """Ask without waiting: what is asked next waits for its turn behind it."""

    def close(self) -> None:
        """Let go."""


class SocketLine:
    """A line through the socket of QEMU's character device."""

    def __init__(self, path: str) -> None:
        """Take the path of the socket; nothing is opened yet."""
        self.name = f"guest agent {path}"
        self._path = path
        self._socket: socket.socket | None = None
        self._rest = b""

    def open(self, deadline: float) -> None:
        """Connect where that is not done, and synchronize.

        Raises:
            GoneError: nobody listens there.
            QuiesceError: the agent does not answer in time.
        """
        if self._socket is None:
            self._socket = self._connect(deadline)
            self._rest = b""
        token = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        # The byte 255 is in no JSON: it ends what somebody before us left half said.
        self._put(b"\xff" + json.dumps(request).encode() + b"\n")
        for _ in range(_LINES_MAX):
            answer = self._next(deadline)
            if answer.get("return") == token:
                return
        raise QuiesceError(f"{self.name}: it answers something else")

    def ask(self, command: str, deadline: float) -> Any:
        """See `Line`."""
        self.send(command)
        for _ in range(_LINES_MAX):
            answer = self._next(deadline)
            if "error" in answer:
                raise QuiesceError(f"{self.name}: {command}: {_reason(answer['error'])}")
            if "return" in answer:
                return answer["return"]
        raise QuiesceError(f"{self.name}: it answers something else")

    def send(self, command: str) -> None:
        """See `Line`."""
        self._put(json.dumps({"execute": command}).encode() + b"\n")

    def close(self) -> None:
        """See `Line`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, deadline: float) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        made.settimeout(_left(deadline))
        try:
            made.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            made.close()
            raise GoneError(f"{self.name}: nobody listens: {error.strerror}") from None
        except OSError as error:
            made.close()
            raise QuiesceError(f"{self.name}: {error.strerror or 'no answer'}") from None
        return made

    def _put(self, data: bytes) -> None:
        if self._socket is None:
            raise QuiesceError(f"{self.name}: not connected")
        try:
            self._socket.settimeout(5.0)
            self._socket.sendall(data)
        except OSError as error:
            self.close()
            raise QuiesceError(f"{self.name}: {error.strerror or 'it takes nothing'}") from None

    def _next(self, deadline: float) -> dict[str, Any]:
        """Return the next answer that is an object."""
        while True:
            line, found, self._rest = self._rest.partition(b"\n")
            if not found:
                self._rest = line + self._read(deadline)
                continue
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(line.rpartition(b"\xff")[2])
                if isinstance(message, dict):
                    return message

    def _read(self, deadline: float) -> bytes:
        if self._socket is None or len(self._rest) > _LINE_LIMIT:
            raise QuiesceError(f"{self.name}: it says no line that ends")
        try:
            self._socket.settimeout(_left(deadline))
            data = self._socket.recv(65536)
        except TimeoutError:
            raise QuiesceError(f"{self.name}: no answer in time") from None
        except OSError as error:
            self.close()
            raise QuiesceError(f"{self.name}: {error.strerror}") from None
        if not data:
            self.close()
            raise QuiesceError(f"{self.name}: it was closed")
        return data


class VirshLine:
    """A line through libvirt, which has the agent's socket open itself, and synchronizes."""

    def __init__(self, domain: str) -> None:
        """Take the domain's name."""
        self.name = f"guest agent of {domain}"
        self._domain = domain

    def open(self, deadline: float) -> None:
        """See `Line`.

        Raises:
            GoneError: the domain does not run.
        """
        state = self._run(["domstate", self._domain], deadline).strip()
        if state not in ("running", "paused", "idle", "blocked", "in shutdown", "pmsuspended"):
            raise GoneError(f"{self.name}: the domain is {state or 'not there'}")
        self.ask("guest-ping", deadline)

    def ask(self, command: str, deadline: float) -> Any:
        """See `Line`."""
        seconds = str(max(1, math.ceil(deadline - time.monotonic())))
        request = json.dumps({"execute": command})
        words = ["qemu-agent-command", self._domain, request, "--timeout", seconds]
        text = self._run(words, deadline)
        try:
            return json.loads(text)["return"]
        except (ValueError, KeyError, TypeError):
            raise QuiesceError(f"{self.name}: {command}: not an answer: {text[:80]!r}") from None

    def send(self, command: str) -> None:
        """See `Line`: a moment is waited for virsh, the guest's answer is not needed."""
        with contextlib.suppress(QuiesceError):
            self.ask(command, time.monotonic() + 1.0)

    def close(self) -> None:
        """See `Line`."""

    def _run(self, words: list[str], deadline: float) -> str:
        command = ["virsh", "--quiet", *words]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=_left(deadline),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise QuiesceError(f"{self.name}: no answer in time") from None
        except OSError as error:
            raise QuiesceError(f"virsh: {error.strerror}") from None
        if done.returncode != 0:
            raise QuiesceError(f"{self.name}: {_last_line(done.stderr) or 'virsh failed'}")
        return done.stdout


def line_to(target: dict[str, str]) -> Line:
    """Return the line that a target of a note describes."""
    if target["kind"] == "libvirt":
        return VirshLine(target["domain"])
    return SocketLine(str(Path(target["path"])))


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _reason(error: object) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return str(text)[:200] if text else "it failed"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1].removeprefix("error: ")[:300] if lines else ""
