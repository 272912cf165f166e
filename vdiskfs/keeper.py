"""The keeper of one mount, where systemd does not keep it: starts the daemon, and again.

    python -m vdiskfs.keeper --settings-fd N [--ready-fd M] [--foreground] [-- COMMAND...]

Holds the descriptors that the daemon gives it (vdiskfs.fdstore), reaps the daemon, and
starts a successor with them unless it ended in order. It reads no request, and imports
next to nothing: there is little in it that could die. Without it the daemon goes on.

Where daemons die three times in a minute, it starts the plain one (vdiskfs.plain) with what they
left: machines go on, untracked, and the disks are compared afterwards. That one hands over to a
daemon after ten minutes, or when it is told to; a daemon that dies within a minute of that is
followed by the plain one at once, for twice as long. Should the plain one die, it is started
again with growing pauses, up to half a minute; what machines ask meanwhile waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from vdiskfs.fdstore import FAILURE, FIRST, HANDED_OVER

CONNECTION = "connection"
PLAIN = "VDISKFS_PLAIN"
"""Tells the plain daemon after how many seconds to hand over, and why it serves."""
DEATHS = 3
WITHIN_S = 60.0
"""Daemons that die so often within these seconds give way to the plain one."""
AGAIN_S = 600.0
LONGEST_AGAIN_S = 6 * 3600.0
SOON_S = 2.0
"""A plain daemon that dies within this many seconds of being ready serves nobody."""
LONGEST_S = 30.0
KEPT_MAX = 4096
_CREDENTIALS = struct.Struct("3i")


class Keeper:
    """One daemon, and its successors."""

    def __init__(self, command: Sequence[str], settings: int, ready: int | None) -> None:
        self._command = list(command)
        # A program of a test's own: the same one.
        self._plain_command = [
            "vdiskfs.plain" if part == "vdiskfs.daemon" else part for part in command
        ]
        self._settings = settings
        self._ready_fd = ready
        self._kept: list[tuple[str, int]] = []
        self._deaths: deque[float] = deque()
        self._most = DEATHS
        with contextlib.suppress(ValueError):  # tests kill more often than any fault does
            self._most = int(os.environ.pop("VDISKFS_DEATHS", ""))
        self._plain: str | None = None  # why it serves
        self._again_s = AGAIN_S
        self._probation = 0.0  # until then the daemon is on trial, after the plain one
        self._why = ""  # what the daemon said of its end
        self._pid = 0
        self._ready_at: float | None = None
        self._was_ready = False
        self._asked_to_end = False
        self._crashes = [one for one in os.environ.get("VDISKFS_CRASH", "").split(",") if one]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # the kernel gives an abstract name
        self._socket.setblocking(False)
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.set_wakeup_fd(self._woken)

    def run(self) -> int:
        """Keep until the daemon ends in order; return its exit status."""
        while True:
            self._start()
            status = self._watch()
            self._receive()  # what it sent before it died
            self._pid = 0
            if not self._was_ready:
                return _end_like(status)
            if status == 0:
                return 0
            if not self._goes_on(status):
                return 1

    # ---- the daemon ----------------------------------------------------------------------

    def _start(self) -> None:
        self._ready_at = None
        self._why = ""
        os.lseek(self._settings, 0, os.SEEK_SET)
        crash = self._crashes.pop(0) if self._crashes else ""
        pid = os.fork()
        if pid == 0:
            try:
                self._become_daemon(crash)
            except BaseException as error:  # noqa: BLE001 (there is no way back)
                os.write(2, f"vdiskfs: the daemon cannot be started: {error!r}\n".encode())
                os._exit(1)
        self._pid = pid
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def _become_daemon(self, crash: str) -> NoReturn:
        os.setsid()  # Ctrl-C comes through the keeper, once
        signal.set_wakeup_fd(-1)
        wanted = [fd for _, fd in self._kept]
        wanted += [self._settings] + ([] if self._ready_fd is None else [self._ready_fd])
        end = FIRST + len(wanted)
        plain = self._plain is not None
        arguments = [
            *(self._plain_command if plain else self._command),
            "--settings-fd",
            str(FIRST + len(self._kept)),
        ]
        if self._ready_fd is not None:
            arguments += ["--ready-fd", str(FIRST + len(self._kept) + 1)]
        environ = {key: value for key, value in os.environ.items() if key != "VDISKFS_CRASH"}
        environ |= {
            "NOTIFY_SOCKET": "@" + self._socket.getsockname()[1:].decode("ascii"),
            "VDISKFS_KEEPER": str(os.getppid()),
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(self._kept)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in self._kept),
        } | ({"VDISKFS_CRASH": crash} if crash else {})
        if plain:
            environ[PLAIN] = f"{self._again_s:.0f} {self._plain}"
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end) for fd in wanted]
        for place, fd in enumerate(high, FIRST):
            os.dup2(fd, place, inheritable=True)
        os.execve(arguments[0], arguments, environ)  # noqa: S606 (no shell is wanted)

    def _watch(self) -> int:
        """Serve the daemon until it is gone and reaped; return its wait status."""
        process = os.pidfd_open(self._pid)
        poll = select.poll()
        for fd in (process, self._wake, self._socket.fileno()):
            poll.register(fd, select.POLLIN)
        try:
            while not any(fd == process for fd, _ in poll.poll()):
                self._receive()
                for number in self._take_signals():
                    self._asked_to_end = True
                    os.kill(self._pid, signal.SIGTERM if number == signal.SIGHUP else number)
        finally:
            os.close(process)
        _, status = os.waitpid(self._pid, 0)
        return status

    def _take_signals(self) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 64)
        taken, self._signals = self._signals, []
        return taken

    def _goes_on(self, status: int) -> bool:
        """Wait until the successor may start; False: there is nothing left to serve."""
        now = time.monotonic()
        if os.waitstatus_to_exitcode(status) == HANDED_OVER:
            say("INFO", "the daemon hands the mount over")
            if self._plain is not None:
                self._plain = None
                self._deaths.clear()
                self._probation = now + WITHIN_S
            return True
        how = _how(status) + (f": {self._why}" if self._why else "")
        if self._plain is not None:
            pause_s = self._pause_s(now)
            when = f"in {pause_s:.0f} s" if pause_s else "now"
            say("ERROR", f"the plain daemon {how}; it is started again {when}")
            return self._wait(pause_s)
        self._deaths.append(now)
        self._forget(now)
        if len(self._deaths) < self._most and now > self._probation:
            say("ERROR", f"the daemon {how}; it is started again now")
            return self._wait(0)
        self._serve_plainly(how, now)
        return self._wait(0)

    def _serve_plainly(self, how: str, now: float) -> None:
        """From now on the plain daemon is started."""
        if now <= self._probation:
            self._again_s = min(LONGEST_AGAIN_S, 2 * self._again_s)
            often = "the daemon died again"
        else:
            self._again_s = AGAIN_S
            often = f"the daemon died {len(self._deaths)} times within {WITHIN_S:.0f} s"
        self._deaths.clear()
        self._plain = f"{often}; the last one {how}"
        say("CRITICAL", f"{self._plain}; the mount is served plainly, untracked, for"
                        f" {self._again_s:.0f} s or until vdiskfs upgrade")  # fmt: skip

    def _pause_s(self, now: float) -> float:
        """Return how long to wait before the plain daemon is started again."""
        if self._ready_at is None or now - self._ready_at < SOON_S:
            self._deaths.append(now)
        self._forget(now)
        beyond = len(self._deaths) - DEATHS
        return min(LONGEST_S, 2.0**beyond) if beyond >= 0 else 0.0

    def _forget(self, now: float) -> None:
        while self._deaths and now - self._deaths[0] > WITHIN_S:
            self._deaths.popleft()

    def _wait(self, pause_s: float) -> bool:
        """Wait; False where the mount is gone meanwhile, or somebody ends the keeper."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        connection = next((fd for name, fd in self._kept if name == CONNECTION), None)
        if connection is None:
            say("ERROR", "it left no connection to take over: the mount is lost")
            return False
        poll.register(connection, 0)  # POLLERR: the connection has ended
        for fd, _ in poll.poll(pause_s * 1000):
            if fd == connection:
                say("INFO", "the mount is gone")
                return False
            if self._take_signals():
                say("ERROR", "told to end while no daemon serves: the mount is given up")
                return False
        return True

    # ---- what it sends -------------------------------------------------------------------

    def _receive(self) -> None:
        """Take all messages that wait; only the daemon's count."""
        while True:
            room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * 253)
            try:
                text, control, _, _ = self._socket.recvmsg(
                    65536, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            fds: list[int] = []
            sender = 0
            for level, kind, data in control:
                if level != socket.SOL_SOCKET:
                    continue
                if kind == socket.SCM_RIGHTS:
                    fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
                elif kind == socket.SCM_CREDENTIALS:
                    sender = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
            lines = text.decode(errors="replace").split("\n") if sender == self._pid else []
            if not self._take(lines, fds):
                for fd in fds:
                    os.close(fd)

    def _take(self, lines: list[str], fds: list[int]) -> bool:
        """Do what a message says; True: its descriptors are kept."""
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
        if "READY=1" in lines:
            self._was_ready = True
            self._ready_at = time.monotonic()
        why = next((line for line in lines if line.startswith(f"{FAILURE}=")), None)
        if why is not None:
            self._why = why.partition("=")[2]
        if "FDSTOREREMOVE=1" in lines:
            for _, fd in [one for one in self._kept if one[0] == name]:
                os.close(fd)
            self._kept = [one for one in self._kept if one[0] != name]
        elif "FDSTORE=1" in lines and fds:
            if len(self._kept) + len(fds) > KEPT_MAX or ":" in name:
                say("WARNING", f"{name}: not kept: {len(self._kept)} descriptors are")
                return False
            self._kept += [(name, fd) for fd in fds]
            return True
        return False


def say(level: str, text: str) -> None:
    """Write a line to the daemon's log, in its form."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"
    with contextlib.suppress(OSError):  # its disk may have failed
        os.write(2, f"{stamp} {level} vdiskfs.keeper: {text}\n".encode())


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _end_like(status: int) -> int:
    """End as the daemon did, which was never ready."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def main(arguments: Sequence[str]) -> int:
    """Run the keeper; the exit status is the daemon's."""
    given = list(arguments)
    command = [sys.executable, "-m", "vdiskfs.daemon"]
    if "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    numbers = {}
    for name in ("--settings-fd", "--ready-fd"):
        if name in given:
            at = given.index(name)
            numbers[name] = int(given[at + 1])
            os.set_inheritable(numbers[name], False)
            del given[at : at + 2]
    return Keeper([*command, *given], numbers["--settings-fd"], numbers.get("--ready-fd")).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
