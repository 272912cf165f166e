"""A guest agent that freezes nothing, and answers as a test wants: qemu-ga's protocol."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any, Self


class FakeAgent:
    """Listens on ``path``. It does one thing after the other, as the real one.

    ``freezing`` is waited for before ``guest-fsfreeze-freeze`` is answered; ``deaf`` commands are
    never answered, and nothing after them. ``asked`` lists what came, ``frozen`` says how it is.
    """

    def __init__(self, *, deaf: tuple[str, ...] = ()) -> None:
        # A path that is short enough for a socket, wherever the tests lie.
        self._directory = tempfile.mkdtemp(prefix="agent-")
        self.path = Path(self._directory, "ga.sock")
        self.freezing = threading.Event()
        self.freezing.set()
        self.frozen = False
        self.count = 1
        self.asked: list[str] = []
        self.changed = threading.Condition()
        self._deaf = deaf
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(self.path))
        self._server.listen(8)
        self._ended = threading.Event()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="fake-agent")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.freezing.set()
        self.path.unlink()
        for one in (self._server, self._client):
            if one is not None:
                with_shutdown(one)
        self._thread.join()
        self._server.close()
        shutil.rmtree(self._directory)

    def wait_asked(self, command: str, times: int = 1, timeout_s: float = 60) -> None:
        """Wait until a command has come so many times."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.asked.count(command) >= times, timeout_s), (
                self.asked
            )

    def wait_thawed(self, timeout_s: float = 60) -> None:
        """Wait until it is not frozen."""
        with self.changed:
            assert self.changed.wait_for(lambda: not self.frozen, timeout_s)

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                self._client, _ = self._server.accept()
            except OSError:
                return
            with self._client as client, client.makefile("rb") as lines:
                try:
                    for line in lines:
                        self._answer(client, line)
                        if self._ended.is_set():
                            break
                except OSError:
                    continue

    def _answer(self, client: socket.socket, line: bytes) -> None:
        message = json.loads(line.rpartition(b"\xff")[2])
        command = message["execute"]
        with self.changed:
            self.asked.append(command)
            self.changed.notify_all()
        if command in self._deaf:
            self._ended.wait()
            return
        if command == "guest-fsfreeze-freeze":
            self.freezing.wait()
        with self.changed:
            result = self._act(command, message.get("arguments", {}))
            self.changed.notify_all()
        before = b"\xff" * (command == "guest-sync-delimited")
        client.sendall(before + json.dumps(result).encode() + b"\n")

    def _act(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command == "guest-sync-delimited":
            return {"return": arguments["id"]}
        if command == "guest-ping":
            return {"return": {}}
        if command == "guest-fsfreeze-status":
            return {"return": "frozen" if self.frozen else "thawed"}
        if command == "guest-fsfreeze-freeze":
            self.frozen = self.count > 0
            return {"return": self.count}
        if command == "guest-fsfreeze-thaw":
            was, self.frozen = self.frozen, False
            return {"return": self.count if was else 0}
        return {"error": {"class": "CommandNotFound", "desc": f"{command} is not known"}}


def with_shutdown(one: socket.socket) -> None:
    """End a socket that another thread waits for."""
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        assert os.getpid()  # it has ended by itself
