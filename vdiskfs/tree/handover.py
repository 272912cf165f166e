"""What a successor must know of the names: a log that outlives the daemon.

The kernel holds files by the ids of their nodes: open files, working directories, mounted
loop devices. Before a reply names a node its record is in the log: its id, what identifies
it, and where it is found. So a successor gives the same file the same id, and answers for
an id that only its predecessor named.

Before a change of names is made it is in the log too, with the number of the kernel's request
and what the name led to. A successor that gets the request again (`REQUEST` says so) knows
by that whether the change is its predecessor's own: a file that is there because it was made
is then no error, nor is one that is gone because it was removed.

The log is a file in memory, kept by whoever keeps the connection: it lives exactly as long,
and a full disk cannot stop it. One write for each record; a record cut short by a kill was
never acted upon. Trio thread only.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdiskfs.crash import hook

if TYPE_CHECKING:
    from vdiskfs.fdstore import FdStore

LOG = "names"
FILE = "node"
RESENT = 1 << 30  # native/src/names.c, put_number
_ACTS_KEPT = 1024  # more than are under way at once: fs.MAX_TASKS
_COMPACT = 8 << 20

Identity = tuple[Any, ...]

REQUEST: ContextVar[int] = ContextVar("REQUEST", default=0)
"""The number of the request that this task answers, with a bit for one that was sent again."""


@dataclass(frozen=True, slots=True)
class Act:
    """A change of names, as it was logged before it was made.

    ``before`` identifies what the name led to, None: nothing. ``more`` is the act's own.
    """

    number: int
    kind: str
    directory: int
    name: str
    before: Identity | None
    more: tuple[Any, ...] = ()


@dataclass(slots=True)
class Known:
    """A node that a predecessor named: where it was found, newest place last."""

    identity: Identity
    places: list[tuple[int, Any]]


class Handover:
    """The log of one mount, and the files without a name that a successor needs.

    Without a store nothing is written: nobody would read it.
    """

    def __init__(self, store: FdStore | None = None, fds: dict[str, int] | None = None) -> None:
        """Read what a predecessor left: those of its descriptors are taken out of ``fds``."""
        self._store = store
        self._fd = -1
        self._version = 0
        self._size = 0
        self._limit = _COMPACT
        self._acts: deque[Act] = deque(maxlen=_ACTS_KEPT)
        self._earlier: dict[int, Act] = {}
        self._known: dict[int, Known] = {}
        self._numbers: dict[Identity, int] = {}
        self._files: dict[int, int] = {}
        self._live: Callable[[], Iterable[list[Any]]] = list
        self.highest = 0
        self._load({} if fds is None else fds)

    @property
    def active(self) -> bool:
        """Whether a log is kept."""
        return self._store is not None

    def begin(self, live: Callable[[], Iterable[list[Any]]]) -> None:
        """Start the log. ``live`` gives the records of all nodes, for when it is written anew."""
        self._live = live
        if self._store is not None:
            self._write_anew()

    def _load(self, fds: dict[str, int]) -> None:
        logs = {int(name.rpartition("-")[2]): fd for name, fd in fds.items() if _is(name, LOG)}
        self._files = {
            int(name.rpartition("-")[2]): fd for name, fd in fds.items() if _is(name, FILE)
        }
        for name in [name for name in fds if _is(name, LOG) or _is(name, FILE)]:
            del fds[name]
        if logs:
            self._version = max(logs)
            for line in _read(logs[self._version]).split(b"\n")[:-1]:
                self._take(json.loads(line))
        for version, fd in logs.items():
            os.close(fd)
            if version != self._version and self._store is not None:
                self._store.remove(f"{LOG}-{version}")

    def _take(self, record: list[Any]) -> None:
        if record[0] == "act":
            _, number, kind, directory, name, before, more = record
            act = Act(number, kind, directory, name, _frozen(before), _frozen(more))
            self._earlier[number] = act
            self._acts.append(act)
            return
        if record[0] == "gone":
            number = self._numbers.pop(_frozen(record[1]), None)
            self._known.pop(number or 0, None)
            return
        _, number, identity, place = record
        identity = _frozen(identity)
        known = self._known.get(number)
        if known is None or known.identity != identity:
            known = self._known[number] = Known(identity, [])
        known.places = [*known.places, tuple(place)][-3:]
        self._numbers[identity] = number
        self.highest = max(self.highest, number)

    # ---- nodes -----------------------------------------------------------------------------

    def named(self, number: int, identity: Identity, place: tuple[int, Any]) -> None:
        """Note a node, or another place of one. In the log on return."""
        if self._store is not None:
            self._write(["node", number, identity, place])

    def number_of(self, identity: Identity) -> int | None:
        """Return the id under which a predecessor named it."""
        return self._numbers.get(identity)

    def known(self, number: int) -> Known | None:
        """Return what a predecessor noted of an id."""
        return self._known.get(number)

    def place_of(self, identity: Identity) -> Any:
        """Return what `Node.place` said last, besides the directory; None: nobody named it."""
        known = self._known.get(self._numbers.get(identity, 0))
        return None if known is None else known.places[-1][1]

    def forget(self, identity: Identity) -> None:
        """What it identified is no more: the next one is another."""
        number = self._numbers.pop(identity, None)
        if number is not None:
            self._known.pop(number, None)
            if self._store is not None:
                self._write(["gone", identity])

    # ---- acts ------------------------------------------------------------------------------

    def act(
        self, kind: str, directory: int, name: bytes, before: Identity | None,
        more: tuple[Any, ...] = (),
    ) -> Act | None:  # fmt: skip
        """Note what is about to be done; or return it as a predecessor noted it.

        The caller makes the change only if what it finds says that it is not made.
        """
        if self._store is None:
            return None
        request = REQUEST.get()
        number = request & ~RESENT
        plain = os.fsdecode(name)
        earlier = self._earlier.get(number) if request & RESENT else None
        if earlier is not None and (earlier.kind, earlier.directory, earlier.name) == (
            kind, directory, plain,
        ):  # fmt: skip
            return earlier
        act = Act(number, kind, directory, plain, before, more)
        self._acts.append(act)
        self._write(_act_record(act))
        hook(f"{kind}.logged")
        return None

    # ---- files without a name ----------------------------------------------------------------

    def keep_file(self, number: int, fd: int) -> None:
        """Have the descriptor of a node kept: it is about to lose its name, and is in use."""
        if self._store is not None and number not in self._files:
            self._store.push(f"{FILE}-{number}", fd)
            self._files[number] = -1
            hook("node.kept")

    def take_file(self, number: int) -> int | None:
        """Return the descriptor that a predecessor kept for a node; the caller's from now on."""
        fd = self._files.get(number, -1)
        if fd < 0:
            return None
        self._files[number] = -1
        return fd

    def drop_file(self, number: int) -> None:
        """The node is not in use any more."""
        fd = self._files.pop(number, None)
        if fd is not None:
            if fd >= 0:
                os.close(fd)
            if self._store is not None:
                self._store.remove(f"{FILE}-{number}")

    @property
    def files(self) -> list[int]:
        """The ids of the nodes whose descriptors are kept."""
        return list(self._files)

    def close(self) -> None:
        """The mount is gone."""
        for fd in self._files.values():
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- the log -----------------------------------------------------------------------------

    def _write(self, record: list[Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        os.write(self._fd, line)
        self._size += len(line)
        if self._size > self._limit:
            self._write_anew()

    def _write_anew(self) -> None:
        """Write what still counts to a new log, and have that kept instead."""
        assert self._store is not None
        records = [_act_record(act) for act in self._acts]
        live = list(self._live())
        here = {record[1] for record in live}
        records += [
            ["node", number, known.identity, place]
            for number, known in self._known.items() if number not in here
            for place in known.places
        ]  # fmt: skip
        text = "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in records + live)
        fd = os.memfd_create("vdiskfs-names", os.MFD_CLOEXEC)
        os.write(fd, text.encode())
        before, self._version = self._version, self._version + 1
        self._store.push(f"{LOG}-{self._version}", fd)
        hook("names.kept")
        if before:
            self._store.remove(f"{LOG}-{before}")
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size = len(text)
        self._limit = max(_COMPACT, 2 * self._size)


def _act_record(act: Act) -> list[Any]:
    return ["act", act.number, act.kind, act.directory, act.name, act.before, act.more]


def _is(name: str, kind: str) -> bool:
    return name.rpartition("-")[0] == kind


def _read(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value
