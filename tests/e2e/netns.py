"""A network namespace of its own for a site, that can be cut off from the vault and joined again.

The site reaches one port of this host: a forwarder on its own loopback (the vault is not spoken to
in the clear on any other address) passes it on, through a pair of virtual Ethernet interfaces, to
one that listens on their near end.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.e2e.mounted import PROGRAM, CommandError, MountedSite

TOP = Path(__file__).parents[2]
_numbers = itertools.count(1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Namespace:
    """A namespace while the context lasts."""

    def __init__(self, name: str, near: str, address: str) -> None:
        self.name = name
        self.address = address
        self._near = near
        self._server: socket.socket | None = None
        self._inner: subprocess.Popen[str] | None = None

    def cut(self) -> None:
        """Let nothing pass, in either direction."""
        _ip("link", "set", self._near, "down")

    def join(self) -> None:
        """Let it pass again."""
        _ip("link", "set", self._near, "up")

    @property
    def bytes_in(self) -> int:
        """What has come in over the wire so far, in bytes, headers included."""
        return int(Path(f"/sys/class/net/{self._near}/statistics/tx_bytes").read_text())

    def forward(self, port: int) -> int:
        """Let the namespace reach a port of this host's loopback; return it on its own loopback."""
        self._server = socket.create_server((self.address, 0))
        threading.Thread(
            target=_serve, args=(self._server, ("127.0.0.1", port)), daemon=True
        ).start()
        words = [sys.executable, "-m", "tests.e2e.netns", self.address,
                 str(self._server.getsockname()[1])]  # fmt: skip
        self._inner = subprocess.Popen(
            [*self.inside, *words], stdout=subprocess.PIPE, text=True, cwd=TOP
        )
        assert self._inner.stdout is not None
        return int(self._inner.stdout.readline())

    @property
    def inside(self) -> list[str]:
        """What a command begins with to run in it; its mounts are this host's."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def close(self) -> None:
        """End the forwarders."""
        if self._inner is not None:
            self._inner.kill()
            self._inner.communicate()
        if self._server is not None:
            with suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Make a namespace, and take it away."""
    number = next(_numbers)
    name, near, far = (f"vd{os.getpid()}{kind}{number}" for kind in ("s", "n", "f"))
    low, high = divmod(os.getpid() * 4 % 65536 & ~3, 256)
    first, second = (f"10.{200 + number % 50}.{low}.{high + last}" for last in (1, 2))
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("addr", "add", f"{first}/30", "dev", near)
        _ip("-n", name, "addr", "add", f"{second}/30", "dev", far)
        for words in (("link", "set", near, "up"), ("-n", name, "link", "set", far, "up"),
                      ("-n", name, "link", "set", "lo", "up")):  # fmt: skip
            _ip(*words)
        found = Namespace(name, near, first)
        try:
            yield found
        finally:
            found.close()
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", near)
        _ip("netns", "del", name)


class SiteIn(MountedSite):
    """A site whose programs run in a namespace."""

    asks_here = False  # this process is in another one
    namespace: Namespace

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the program in the namespace, and check its exit status."""
        command = [*self.namespace.inside, str(PROGRAM), *map(str, arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, env=self.environ, check=False, timeout=300
        )
        if result.returncode != code:
            raise CommandError(command, result)
        return result


def _serve(server: socket.socket, target: tuple[str, int]) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(target)
        except OSError:
            near.close()
            continue
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def main() -> None:
    """Forward what comes to a port of loopback, which is printed, to ADDRESS PORT."""
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    _serve(server, (sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    main()
