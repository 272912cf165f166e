"""Starts QEMU so that it outlives whoever asked, and stays beside it as its console.

A program of its own, which imports nothing of vdiskfs: settings come as JSON on standard
input. Three processes: this one, which looks at the disks (that may take as long as their
bytes take to arrive, so the daemon that serves them must not do it) and says by its exit
status whether the machine was let go; its child, the console, which keeps the logs within
their bounds, reaps QEMU and notes how it ended; and QEMU.

Invariant: QEMU's first instruction comes after the record that names it is durable, and while
a lock on the file ``lock`` is held, which QEMU inherits: nothing is ever started twice in one
directory, whoever is killed when.

Exit status: 0 let go; 75 one runs already; 1 not started, and standard error says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import stat
import struct
import sys
from typing import Any, NoReturn

BUSY = 75
_QCOW2 = b"QFI\xfb"
_DATA_FILE = 1 << 2
"""The incompatible feature of a qcow2 file whose data lies in another file."""


class Log:
    """A file that is begun anew when it is full; the one before it stays as NAME.1."""

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit, self._size = name, limit, 0
        self._fd = self._open()

    def write(self, data: bytes) -> None:
        """Append; what the disk has no room for is dropped, the machine goes on."""
        with contextlib.suppress(OSError):
            if self._size + len(data) > self._limit and self._size:
                os.rename(self._name, f"{self._name}.1")  # noqa: PTH104 (no pathlib: it is slow)
                os.close(self._fd)
                self._fd, self._size = self._open(), 0
            self._size += os.write(self._fd, data)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._name, flags, 0o600)


def check_disk(name: str, path: str, kind: str) -> None:
    """Refuse a disk that is no file, or that would make QEMU open other files of this host."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ValueError(f"disk {name}: {path} is no file")
        head = os.pread(fd, 80, 0) if kind == "qcow2" else b""
    finally:
        os.close(fd)
    if kind != "qcow2":
        return
    if len(head) < 72 or head[:4] != _QCOW2:
        raise ValueError(f"disk {name}: {path} is not a qcow2 file")
    version, backing = struct.unpack_from(">IQ", head, 4)
    if backing:
        raise ValueError(f"disk {name}: {path} is an overlay over another file, which cannot be"
                         f" started; flatten it with qemu-img convert")  # fmt: skip
    if version >= 3 and len(head) >= 80 and struct.unpack_from(">Q", head, 72)[0] & _DATA_FILE:
        raise ValueError(f"disk {name}: {path} has its data in another file, which cannot be"
                         f" started; convert it with qemu-img convert")  # fmt: skip


def process_start(pid: int) -> int:
    """Return when a process started, in clock ticks since boot."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        return int(file.read().rpartition(")")[2].split()[19])


def write_durably(name: str, body: dict[str, Any]) -> None:
    """Put a small JSON file into the directory, whole and durable."""
    fd = os.open(f".{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(body, indent=1).encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(f".{name}.new", name)  # noqa: PTH104
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def launch(settings: dict[str, Any]) -> int:
    """Start what the settings say; return the exit status."""
    os.umask(0o077)
    os.chdir(settings["directory"])
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return BUSY
    for name, path, kind in settings["disks"]:
        check_disk(name, path, kind)
    # Invariant: from here on a SIGTERM (a start that is cancelled) waits for the outcome.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name in ("record.json", "ended.json", *settings["stale"]):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108
    heard, told = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        os.close(heard)
        become_console(settings, lock, told)
    os.close(told)
    answer = os.read(heard, 4096)
    if answer != b"gone":
        raise ValueError(answer.decode(errors="replace") or "its console ended")
    return 0


def become_console(settings: dict[str, Any], lock: int, told: int) -> NoReturn:
    """Start QEMU, let it go once its record is durable, and serve it until it ends."""
    code = 1
    try:
        code = serve(settings, lock, told)
    except BaseException as error:  # noqa: BLE001 (there is nobody above)
        with contextlib.suppress(OSError):
            os.write(told, str(error)[:1000].encode(errors="replace"))
    os._exit(code)


def serve(settings: dict[str, Any], lock: int, told: int) -> int:
    """Be the console; see ``become_console``."""
    os.setsid()
    limit = settings["log_limit"]
    out, err, go = (os.pipe2(os.O_CLOEXEC) for _ in range(3))
    logs = {out[0]: Log("serial.log", limit), err[0]: Log("qemu.log", limit)}
    pid = os.fork()
    if pid == 0:
        become_qemu(settings["command"], lock, (out[1], err[1], go[0]), go[1])
    for fd in (out[1], err[1], go[0]):
        os.close(fd)
    own = {"console": os.getpid(), "console_start": process_start(os.getpid())}
    body = settings["record"] | {"pid": pid, "pid_start": process_start(pid)} | own
    write_durably("record.json", body)
    # Invariant: whoever asked still waits for this word, or QEMU is not let go.
    os.write(told, b"gone")
    os.close(told)
    os.write(go[1], b"1")
    os.close(go[1])
    hush()
    pump(logs)
    _, status = os.waitpid(pid, 0)
    write_durably("ended.json", {"status": os.waitstatus_to_exitcode(status)})
    return 0


def become_qemu(command: list[str], lock: int, ends: tuple[int, int, int], other: int) -> NoReturn:
    """Wait for the word, and become QEMU; without the word, end."""
    out, err, go = ends
    try:
        os.setsid()
        os.close(other)
        if os.read(go, 1) != b"1":
            os._exit(1)
        os.set_inheritable(lock, True)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd, place in ((null, 0), (out, 1), (err, 2)):
            os.dup2(fd, place, inheritable=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606 (no shell is wanted)
    except BaseException as error:  # noqa: BLE001 (there is no way back)
        os.write(err, f"{command[0]}: {error}\n".encode(errors="replace"))
    os._exit(127)


def hush() -> None:
    """Let go of what the console was started with."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for place in (0, 1, 2):
        os.dup2(null, place)


def pump(logs: dict[int, Log]) -> None:
    """Write what comes out of QEMU to its logs, until it is gone."""
    poll = select.poll()
    for fd in logs:
        poll.register(fd, select.POLLIN)
    left = set(logs)
    while left:
        for fd, _ in poll.poll():
            data = os.read(fd, 65536)
            if data:
                logs[fd].write(data)
            else:
                poll.unregister(fd)
                left.discard(fd)


def main() -> int:
    """Read the settings and launch; one line on standard error says what is wrong."""
    try:
        return launch(json.load(sys.stdin))
    except OSError as error:
        sys.stderr.write(f"{error.filename or 'this host'}: {error.strerror}\n")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
