"""What the tests of the command line share: a registry of their own, and a daemon that is a fake.

The fake answers on a Unix socket what a test tells it to. It is for the shape of requests
and for faults; that the real daemon fits is shown by the tests of whole mounts.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from tests.delta.model import DiskModel
from tests.vaults import given, key_file
from vdiskfs import registry
from vdiskfs.catalog import Vault
from vdiskfs.registry import MountEntry
from vdiskfs.store import open_store
from vdiskfs_tools.main import cli

Run = Callable[..., Result]


@dataclass
class FakeDaemon:
    """Answers by method and path; keeps what it was asked."""

    entry: MountEntry
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    was_asked: threading.Event = field(default_factory=threading.Event)

    def wait_asked(self, limit_s: float) -> bool:
        """Wait until somebody asked something."""
        return self.was_asked.wait(limit_s)

    def answer(self, method: str, path: str, document: Any, status: int = 200) -> None:
        """Set the answer: a document, or bytes, or "hang", or "close"."""
        self.answers[method, path] = (status, document)

    def refuse(self, method: str, path: str, kind: str, message: str, **more: Any) -> None:
        error = {"kind": kind, "message": message, "hint": "", "exit_code": 1, **more}
        self.answer(method, path, {"error": error}, 409)


def handler_of(daemon: FakeDaemon) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply("GET", None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self.reply("POST", json.loads(self.rfile.read(length)))

        def reply(self, method: str, body: Any) -> None:
            path = self.path.partition("?")[0].removeprefix("/v1")
            daemon.asked.append((method, self.path.removeprefix("/v1"), body))
            daemon.was_asked.set()
            missing = {"error": {"kind": "NotFoundError", "message": f"no {path}", "hint": ""}}
            status, document = daemon.answers.get((method, path), (404, missing))
            if document == "hang":
                daemon.ended.wait(60)
            if document in ("hang", "close"):
                return
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the mounts of this host out of the tests, and the tests out of the host."""
    directory = tmp_path / "registry"
    monkeypatch.setattr(registry, "registry_directory", lambda: directory)
    monkeypatch.delenv("VDISKFS_MOUNT", raising=False)
    monkeypatch.setattr("vdiskfs.config.default_config_path", lambda *_: tmp_path / "absent.conf")
    return directory


@pytest.fixture
def entry(tmp_path: Path) -> MountEntry:
    """A running mount without a daemon that answers."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    found = MountEntry(
        mountpoint=str(mountpoint),
        pid=os.getpid(),
        socket=str(state / "s"),
        state=str(state),
        vault=f"file://{tmp_path}/vault",
        site="here",
        source=str(source),
    )
    registry.write_entry(found)
    return found


@pytest.fixture
def daemon(entry: MountEntry) -> Iterator[FakeDaemon]:
    """A running mount with a fake daemon."""
    fake = FakeDaemon(entry)
    # The path of a socket is short; a test's directory may not be.
    descriptor = os.open(entry.state, os.O_PATH)
    try:
        server = ThreadingUnixStreamServer(f"/proc/self/fd/{descriptor}/s", handler_of(fake))
    finally:
        os.close(descriptor)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run() -> Run:
    """Run the program with these arguments, in this process."""

    def call(*args: str, **settings: Any) -> Result:
        return CliRunner().invoke(cli, list(args), **settings)

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Run the program with --json; it must succeed and print one document and nothing else."""

    def call(*args: str) -> Any:
        result = run(*args, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return call


@dataclass
class History:
    """A vault with the disk web01 in it, and what the disk was at each epoch."""

    url: str
    directory: Path
    states: dict[int, bytes]
    times: dict[int, int]


async def make_history(directory: Path, spool: Path) -> History:
    """Make three points of a disk of 1 MiB + 512 bytes: written, changed, cut."""
    url = f"file://{directory}"
    store = open_store(url)
    vault = await Vault.init(store, given())
    size = (1 << 20) + 512
    record = await vault.create_disk("web01", file="web01.img", size=size, site="here")
    model = DiskModel(spool, vault_id=vault.vault_id, disk_id=record.id)
    log = vault.log(record)
    model.truncate(size)
    model.write(0, bytes(range(256)) * 32)
    model.write(size - 512, b"the end " * 64)
    await log.publish(model.seal())
    model.write(4096, b"changed")
    model.discard(0, 4096)
    await log.publish(model.seal(label="before \x1b[31mthe upgrade"))
    model.write(500_000, b"later")
    await log.publish(model.seal())
    await store.aclose()
    return History(url, directory, model.states, model.times)


@pytest.fixture
def history(tmp_path: Path, each_vault: str, monkeypatch: pytest.MonkeyPatch) -> History:
    """A folder vault with three points, plain and encrypted: then commands find its key."""
    key = key_file(tmp_path)
    if key is not None:
        monkeypatch.setenv("VDISKFS_KEY_FILE", str(key))
    spool = tmp_path / "spool"
    spool.mkdir()
    return trio.run(make_history, tmp_path / "history", spool)
