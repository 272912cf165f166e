"""What several of these tests need: a store of descriptors that outlives a daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


class Kept:
    """A store that keeps in this process."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}

    def push(self, name: str, fd: int) -> bool:
        self.fds[name] = os.dup(fd)
        return True

    def remove(self, name: str) -> bool:
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)
        return True

    def copies(self) -> dict[str, int]:
        return {name: os.dup(fd) for name, fd in self.fds.items()}


@pytest.fixture
def kept() -> Iterator[Kept]:
    store = Kept()
    yield store
    for name in list(store.fds):
        store.remove(name)
