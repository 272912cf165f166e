"""A program that makes, renames and removes files, and knows what each answer must be."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

_PACE_S = 0.002  # of names the daemon answers thousands a second: the writers want some too


class Names:
    """One thread on names of its own (``prefix``) in one directory, from start to stop.

    It ends at the first answer that is not right, or at an error that only a broken mount gives:
    ``wrong`` says which.
    """

    def __init__(self, directory: Path, seed: int, prefix: str = "n") -> None:
        self._directory = directory
        self._rng = random.Random(seed)
        self._prefix = prefix
        self._files: dict[str, bytes] = {}
        self._folders: set[str] = set()
        self._identity: dict[str, int] = {}  # equal for two names of one file
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="names")
        self.done = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def remove_all(self) -> None:
        """Remove what is left; the thread has ended."""
        for name in self._files:
            (self._directory / name).unlink()
        for name in self._folders:
            (self._directory / name).rmdir()

    def _run(self) -> None:
        acts = [
            (self._create, 6), (self._rename, 4), (self._unlink, 4), (self._mkdir, 1),
            (self._rmdir, 1), (self._link, 1), (self._read, 2), (self._list, 2),
        ]  # fmt: skip
        while not self.wrong and not self._stopped.wait(_PACE_S):
            act = self._rng.choices([a for a, _ in acts], [w for _, w in acts])[0]
            try:
                act()
                self.done += 1
            except OSError as error:
                self.wrong.append(f"operation {self.done}, {act.__name__[1:]}: {error}")

    def _new(self) -> str:
        return f"{self._prefix}-{self._rng.randrange(40)}.txt"

    def _some(self) -> str | None:
        return self._rng.choice(sorted(self._files)) if self._files else None

    def _expect(self, code: int, act: Callable[[], object], what: str) -> None:
        try:
            act()
        except OSError as error:
            if error.errno != code:
                raise
        else:
            self.wrong.append(f"{what}: done, but {errno.errorcode[code]} was right")

    def _create(self) -> None:
        name = self._new()
        path = self._directory / name
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        if name in self._files:
            self._expect(errno.EEXIST, lambda: os.close(os.open(path, flags)), f"create {name}")
            return
        fd = os.open(path, flags, 0o600)
        # The name is there from now on, whatever becomes of the rest.
        self._files[name], self._identity[name] = b"", self.done
        data = self._rng.randbytes(self._rng.randrange(200))
        try:
            os.write(fd, data)
            self._files[name] = data
        finally:
            os.close(fd)

    def _rename(self) -> None:
        old, new = self._some(), self._new()
        if old is None:
            path = self._directory / new
            self._expect(errno.ENOENT, lambda: path.rename(path.with_suffix(".not")), "rename")
            return
        if old != new and self._identity[old] == self._identity.get(new):
            return  # two names of one file: POSIX leaves both, and who asks for that?
        (self._directory / old).rename(self._directory / new)
        self._files[new] = self._files.pop(old)
        self._identity[new] = self._identity.pop(old)

    def _unlink(self) -> None:
        name = self._some()
        if name is None or self._rng.random() < 0.2:
            other = self._new()
            if other not in self._files:
                path = self._directory / other
                self._expect(errno.ENOENT, path.unlink, f"unlink {other}")
            return
        (self._directory / name).unlink()
        del self._files[name], self._identity[name]

    def _mkdir(self) -> None:
        name = f"{self._prefix}-{self._rng.randrange(5)}.d"
        path = self._directory / name
        if name in self._folders:
            self._expect(errno.EEXIST, path.mkdir, f"mkdir {name}")
            return
        path.mkdir()
        self._folders.add(name)

    def _rmdir(self) -> None:
        if self._folders:
            name = self._rng.choice(sorted(self._folders))
            (self._directory / name).rmdir()
            self._folders.remove(name)

    def _link(self) -> None:
        old, new = self._some(), self._new()
        if old is None or new in self._files:
            return
        os.link(self._directory / old, self._directory / new)
        # Each name is removed and renamed alone; nobody writes through either again.
        self._files[new] = self._files[old]
        self._identity[new] = self._identity[old]

    def _read(self) -> None:
        name = self._some()
        if (
            name is not None
            and (data := (self._directory / name).read_bytes()) != self._files[name]
        ):
            self.wrong.append(f"{name} holds {len(data)} bytes, not its {len(self._files[name])}")

    def _list(self) -> None:
        found = {n for n in os.listdir(self._directory) if n.startswith(f"{self._prefix}-")}
        wanted = {*self._files, *self._folders}
        if found != wanted:
            self.wrong.append(f"listed: too many {found - wanted}, missing {wanted - found}")
